"""TIFF, GIF, AVIF, HEIC and JPEG XL: what comes out, and what is refused before it is decoded."""

from __future__ import annotations

import base64
import io
import struct
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from lora2_pack.lora2_core.data.folder import FolderPhotos, load_folder
from lora2_pack.lora2_core.data.formats import boxes
from lora2_pack.lora2_core.data.formats.limits import PictureError
from lora2_pack.lora2_core.data.photos import DatasetError
from lora2_pack.lora2_core.data.pictures import decode
from lora2_pack.tests.core.tries import in_memory, in_time
from PIL import Image, ImageOps, features

AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
# Each 64 × 64 px of red, by the packages' own encoders.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAVZtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAA"
    "AAAAACJpbG9jAAAAAERAAAEAAQAAAAABegABAAAAAAAAAB0AAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAA"
    "AA5waXRtAAAAAAABAAAA1mlwcnAAAAC3aXBjbwAAAHhodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNw"
    "AAADAJAAAAMAAAMAHroCQGEAAQArQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqSSmubgIaDAgAAAMAyAAAAwAIQGIAAQAHRAHB"
    "crAiQAAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAABBwaXhpAAAAAAMICAgAAAAXaXBtYQAAAAAA"
    "AAABAAEEgQIDBAAAACVtZGF0AAAAGSgBrxOA5qhw0//+JpR//Trnh+nl0tJ5v3w="
)
JXL = base64.b64decode(
    "/wpPBgATiAIAMAG1nyAAABUqo4wbvJzr+fJDh8W0jesMbbVtYQljs70wSAiAC6gTL8Z41xxWTQD4xLEEEpyMVm5HzIAIBTAB"
    "6HgAhBJkXFTdwrO1lSQA"
)


