"""Pictures as few programs write them, built byte by byte: what comes out is what was put in."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from lora2_pack.lora2_core.data.folder import load_folder
from lora2_pack.lora2_core.data.photos import DatasetError
from PIL import Image


def png(
    row: bytes, width: int, bits: int, kind: int, *beside: tuple[bytes, bytes], height: int = 1
) -> bytes:
    """Rows of pixels with a zero between two; ``kind`` 0 is grey, 2 RGB."""
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = ((b"IHDR", head), *beside, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def read(root: Path, name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of 0 to 255, and the mask."""
    (root / name).write_bytes(data)
    found = load_folder(root)
    return found.images[0][0].numpy() * 255, found.masks[0][0].numpy()


# --- PNG with one transparent colour ----------------------------------------------------------


@pytest.mark.parametrize("clear", range(4))
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_a_mask(bits: int, clear: int, tmp_path: Path) -> None:
    most = 2**bits - 1
    values = [0, most, most // 3, most // 2] * 2
    if bits == 16:
        row = struct.pack(">8H", *values)
    else:
        row = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(bits, "big")
    key = values[clear]
    data = png(row, 8, bits, 0, (b"tRNS", struct.pack(">H", key)))
    pixels, mask = read(tmp_path, "a.png", data)
    assert mask.tolist() == [[float(value != key) for value in values]]
    wanted = [255 if value == key else value * 255 / most for value in values]
    assert np.abs(pixels - np.array(wanted)[None, :, None]).max() < 0.51


def test_a_grey_beside_the_transparent_one_stays(tmp_path: Path) -> None:
    """16 bits are compared, not the 8 that are kept of them."""
    data = png(struct.pack(">3H", 5000, 5001, 4999), 3, 16, 0, (b"tRNS", struct.pack(">H", 5000)))
    assert read(tmp_path, "a.png", data)[1].tolist() == [[0, 1, 1]]


def test_a_transparent_colour_of_16_bits_is_a_mask(tmp_path: Path) -> None:
    colours = [0x1234, 0xFF00, 0x0102, 0x3412, 0x00FF, 0x0201]
    key = struct.pack(">3H", *colours[:3])
    data = png(struct.pack(">6H", *colours), 2, 16, 2, (b"tRNS", key))
    pixels, mask = read(tmp_path, "a.png", data)
    assert mask.tolist() == [[0, 1]]
    assert np.abs(pixels[0, 1] - np.array(colours[3:]) / 257).max() < 1


# --- the orientation --------------------------------------------------------------------------

# Two rows of shades: those of a picture as it is stored, and as it is shown for every orientation.
STORED = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
SHOWN = {
    1: STORED, 2: STORED[:, ::-1], 3: STORED[::-1, ::-1], 4: STORED[::-1], 5: STORED.T,
    6: STORED[::-1].T, 7: STORED[::-1, ::-1].T, 8: STORED[:, ::-1].T, 9: STORED, 2**16 + 6: STORED,
}  # fmt: skip
KINDS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L"}  # of whole numbers in EXIF
EXIF_OF = [(way, kind) for way in SHOWN for kind in KINDS if way < 2**7 or kind in (4, 9)]


def exif(order: str, kind: int, way: int, count: int = 1) -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + KINDS.get(kind, "L"), way).ljust(4, b"\0")
    row = struct.pack(order + "HHL", 0x0112, kind, count) + value
    return mark + struct.pack(order + "LH", 8, 1) + row + bytes(4)


def grey_png(*beside: tuple[bytes, bytes]) -> bytes:
    return png(b"\0".join(row.tobytes() for row in STORED), 3, 8, 0, *beside, height=2)


@pytest.mark.parametrize(("way", "kind"), EXIF_OF)
@pytest.mark.parametrize("order", "<>")
def test_every_whole_number_may_be_the_orientation(
    order: str, way: int, kind: int, tmp_path: Path
) -> None:
    pixels, _ = read(tmp_path, "a.png", grey_png((b"eXIf", exif(order, kind, way))))
    assert pixels[..., 0].round().tolist() == SHOWN[way].tolist()


@pytest.mark.parametrize(
    ("kind", "count", "told"),
    [(3, 2, True), (3, 0, False), (3, 3, False), (4, 2, False), (2, 1, False), (5, 1, False)],
)
def test_what_is_elsewhere_in_exif_is_no_orientation(
    kind: int, count: int, told: bool, tmp_path: Path
) -> None:
    pixels, _ = read(tmp_path, "a.png", grey_png((b"eXIf", exif("<", kind, 6, count))))
    assert pixels[..., 0].round().tolist() == SHOWN[6 if told else 1].tolist()


HEX = (b"Exif\0\0" + exif("<", 3, 6)).hex()


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt"])
@pytest.mark.parametrize(
    ("text", "way"),
    [
        (f"\nexif\n      32\n{HEX[:72]}\n{HEX[72:]}\n", 6),
        (f"\nexif\n      26\n{HEX[12:]}\n", 6),
        (f"\nexif\n      32\n{HEX}\n" + "00" * 100_000, 6),
        (f"\nexif\n      32\n{HEX[:41]}\n", 1),
        (f"\nexif\n      32\n{HEX[:40]}no\n", 1),
        ("", 1),
    ],
)
def test_exif_in_a_text_of_a_png_is_read(name: bytes, text: str, way: int, tmp_path: Path) -> None:
    data = text.encode()
    data = data if name == b"tEXt" else b"\0" + zlib.compress(data)
    content = grey_png((name, b"Raw profile type exif\0" + data))
    assert read(tmp_path, "a.png", content)[0][..., 0].round().tolist() == SHOWN[way].tolist()
    # The chunk of its own comes before it.
    both = grey_png((name, b"Raw profile type exif\0" + data), (b"eXIf", exif("<", 3, 2)))
    assert read(tmp_path, "a.png", both)[0][..., 0].round().tolist() == SHOWN[2].tolist()


