"""Pictures from strangers: bombs are refused before they are decoded, whatever they are called."""

from __future__ import annotations

import base64
import io
import os
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.data import folder, photos, pictures
from lora2_pack.lora2_core.data.cropping import crop
from lora2_pack.lora2_core.data.folder import load_folder
from lora2_pack.lora2_core.data.photos import DatasetError, Photo, check_photos
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.tests.core.tries import TRIES, in_memory, in_time
from PIL import Image, features

torch.set_num_threads(1)


def picture(size: tuple[int, int] = (22, 18), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def empty_png(side: int, *beside: bytes, height: int = 0, bits: int = 1, kind: int = 0) -> bytes:
    """``side`` × ``side`` px in very few bytes; ``kind`` 0: one number of ``bits``, 4: two."""
    packer, height = zlib.compressobj(9), height or side
    row = bytes(1 + (side * bits * (2 if kind == 4 else 1) + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height))
    head = struct.pack(">IIBBBBB", side, height, bits, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", head), *beside, chunk(b"IDAT", rows + packer.flush()))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def many_scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    whole = saved(picture((side, side)).convert("L"), "JPEG", progressive=True, quality=30)
    start = whole.rfind(b"\xff\xda")
    (length,) = struct.unpack(">H", whole[start + 2 : start + 4])
    scan = whole[start : start + 2 + length] + b"\0\0"
    return whole[:-2] + scan * count + whole[-2:]


def notes(entries: int, size: int) -> bytes:
    """EXIF whose every entry says that it is all of it."""
    rows = b"".join(struct.pack("<HHLL", 50_000 + n, 1, size, 8) for n in range(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", entries) + rows + bytes(size)


def jpeg_with(*parts: bytes) -> bytes:
    whole = saved(picture(), "JPEG")
    return whole[:2] + b"".join(parts) + whole[2:]


def app(number: int, data: bytes) -> bytes:
    return b"\xff" + bytes([0xE0 + number]) + struct.pack(">H", len(data) + 2) + data


def packed_bmp() -> bytes:
    data = bytearray(saved(picture().convert("L"), "BMP"))
    data[30] = 1
    return bytes(data)


BOMBS = {
    "pixels of one bit": (lambda: empty_png(13_000), "has 13000×13000 px .169.0 MP.; at most 80"),
    "grey and clear": (lambda: empty_png(7200, bits=8, kind=4), "51.8 MP.; at most 50 MP"),
    "a clear colour": (lambda: empty_png(7200, chunk(b"tRNS", b"\0\7"), bits=8), "at most 50 MP"),
    "a line": (lambda: empty_png(70_000_000, height=1), "no side may be over 65535 px"),
    "scans": (lambda: many_scans(21_426, 256), r"has 214\d\d scans, which would take too long"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no PNG, JPEG"),
    "another kind": (lambda: saved(picture(), "PPM"), "no PNG, JPEG, WebP, BMP, GIF, TIFF"),
    "a claim of WebP": (
        lambda: b"RIFF\x64\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff\x3f\0" * 2 + bytes(80),
        "has 16384×16384 px",
    ),
    "a claim of JPEG": (
        lambda: saved(picture(), "JPEG").replace(b"\0\x12\0\x16", b"\xff\xff\xff\xff", 1),
        "has 65535×65535 px",
    ),
    "packed rows": (packed_bmp, "a BMP with packed rows"),
    "notes of a camera": (
        lambda: jpeg_with(app(1, notes(3000, 20_000)), app(1, b"Exif" + bytes(60_000))),
        "holds too much beside its pixels",
    ),
    "many notes": (lambda: jpeg_with(app(9, bytes(65_000)) * 400), "holds too much beside"),
    "filling": (lambda: jpeg_with(b"\xff" * 2_000_000), "cut into too many parts"),
    "no filling": (lambda: jpeg_with(b"\xff\xf0" * 500_000), "cut into too many parts"),
    "parts": (lambda: empty_png(9, chunk(b"tIME", b"") * 100_001), "cut into too many parts"),
    "profiles": (lambda: empty_png(9, chunk(b"iCCP", bytes(21_000_000))), "holds too much beside"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_before_they_are_decoded(kind: str, tmp_path: Path) -> None:
    make, why = BOMBS[kind]
    (tmp_path / "a.png").write_bytes(make())
    refused = pytest.raises(DatasetError, match=rf"^a\.png .*{why}")
    with in_memory(100), in_time(), refused as caught:
        load_folder(tmp_path).lists()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_name_is_shown_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\n\u202eb\x1b[2J.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"^a\?\?b\?\[2J\.png is ") as caught:
        load_folder(tmp_path).lists()
    assert str(caught.value).isprintable()


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(saved(picture(), "PNG"))
    (tmp_path / "album.png").mkdir()
    assert len(load_folder(tmp_path).lists()[0]) == 1
    os.mkfifo(tmp_path / "b.txt")
    assert load_folder(tmp_path).lists()[1] == [""]
    os.mkfifo(tmp_path / "a.png")
    with in_time(), pytest.raises(DatasetError, match=r"^a\.png is no file .*; remove it"):
        load_folder(tmp_path).lists()


def test_a_caption_of_many_megabytes_is_none(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(saved(picture(), "PNG"))
    (tmp_path / "b.txt").write_text("x" * 100_001)
    with pytest.raises(DatasetError, match=r"^b\.txt has more than 100,000 bytes"):
        load_folder(tmp_path).lists()


@pytest.mark.parametrize("data", [many_scans(21_426, 256), b"", saved(picture(), "BMP")])
def test_a_bomb_in_a_file_is_no_thumbnail(data: bytes) -> None:
    with in_time():
        uri = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
        assert inspector.decoded(uri) is None


def test_a_thumbnail_is_decoded_once_and_kept_small(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.new("RGB", (3000, 1500), "red"), "JPEG")
    uri = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    found = inspector.decoded(uri)
    assert found is not None and (found.width, found.height) == (3000, 1500)
    assert found.picture.width * found.picture.height <= 512 * 512
    monkeypatch.setattr(inspector, "open_picture", None)
    assert inspector.decoded(uri) is found


# --- what is large, and no bomb ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_photo_beyond_what_is_trained_comes_out_smaller(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = picture((40, 30)).resize((1600, 1200), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.png", kind)
    ((whole,), _, _) = load_folder(tmp_path).lists()
    monkeypatch.setattr(pictures, "KEPT_PIXELS", 160_000)
    monkeypatch.setattr(folder, "decode", lambda opened: pictures.decode(opened, 160_000))
    ((image,), _, (mask,)) = load_folder(tmp_path).lists()
    assert image.shape == (1, 346, 461, 3) and mask.shape == (1, 346, 461)
    wanted, found = (crop(Photo(one[0], ""), 128).pixels for one in (whole, image))
    assert float((wanted - found).abs().mean()) < 0.01


def test_the_photo_of_a_phone_is_decoded_at_half_its_sides(tmp_path: Path) -> None:
    """200 megapixels, which Pillow's own limit refuses."""
    Image.new("L", (16_320, 12_240), 128).save(tmp_path / "a.jpg", quality=50)
    with in_memory():
        ((image,), _, _) = load_folder(tmp_path).lists()
    assert image.shape == (1, 4898, 6531, 3)
    assert float(image.mean()) == pytest.approx(128 / 255, abs=0.01)


def test_grey_of_16_bits_takes_no_more_than_it_has_to(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(empty_png(8900, bits=16))
    with in_memory():
        ((image,), _, _) = load_folder(tmp_path).lists()
    assert image.shape == (1, 5656, 5656, 3)


def test_a_long_strip_is_cut_before_it_is_enlarged() -> None:
    """Enlarged whole it would take 1.6 GB."""
    strip = torch.rand(64, 6000, 3)
    (photo,) = check_photos([strip[None]], None, "x", [torch.rand(1, 64, 6000)])
    with in_memory(300):
        found = crop(photo, 2048)
    assert found.pixels.shape == (2048, 2048, 3) and found.mask is not None


def test_photos_are_checked_and_cut_without_copies_of_them() -> None:
    crop(check_photos([torch.rand(1, 80, 80, 3)], None, "x")[0], 64)  # what is loaded on first use
    batch, mask = torch.rand(1, 4000, 3000, 3), torch.ones(1, 4000, 3000)  # 144 and 48 MB
    with in_memory(100):
        (photo,) = check_photos([batch], None, "x", [mask])
    with in_memory(200):  # one colour after the other, each 48 MB
        crop(photo, 64)
    assert photo.pixels.data_ptr() == batch.data_ptr() and photo.mask is None


@settings(deadline=None, max_examples=60)
@given(
    original=st.tuples(st.integers(8, 60), st.integers(8, 60)),
    size=st.integers(8, 90),
    mode=st.sampled_from(("RGB", "F")),
)
def test_a_part_resized_is_the_part_of_the_resized(
    original: tuple[int, int], size: int, mode: str
) -> None:
    # Away from black and white: Pillow chooses which side goes first, and cuts off what overshoots.
    image = picture(original).point(lambda value: 80 + value // 3).convert(mode)
    resized = photos_covering(original, size)
    left, top = ((resized[n] - size) // 2 for n in (0, 1))
    box = (left, top, left + size, top + size)
    for way in (Image.Resampling.LANCZOS, Image.Resampling.BILINEAR):
        whole = np.asarray(image.resize(resized, way).crop(box), np.float64)
        part = np.asarray(photos.resized_part(image, resized, box, way), np.float64)
        assert np.abs(whole - part).max() <= 2


def photos_covering(original: tuple[int, int], size: int) -> tuple[int, int]:
    scale = max(size / original[0], size / original[1])
    return max(size, round(original[0] * scale)), max(size, round(original[1] * scale))


# --- at random --------------------------------------------------------------------------------


def _sound() -> list[bytes]:
    """A picture of every kind and mode."""
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = picture().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    grey = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 150)
    more = [picture(seed=1)]
    return [
        saved(picture(), "PNG", exif=exif), saved(clear, "PNG"), saved(grey, "PNG"),
        saved(picture().convert("P"), "PNG", transparency=3), saved(picture().convert("1"), "PNG"),
        saved(clear.convert("LA"), "PNG"),
        saved(picture(), "PNG", save_all=True, append_images=more),
        saved(picture(), "JPEG", exif=exif), saved(picture(), "JPEG", progressive=True),
        saved(picture().convert("CMYK"), "JPEG"), saved(picture().convert("L"), "JPEG"),
        saved(picture(), "WEBP"), saved(clear, "WEBP", lossless=True, exif=exif),
        saved(picture(), "WEBP", save_all=True, append_images=more),
        saved(picture(), "BMP"), saved(picture().convert("P"), "BMP"),
        saved(picture().convert("1"), "BMP"), saved(clear, "BMP"),
        saved(picture(), "GIF", save_all=True, append_images=more, comment=b"cat"),
        saved(clear.quantize(9), "GIF", transparency=3),
        saved(picture(), "TIFF", exif=exif), saved(grey, "TIFF", compression="tiff_lzw"),
        saved(picture().convert("CMYK"), "TIFF", compression="tiff_deflate"),
        saved(picture(), "TIFF", compression="jpeg", save_all=True, append_images=more),
        saved(clear, "TIFF", big_tiff=True), saved(picture().convert("1"), "TIFF"),
        *(saved(one, "AVIF", exif=exif) for one in (picture(), clear) if features.check("avif")),
    ]  # fmt: skip


def _spoilt(sound: list[bytes], chance: random.Random) -> bytes:
    data = bytearray(chance.choice(sound))
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.randrange(min(len(data), chance.choice((64, 300, len(data)))) or 1)
        match chance.randrange(7):
            case 0:
                data[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[place:]
            case 2:  # sizes and lengths
                data[place : place + 4] = chance.choice(
                    (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff")
                )
            case 3:
                other = chance.choice(sound)
                data[place:] = other[chance.randrange(len(other)) :]
            case 4:
                data[place:place] = data[place : place + 100] * chance.choice((1, 9, 300))
            case 5:
                data[place:place] = b"\xff\xda\0\x08\1\1\0\0\x3f\0" * chance.choice((1, 30, 3000))
            case _:
                data[place : place + 12] = struct.pack(">I", 9) + chance.choice(
                    (
                        b"IDAT",
                        b"IHDR",
                        b"tRNS",
                        b"eXIf",
                        b"iCCP",
                        b"acTL",
                        b"fcTL",
                        b"VP8 ",
                        b"iloc",
                        b"meta",
                    )
                )
        data = data or bytearray(b"\0")
    return bytes(data)


def test_pictures_spoilt_at_random(tmp_path: Path) -> None:
    """A photo or a sentence, and the file stays as it was."""
    sound, chance = _sound(), random.Random(11)
    path, ends = tmp_path / "x.png", Counter[bool]()
    for data in sound:
        path.write_bytes(data)
        assert load_folder(tmp_path).lists()[0][0].shape[-1] == 3
    with in_memory():
        for number in range(TRIES):
            data = _spoilt(sound, chance)
            path.write_bytes(data)
            with in_time(number):
                try:
                    (image,), _, (mask,) = load_folder(tmp_path).lists()
                except DatasetError as error:
                    said = str(error)
                    assert said.startswith("x.png ") and "\n" not in said and len(said) < 500
                    ends[False] += 1
                else:
                    assert image.isfinite().all() and mask.shape == image.shape[:3]
                    ends[True] += 1
            assert path.read_bytes() == data
    assert [one.name for one in tmp_path.iterdir()] == ["x.png"]
    assert min(ends[True], ends[False]) > TRIES // 20
