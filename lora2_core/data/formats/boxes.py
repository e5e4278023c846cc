"""What AVIF, HEIC and JPEG XL say of themselves in their boxes, read before a decoder does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from .limits import (
    CUT_UP,
    MOST_EXIF,
    MOST_NOTES,
    MOST_OF_JXL,
    MOST_PARTS,
    TOO_MUCH_BESIDE,
    PictureError,
    check_pixels,
)

_AVIF = {b"avif", b"avis"}
_HEIF = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_MOST_BOXES = 10_000
_RATIOS = ((0, 0), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # of JPEG XL


def is_avif(start: bytes) -> bool:
    """By the first 32 bytes: its own brand, or among those that it is compatible with."""
    brands = {start[n : n + 4] for n in range(16, 32, 4)}
    return start[4:8] == b"ftyp" and (
        start[8:12] in _AVIF or (start[8:12] in (b"mif1", b"msf1") and bool(brands & _AVIF))
    )


def is_heif(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF and not is_avif(start)


def check_heif(file: BinaryIO) -> None:
    """Raises PictureError for notes of a camera that are larger than a camera writes.

    Pillow may copy all of them for each of their entries.
    """
    size = file.seek(0, 2)
    for kind, start, end in _boxes(file, 0, size):
        if kind == b"meta":
            if end - start > MOST_NOTES:
                raise PictureError(TOO_MUCH_BESIDE)
            file.seek(start + 4)  # version and flags
            if _exif_bytes(file.read(end - start - 4), size) > MOST_EXIF:
                raise PictureError(TOO_MUCH_BESIDE)


def check_jxl(file: BinaryIO) -> None:
    """Raises PictureError for too many pixels: its plug-in decodes as soon as it opens."""
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(2)
    place = 0
    if start != b"\xff\x0a":
        parts = (b"jxlc", b"jxlp")
        found = next((b for b in _boxes(file, 0, size) if b[0] in parts), None)
        if found is None:
            raise PictureError("is not a readable image (no picture in its boxes); remove it")
        place = found[1] + (4 if found[0] == b"jxlp" else 0)
    file.seek(place + 2)
    check_pixels(
        *size_of_jxl(int.from_bytes(file.read(16).ljust(16, b"\0"), "little")), MOST_OF_JXL
    )


def size_of_jxl(bits: int) -> tuple[int, int]:
    """Width and height by the SizeHeader of ISO/IEC 18181-1, the lowest bit first."""
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return bits >> place - count & (1 << count) - 1

    small = read(1)

    def side() -> int:
        return (read(5) + 1) * 8 if small else read((9, 13, 18, 30)[read(2)]) + 1

    height = side()
    ratio = read(3)
    over, under = _RATIOS[ratio]
    return (height * over // under if ratio else side()), height


def _boxes(file: BinaryIO, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, and where the content begins and ends, of each box in a part of a file."""
    for _ in range(_MOST_BOXES):
        file.seek(place)
        head = file.read(16)
        if place + 8 > end or len(head) < 8:
            return
        length, kind, start = int.from_bytes(head[:4], "big"), head[4:8], 8
        if length == 1:
            length, start = int.from_bytes(head[8:16], "big"), 16
        length = end - place if length == 0 else length  # up to the end
        if length < start:
            return
        yield kind, place + start, min(place + length, end)
        place += length
    raise PictureError(CUT_UP)


def _inside(data: bytes, place: int) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each box within a box."""
    for _ in range(_MOST_BOXES):
        length = int.from_bytes(data[place : place + 4], "big")
        if place + 8 > len(data) or length < 8:
            return
        yield data[place + 4 : place + 8], data[place + 8 : place + length]
        place += length
    raise PictureError(CUT_UP)


def _exif_bytes(meta: bytes, size: int) -> int:
    """Of all items that are EXIF; an item whose length is not told is as long as the file."""
    content = dict(_inside(meta, 0))
    listed, placed = content.get(b"iinf", b""), content.get(b"iloc", b"")
    items = set[int]()
    for kind, info in _inside(listed, 8 if listed[:1] not in (b"", b"\0") else 6):
        wide = 2 if info[:1] == b"\3" else 0  # bytes more of a number
        if kind == b"infe" and info[8 + wide : 12 + wide] == b"Exif":
            items.add(int.from_bytes(info[4 : 6 + wide], "big"))
    return sum(length or size for item, length in _extents(placed) if item in items)


def _extents(data: bytes) -> Iterator[tuple[int, int]]:
    """Number of an item and bytes of one piece of it, by the box of ISO/IEC 14496-12, 8.11.3."""
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int.from_bytes(data[place - count : place], "big")

    version = read(4) >> 24
    sizes = read(2)
    offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    index = index if version in (1, 2) else 0
    wide = 4 if version == 2 else 2
    for _ in range(min(read(wide), MOST_PARTS)):
        item = read(wide)
        read((2 if version in (1, 2) else 0) + 2 + base)
        for _ in range(read(2)):
            if place > len(data):
                return
            read(index + offset)
            yield item, read(length)
