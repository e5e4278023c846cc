"""Pictures as few programs write them, built byte by byte: what comes out is what was put in."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from lora2_pack.lora2_core.data.folder import load_folder


def png(row: bytes, width: int, bits: int, kind: int, *beside: tuple[bytes, bytes]) -> bytes:
    """One row of pixels; ``kind`` 0 is grey, 2 RGB."""
    head = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
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