def picture(size: tuple[int, int] = (80, 64)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def loaded(root: Path, name: str, data: bytes) -> FolderPhotos:
    (root / name).write_bytes(data)
    return load_folder(root)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def check_near(found: FolderPhotos, wanted: Image.Image, most: float = 0.002) -> None:
    (image,) = found.images
    assert image.shape == (1, wanted.height, wanted.width, 3)
    expected = np.asarray(wanted.convert("RGB"), np.float32) / 255
    assert float(np.abs(image[0].numpy() - expected).mean()) < most


def turned(way: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = way
    return exif


def upright(image: Image.Image, way: int) -> Image.Image:
    """As Pillow's own code turns it."""
    image = image.copy()
    image.getexif()[0x0112] = way
    return ImageOps.exif_transpose(image)


# --- TIFF -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [None, "tiff_lzw", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L", "P", "RGBA"])
def test_tiff_of_every_mode_is_read(mode: str, way: str | None, tmp_path: Path) -> None:
    image = picture().convert(mode)
    check_near(loaded(tmp_path, "a.tif", saved(image, "TIFF", compression=way)), image)


@pytest.mark.parametrize("way", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_is_turned_upright_once(way: int, compression: str | None, tmp_path: Path) -> None:
    data = saved(picture(), "TIFF", exif=turned(way), compression=compression)
    check_near(loaded(tmp_path, "a.tif", data), upright(picture(), way))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("way", [None, "tiff_lzw"])
def test_grey_tiff_of_16_bits_keeps_its_brightness(order: str, way: str | None, tmp_path: Path):
    grey = picture().convert("L")
    image = Image.fromarray((np.asarray(grey).astype(np.uint16) * 257).astype(order))
    check_near(loaded(tmp_path, "a.tiff", saved(image, "TIFF", compression=way)), grey)


def tiff(*entries: tuple[int, int, int, bytes], after: bytes = b"", big: bool = False) -> bytes:
    """A TIFF of one directory: (tag, kind, count, four or eight bytes) each."""
    if big:
        rows = b"".join(struct.pack("<HHQ8s", *entry) for entry in entries)
        head = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, len(entries))
        return head + rows + bytes(8) + after
    rows = b"".join(struct.pack("<HHL4s", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + rows + bytes(4) + after


def number(tag: int, value: int) -> tuple[int, int, int, bytes]:
    return tag, 4, 1, struct.pack("<L", value)


def plain_tiff(width: int, height: int, *more: tuple[int, int, int, bytes], **options) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height}
    entries = [number(*tag) for tag in {**tags, 279: width * height % 2**32}.items()]
    replaced = {entry[0] for entry in more}
    rows = sorted([*(e for e in entries if e[0] not in replaced), *more])
    return tiff(*rows, after=bytes(100_000), **options)


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_written_by_hand_is_read(big: bool, tmp_path: Path) -> None:
    found = loaded(tmp_path, "a.tif", plain_tiff(70, 66, big=big))
    assert found.images[0].shape == (1, 66, 70, 3)


BIG = struct.pack("<L", 60_000)
BOMBS = {
    "pixels": (lambda: plain_tiff(10_000, 9000), r"has 10000×9000 px \(90\.0 MP\); at most 80 MP"),
    "a long side": (lambda: plain_tiff(70_000, 9), "no side may be over 65535 px"),
    "tiles": (
        lambda: plain_tiff(70, 70, number(322, 65_520), number(323, 65_520)),
        "has 65520×65520 px",
    ),
    "samples": (
        lambda: plain_tiff(8000, 8000, number(277, 8)),
        "at most 38 MP",
    ),
    "an entry": (lambda: plain_tiff(70, 70, (37724, 7, 2**31, BIG)), "holds too much beside"),
    "many entries": (
        lambda: plain_tiff(70, 70, *((50_000 + n, 1, 90_000, BIG) for n in range(300))),
        "holds too much beside",
    ),
    "many entries of EXIF": (
        lambda: (
            plain_tiff(70, 70, number(34665, 200))[:200]
            + struct.pack("<H", 400)
            + b"".join(struct.pack("<HHL4s", 50_000 + n, 1, 90_000, BIG) for n in range(400))
        ),
        "holds too much beside",
    ),
    "a circle": (
        lambda: tiff(number(256, 70), number(257, 70), number(34665, 8)),
        "cut into too many parts",
    ),
    "fractions": (lambda: plain_tiff(70, 70, number(258, 32), number(339, 3)), "no colours"),
    "signs": (lambda: plain_tiff(70, 70, number(339, 2)), "no colours"),
    "nothing": (lambda: b"II*\0\x08\0\0\0", "is not a readable image"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_tiff_is_refused_before_it_is_decoded(kind: str, tmp_path: Path) -> None:
    make, why = BOMBS[kind]
    data = make()
    with in_memory(100), in_time(), pytest.raises(DatasetError, match=rf"^a\.tif .*{why}"):
        loaded(tmp_path, "a.tif", data)


# --- GIF, and what has more than one picture ---------------------------------------------------


def frames(kind: str, **options: object) -> bytes:
    other = Image.new("RGB", (80, 64), "red")
    return saved(picture(), kind, save_all=True, append_images=[other], **options)


@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [
        ("a.gif", "GIF", 0.05), ("a.webp", "WEBP", 0.05), ("a.png", "PNG", 0.002),
        ("a.tif", "TIFF", 0.002), pytest.param("a.avif", "AVIF", 0.03, marks=AVIF),
    ],
)  # fmt: skip
def test_the_first_picture_is_read_and_that_is_said(name, kind, most, tmp_path: Path) -> None:
    found = loaded(tmp_path, name, frames(kind))
    check_near(found, picture(), most)
    assert found.notes == [f"Of {name} the first picture alone is read."]
    assert loaded(tmp_path, name, saved(picture(), kind)).notes == []


def test_a_gif_with_notes_is_read(tmp_path: Path) -> None:
    data = frames("GIF", comment=b"cat " * 200, duration=90, loop=0)
    found = loaded(tmp_path, "a.gif", data)
    check_near(found, picture(), 0.05)
    assert len(found.notes) == 1


def test_a_clear_colour_of_a_gif_is_a_mask(tmp_path: Path) -> None:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 32, 64))
    found = loaded(tmp_path, "a.gif", saved(image, "GIF", transparency=0))
    assert float(found.masks[0].mean()) == 0.5
    assert found.images[0][0, 0, 0].tolist() == [1, 1, 1]
    assert found.images[0][0, 0, 63].tolist() == [0, 0, 1]


def gif(screen: tuple[int, int], frame: tuple[int, int, int, int], before: bytes = b"") -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0, 0, 0)
    return head + before + b"," + struct.pack("<HHHHB", *frame, 0) + b"\2\2\x44\1\0;"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (gif((9000, 9000), (0, 0, 9, 9)), r"has 9000×9000 px \(81\.0 MP\); at most 50 MP"),
        (gif((9, 9), (1, 1, 60_000, 60_000)), "has 60001×60001 px"),
        (gif((9, 9), (0, 0, 9, 9), b"!\xfe" + b"\xff" * 25_600_000 + b"\0"), "too much beside"),
        (gif((9, 9), (0, 0, 9, 9), b"!\xfe\0" * 100_001), "cut into too many parts"),
        (b"GIF89a", "is not a readable image"),
        (b"GIF89a" + bytes(9), "is not a readable image"),
    ],
)  # fmt: skip
def test_a_gif_is_refused_before_it_is_decoded(data: bytes, why: str, tmp_path: Path) -> None:
    with in_memory(150), in_time(), pytest.raises(DatasetError, match=rf"^a\.gif .*{why}"):
        loaded(tmp_path, "a.gif", data)


# --- AVIF -------------------------------------------------------------------------------------


@AVIF
@pytest.mark.parametrize("way", range(1, 9))
def test_avif_is_turned_upright_once(way: int, tmp_path: Path) -> None:
    data = saved(picture(), "AVIF", exif=turned(way), quality=95)
    check_near(loaded(tmp_path, "a.avif", data), upright(picture(), way), 0.02)


@AVIF
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_avif_is_known_by_its_first_bytes(mode: str, tmp_path: Path) -> None:
    image = picture().convert(mode)
    check_near(loaded(tmp_path, "a.jpg", saved(image, "AVIF", quality=95)), image, 0.02)


