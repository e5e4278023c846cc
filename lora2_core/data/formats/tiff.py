"""What a TIFF claims of itself, read before Pillow does: it keeps all that a file has noted.

Every entry of a directory may claim the whole file, and a tile may be far larger than the picture.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from .limits import (
    CUT_UP,
    MOST_DECODED,
    MOST_NOTES,
    MOST_PARTS,
    MOST_PIXELS,
    NO_COLOURS,
    TOO_MUCH_BESIDE,
    PictureError,
    check_pixels,
)

MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two with 64-bit places
_WIDTH, _HEIGHT, _BITS, _SAMPLES, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 258, 277, 322, 323
_SAMPLE_FORMAT = 339
_INNER = {34665, 34853, 40965}  # directories that Pillow reads, too: EXIF, GPS and what they share
_SIZES = (1, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 1, 1, 8, 8, 8)  # bytes of a value, by its kind
_NUMBERS = {1: "B", 3: "H", 4: "L", 13: "L", 16: "Q", 18: "Q"}
_MOST_DIRECTORIES = 8


def check(file: BinaryIO) -> None:
    """Raises PictureError for pixels, tiles, notes or kinds of numbers that are not read."""
    reader = _Reader(file)
    notes, inner = 0, [reader.first()]
    found: dict[int, list[int]] = {}
    for level, place in enumerate(inner):
        if level >= _MOST_DIRECTORIES:
            raise PictureError(CUT_UP)
        for tag, size, numbers in reader.entries(place):
            notes += size
            if notes > MOST_NOTES:
                raise PictureError(TOO_MUCH_BESIDE)
            if not level:
                found[tag] = numbers
            if tag in _INNER and numbers:
                inner.append(numbers[0])
    _check_claims(found)


def goes_on(file: BinaryIO) -> bool:
    """Whether there is a second page."""
    reader = _Reader(file)
    return reader.next(reader.first()) != 0


def _check_claims(found: dict[int, list[int]]) -> None:
    def number(tag: int, otherwise: int) -> int:
        return (found.get(tag) or [otherwise])[0]

    width, height = number(_WIDTH, 0), number(_HEIGHT, 0)
    bits = max(found.get(_BITS) or [1])
    if bits > 16 or number(_SAMPLE_FORMAT, 1) not in (1, 4) or bits not in (1, 2, 4, 8, 16):
        raise PictureError(NO_COLOURS)
    samples = max(number(_SAMPLES, 1), len(found.get(_BITS) or [1]))
    most = min(MOST_PIXELS, 8 * MOST_DECODED // (bits * samples))
    check_pixels(width, height, most)
    check_pixels(number(_TILE_WIDTH, 0), number(_TILE_HEIGHT, 0), most)


class _Reader:
    """Walks the directories of a TIFF."""

    def __init__(self, file: BinaryIO):
        self._file = file
        file.seek(0)
        mark = file.read(4)
        self._order = "<" if mark[:2] == b"II" else ">"
        self._big = b"+" in mark

    def first(self) -> int:
        return self._number(8 if self._big else 4, "Q" if self._big else "L")

    def entries(self, place: int) -> Iterator[tuple[int, int, list[int]]]:
        """Of a directory, of each entry: its tag, the bytes of its values, and whole numbers."""
        count = self._count(place)
        length, form = (20, "HHQ8s") if self._big else (12, "HHL4s")
        self._file.seek(place + (8 if self._big else 2))
        rows = self._file.read(count * length)
        for at in range(0, len(rows) - length + 1, length):
            tag, kind, number, value = struct.unpack_from(self._order + form, rows, at)
            size = number * (_SIZES[kind] if kind < len(_SIZES) else 1)
            yield tag, size, self._values(kind, min(number, 64), size, value)

    def next(self, place: int) -> int:
        count = self._count(place)
        after = place + (8 + 20 * count if self._big else 2 + 12 * count)
        return self._number(after, "Q" if self._big else "L")

    def _count(self, place: int) -> int:
        count = self._number(place, "Q" if self._big else "H")
        if count > MOST_PARTS:
            raise PictureError(CUT_UP)
        return count

    def _values(self, kind: int, number: int, size: int, value: bytes) -> list[int]:
        form = _NUMBERS.get(kind)
        if form is None or not number:
            return []
        wanted = struct.calcsize("<" + form * number)
        if size > len(value):
            (place,) = struct.unpack(self._order + ("Q" if self._big else "L"), value)
            self._file.seek(place)
            value = self._file.read(wanted)
        if len(value) < wanted:
            return []
        return list(struct.unpack_from(self._order + form * number, value))

    def _number(self, place: int, form: str) -> int:
        self._file.seek(place)
        data = self._file.read(struct.calcsize("<" + form))
        if len(data) < struct.calcsize("<" + form):
            return 0
        return struct.unpack(self._order + form, data)[0]