# --- BMP without the header of a file ---------------------------------------------------------


def dib(size: int, packing: int = 0, bits: int = 24) -> bytes:
    """3 × 2 px of STORED in grey, the lowest row first; ``size`` of its header."""
    head = struct.pack("<LllHHLLllLL", size, 3, 2, 1, bits, packing, 0, 0, 0, 0, 0)
    rows = b"".join(np.repeat(row, 3).tobytes().ljust(12, b"\0") for row in STORED[::-1])
    return head.ljust(size, b"\0") + rows


@pytest.mark.parametrize("size", [40, 108, 124])
@pytest.mark.parametrize("name", ["a.dib", "a.bmp"])
def test_a_dib_is_read(name: str, size: int, tmp_path: Path) -> None:
    pixels, _ = read(tmp_path, name, dib(size))
    assert pixels.round().tolist() == np.repeat(STORED[..., None], 3, -1).tolist()


def test_a_dib_as_pillow_writes_it_is_read(tmp_path: Path) -> None:
    Image.fromarray(STORED).save(tmp_path / "a.dib")
    image = load_folder(tmp_path).images[0][0, ..., 0] * 255
    assert image.numpy().round().tolist() == STORED.tolist()


def test_a_dib_with_packed_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"^a\.dib is a BMP with packed rows; save it as PNG"):
        read(tmp_path, "a.dib", dib(40, packing=1, bits=8))


# --- TIFF -------------------------------------------------------------------------------------


def tiff(order: str, bits: int, samples: int, data: bytes, **tags: int) -> bytes:
    """8 × 8 px, a strip a plane. ``order``: < or >; ``tags``: t262=0 for another value of a tag."""
    planes = samples if tags.get("t284") == 2 else 1
    values: dict[int, list[int]] = {
        256: [8], 257: [8], 258: [bits] * samples, 259: [1], 262: [2 if samples > 2 else 1],
        273: [1000 + n * len(data) // planes for n in range(planes)], 277: [samples], 278: [8],
        279: [len(data) // planes] * planes,
    }  # fmt: skip
    values |= {int(tag[1:]): [value] for tag, value in tags.items()}
    rows, beside = b"", b""
    after = 8 + 2 + 12 * len(values) + 4
    for tag, numbers in sorted(values.items()):
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(packed) > 4:
            packed, beside = struct.pack(order + "L", after + len(beside)), beside + packed
        rows += struct.pack(order + "HHL", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(order + "LH", 8, len(values)) + rows + bytes(4) + beside
    return head.ljust(1000, b"\0") + data


NOISE = np.random.default_rng(0).integers(0, 256, (8, 8, 4)).astype(np.uint16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", "<>")
def test_colours_in_planes_are_read_or_refused(
    order: str, bits: int, packed: bool, tmp_path: Path
) -> None:
    planes = np.moveaxis(NOISE[..., :3] * (257 if bits == 16 else 1), -1, 0)
    parts = [plane.astype(f"{order}u{bits // 8}").tobytes() for plane in planes]
    if packed:
        parts = [zlib.compress(part) for part in parts]
        longest = max(map(len, parts))
        parts = [part.ljust(longest, b"\0") for part in parts]
    data = tiff(order, bits, 3, b"".join(parts), t284=2, **({"t259": 8} if packed else {}))
    if bits == 16 and not packed:
        with pytest.raises(DatasetError, match=r"^a\.tif has a plane of 16 bits .*save it as PNG"):
            read(tmp_path, "a.tif", data)
    else:
        pixels, _ = read(tmp_path, "a.tif", data)
        assert np.abs(pixels - NOISE[..., :3]).max() < 0.01


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", "<>")
def test_grey_in_which_0_is_white_is_turned_over_or_refused(
    order: str, bits: int, tmp_path: Path
) -> None:
    grey = NOISE[..., 0]
    stored = ((255 - grey) * (257 if bits == 16 else 1)).astype(f"{order}u{bits // 8}")
    data = tiff(order, bits, 1, stored.tobytes(), t262=0)
    if bits == 16:
        with pytest.raises(DatasetError, match=r"^a\.tif is grey .* 0 is white; save it as PNG"):
            read(tmp_path, "a.tif", data)
    else:
        pixels, _ = read(tmp_path, "a.tif", data)
        assert np.abs(pixels - grey[..., None]).max() < 0.01


def test_grey_times_alpha_is_read(tmp_path: Path) -> None:
    pair = np.stack([np.full((8, 8), 40), np.full((8, 8), 80)], -1).astype(np.uint8)
    pixels, mask = read(tmp_path, "a.tif", tiff("<", 8, 2, pair.tobytes(), t338=1))
    alpha = 80 / 255
    assert np.abs(mask - alpha).max() < 0.01
    assert np.abs(pixels - (40 + 255 * (1 - alpha))).max() < 1.5


def test_a_tiff_of_a_kind_that_pillow_lacks_is_told_the_way_out(tmp_path: Path) -> None:
    data = tiff("<", 16, 2, bytes(256), t338=2)
    with pytest.raises(DatasetError, match=r"^a\.tif is not a readable .*; save it as PNG, or "):
        read(tmp_path, "a.tif", data)