@AVIF
@pytest.mark.parametrize(("size", "read"), [(60_000, True), (71_000, False)])
def test_notes_of_a_camera_in_avif_have_a_limit(size: int, read: bool, tmp_path: Path) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + bytes(size)
    data = saved(picture(), "AVIF", exif=exif)
    if read:
        check_near(loaded(tmp_path, "a.avif", data), picture(), 0.03)
    else:
        with pytest.raises(DatasetError, match=r"^a\.avif holds too much beside its pixels"):
            loaded(tmp_path, "a.avif", data)


@AVIF
def test_a_large_avif_is_refused_by_its_megapixels(tmp_path: Path) -> None:
    data = bytearray(saved(picture(), "AVIF"))
    place = data.index(b"ispe") + 8  # what it says of its size
    data[place : place + 8] = struct.pack(">LL", 9000, 8000)
    with (
        in_memory(100),
        pytest.raises(DatasetError, match=r"a\.avif has 9000×8000 px \(72\.0 MP\)"),
    ):
        loaded(tmp_path, "a.avif", bytes(data))


# --- kinds that need a package ----------------------------------------------------------------

LACKING = {
    "HEIC": (HEIC, "pillow_heif", "install the package pillow-heif"),
    "JPEG XL": (JXL, "pillow_jxl", "install the package pillow-jxl-plugin"),
}


@pytest.mark.parametrize("kind", LACKING)
@pytest.mark.parametrize("name", ["b.heic", "b.jxl", "b.JPG"])
def test_without_its_package_a_picture_is_left_out(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, module, get = LACKING[kind]
    for one in [module, *(m for m in sys.modules if m.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, one, None)  # as where it is not installed
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.txt").write_bytes(b"\xff")  # nobody's caption is read
    found = loaded(tmp_path, name, data)
    assert (len(found.images), found.notes) == (1, [f"Left out: {name} ({kind}: {get})."])
    (tmp_path / "a.png").unlink()
    with pytest.raises(
        DatasetError, match=rf"holds no image; .*Left out: {name} \({kind}: {get}\)"
    ):
        load_folder(tmp_path)


@AVIF
def test_without_avif_a_picture_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(picture(), "AVIF")
    for module in ("PIL.AvifImagePlugin", "pillow_avif", "pillow_avif.AvifImagePlugin"):
        monkeypatch.setitem(sys.modules, module, None)
    picture().save(tmp_path / "a.png")
    (note,) = loaded(tmp_path, "b.avif", data).notes
    assert note == (
        "Left out: b.avif (AVIF: update Pillow to 11.3, or install the package pillow-avif-plugin)."
    )


@pytest.mark.parametrize("kind", LACKING)
def test_with_its_package_a_picture_is_read(kind: str, tmp_path: Path) -> None:
    data, module, _ = LACKING[kind]
    pytest.importorskip(module)
    check_near(loaded(tmp_path, "a.png", data), Image.new("RGB", (64, 64), "red"), 0.03)


# What libjxl writes for pictures of these sizes.
SIZES_OF_JXL = {
    (8, 8): "ff0a4140", (256, 256): "ff0a7f40", (80, 64): "ff0a8f41", (1, 1): "ff0a00101014",
    (640, 480): "ff0af83e1014", (1920, 1080): "ff0aba2105417123", (300, 200): "ff0a314150dc",
    (123, 457): "ff0a400ef480a0b8", (9000, 100): "ff0a18034f460041",
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES_OF_JXL)
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(size: tuple[int, int]) -> None:
    data = bytes.fromhex(SIZES_OF_JXL[size])[2:].ljust(16, b"\0")
    assert boxes.size_of_jxl(int.from_bytes(data, "little")) == size


@pytest.mark.parametrize("boxed", [False, True])
def test_a_large_jpeg_xl_is_refused_before_it_is_opened(boxed: bool) -> None:
    data = bytes.fromhex("ff0a7abb03417123") + bytes(9)  # 8000 × 6000 px
    if boxed:
        start = bytes.fromhex("0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20")
        data = start + struct.pack(">L4s", 8 + len(data), b"jxlc") + data
    with pytest.raises(
        PictureError, match=r"has 8000×6000 px \(48\.0 MP\); at most 40 MP are read"
    ):
        boxes.check_jxl(io.BytesIO(data))


def test_fractions_are_no_colours() -> None:
    with pytest.raises(PictureError, match="holds numbers that are no colours"):
        decode(Image.new("F", (9, 9), 0.5))


def test_boxes_that_lead_nowhere_end(tmp_path: Path) -> None:
    start = bytes.fromhex("0000000c4a584c200d0a870a")
    for more in (b"", b"\0\0\0\0jxlc", b"\0\0\0\1free" + bytes(8), b"\0\0\0\7jxlc", b"\xff" * 40):
        with in_time(), suppress(PictureError):
            boxes.check_jxl(io.BytesIO(start + more + b"\0" * 9))
