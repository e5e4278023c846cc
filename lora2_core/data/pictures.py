"""Pictures from strangers: what is decoded, and how much memory and time that may take.

A file's first bytes choose the decoder, among those of :mod:`.formats.kinds`, where all that
decides what it will take is looked at before. Here are the scans of a JPEG, and what comes out.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..files.header import first_line
from ..files.raw.regular import NotAFile, open_regular
from .formats.kinds import READ, SCAN, format_of
from .formats.limits import (
    MOST_BYTES,
    MOST_CLEAR,
    MOST_EXIF,
    MOST_PIXELS,
    MOST_STREAMED,
    NO_COLOURS,
    PictureError,
    check_pixels,
)

KEPT_PIXELS = 32_000_000  # above it a photo comes out smaller: nothing is trained at so many
_FEW_SCANS = 20  # of a JPEG; programs write ten at most
_MOST_WORK = 100_000_000  # px × scans, where there are more of them
_CHUNK = 1 << 20  # bytes read at once
_STRIP = 256  # rows that are worked on at once
_DRAFTS = (8, 4, 2)  # a JPEG is decoded at 1/8, 1/4 or 1/2 of its sides at no cost
_WITH_ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}
_MULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # colours times alpha; Pillow turns them into no else
_MIXABLE = {"L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"}
_ORIENTATION = 0x0112  # in EXIF
_NUMBERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 11: "f", 13: "L"}  # by their kinds in EXIF
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def open_picture(
    source: Path | BinaryIO,
    most_pixels: int = MOST_STREAMED,
    kinds: Collection[str] | None = None,
) -> Image.Image:
    """A picture whose header was read and checked; nothing is decoded (but for JPEG XL).

    Close it when done. ``most_pixels``: a limit below those of its kind. ``kinds``: names of the
    formats that may be read; None for all. Raises PictureError for what is none of these, is larger
    than it may be, or would take too long, and NoDecoderError where Pillow lacks a plug-in.
    """
    file = _opened(source) if isinstance(source, Path) else source
    try:
        return _checked(file, most_pixels, kinds)
    except BaseException:
        file.close()
        raise


def decode(picture: Image.Image, most_pixels: int = KEPT_PIXELS) -> Image.Image:
    """The pixels of an opened picture, RGB, or RGBA where parts of it are transparent.

    Upright, whatever the camera noted, and of at most about ``most_pixels`` px. Never more than two
    copies of it are in memory. Raises PictureError for damaged data, and for pixels that are
    fractions.
    """
    file = getattr(picture, "fp", None)
    try:
        _draft(picture, most_pixels)
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        image = _smaller(_plain(picture), most_pixels)
        wanted = "RGBA" if image.mode in _WITH_ALPHA else "RGB"
        image = image if image.mode == wanted else image.convert(wanted)
        return image if turn is None else image.transpose(turn)
    except (PictureError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        raise PictureError(
            f"is not a readable image ({_reason(error)}); save it as PNG, or remove it"
        ) from error
    finally:
        if file is not None:
            file.close()


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except NotAFile:
        raise PictureError("is no file (a folder, a pipe, or gone); remove it") from None
    except OSError as error:
        raise PictureError(
            f"cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def _checked(file: BinaryIO, most_pixels: int, kinds: Collection[str] | None = None) -> Image.Image:
    size = file.seek(0, 2)
    if size > MOST_BYTES:
        raise PictureError(
            f"has {size / 1e6:.0f} MB; at most {MOST_BYTES / 1e6:.0f} MB are read: make it smaller"
        )
    file.seek(0)
    kind = format_of(file.read(32))
    if kind is None or not (kinds is None or kind.name in kinds):
        raise PictureError(f"is not a readable image (no {READ}); save it as PNG, or remove it")
    try:
        kind.check(file)
        file.seek(0)
        picture = kind.open(file)
    except (PictureError, MemoryError):
        raise
    except Exception as error:  # anything, of damaged files
        raise PictureError(
            f"is not a readable image ({_reason(error)}); save it as PNG, or remove it"
        ) from error
    most = MOST_CLEAR if _may_be_clear(picture) else kind.most_pixels
    check_pixels(*picture.size, min(most_pixels, most, kind.most_pixels))
    if kind.name == "JPEG":
        _check_scans(file, picture)
    return picture


def kind_of(path: Path) -> str | None:
    """The kind of picture that a file is by its first bytes; None for all else."""
    try:
        with open_regular(path) as file:
            kind = format_of(file.read(32))
    except OSError:
        return None
    return kind and kind.name


def goes_on(path: Path, picture: Image.Image) -> bool:
    """Whether the file of an opened picture holds further frames or pages."""
    try:
        with open_regular(path) as file:
            kind = format_of(file.read(32))
            return kind is not None and kind.goes_on(file, picture)
    except (OSError, PictureError):
        return False


def _check_scans(file: BinaryIO, picture: Image.Image) -> None:
    """How often a JPEG goes over its pixels; with more than one scan it is decoded whole."""
    place = file.tell()  # where the first begins
    scans, last = 1, b""
    while data := file.read(_CHUNK):
        scans += (last + data).count(SCAN)
        last = data[-1:]
    file.seek(place)
    if scans > 1 or picture.info.get("progressive"):
        check_pixels(*picture.size, MOST_PIXELS)
    if scans > _FEW_SCANS and scans * picture.width * picture.height > _MOST_WORK:
        raise PictureError(f"has {scans} scans, which would take too long; save it anew")


def _draft(picture: Image.Image, most_pixels: int) -> None:
    """Let a JPEG be decoded at a fraction of its sides that still has ``most_pixels``."""
    pixels = picture.width * picture.height if picture.format in ("JPEG", "MPO") else 0
    part = next((n for n in _DRAFTS if pixels >= most_pixels * n * n), 1)
    if part > 1:
        picture.draft(None, (picture.width // part, picture.height // part))


def _plain(picture: Image.Image) -> Image.Image:
    """One that can be made smaller, in as few bytes as that takes."""
    if picture.mode == "F":  # of JPEG XL, say: Pillow would take 1 for nearly black
        raise PictureError(NO_COLOURS)
    if picture.mode.startswith("I"):
        return _eight_bit(picture)
    if picture.mode in _MULTIPLIED:
        return picture.convert(_MULTIPLIED[picture.mode])
    if "transparency" in picture.info:
        return picture.convert("RGBA")
    if picture.mode in _MIXABLE:
        return picture
    return picture.convert("RGBA" if _may_be_clear(picture) else "RGB")


def _may_be_clear(picture: Image.Image) -> bool:
    return picture.mode in _WITH_ALPHA or "transparency" in picture.info


def _smaller(image: Image.Image, most_pixels: int) -> Image.Image:
    scale = (most_pixels / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion clips it to white, and keeps no part
    of it transparent."""
    clear = picture.info.get("transparency")  # the one value that is, of a PNG
    image = Image.new("L" if clear is None else "LA", picture.size)
    for top in range(0, picture.height, _STRIP):
        box = (0, top, picture.width, min(top + _STRIP, picture.height))
        rows = np.asarray(picture.crop(box)).astype(np.uint32)
        grey = ((rows * 255 + 32767) // 65535).astype(np.uint8)
        if clear is not None:
            grey = np.dstack([grey, np.where(rows == clear, 0, 255).astype(np.uint8)])
        image.paste(Image.fromarray(grey), box)
    return image


def _orientation(picture: Image.Image) -> int:
    """How the camera was held, 1 to 8, as the notes of a decoded picture tell; 1 where they do not,
    or where its decoder has turned it.

    By code of ours: Pillow's reads every entry of the notes, each of which may claim all of them.
    """
    if picture.format == "TIFF":  # newer Pillows turn it, and take the entry away
        return getattr(picture, "tag_v2", {}).get(_ORIENTATION, 1)
    if picture.format == "HEIF" or (picture.format == "JXL" and not getattr(picture, "jpeg", 0)):
        return 1  # a JPEG within a JPEG XL comes as it lies
    info: dict = picture.info
    exif = info.get("exif", _in_hex(info.get("Raw profile type exif")))
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp")
    if picture.format == "AVIF":  # its boxes decide, as Pillow writes them into its EXIF
        xmp = None
    if isinstance(exif, bytes) and (found := _in_exif(exif.removeprefix(b"Exif\0\0"))):
        return found
    if isinstance(xmp, str):
        xmp = xmp[:MOST_EXIF].encode(errors="replace")
    told = _IN_XMP.search(xmp[:MOST_EXIF]) if isinstance(xmp, bytes) else None
    return int(told[1]) if told else 1


def _in_exif(data: bytes) -> int:
    """The orientation in the first directory of a TIFF; 0 where it is not told."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return 0
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "L", data.ljust(8, b"\0"), 4)
    if start > len(data) - 2:
        return 0
    (count,) = struct.unpack_from(order + "H", data, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHL", data, entry)
        size = struct.calcsize("=" + _NUMBERS.get(kind, "Q"))
        if tag == _ORIENTATION and 0 < number * size <= 4:  # it stands there itself
            return struct.unpack_from(order + _NUMBERS[kind], data, entry + 8)[0]
    return 0


def _in_hex(text: object) -> bytes | None:
    """EXIF in a text of a PNG, as older ImageMagick writes it: a name, a length, and lines."""
    if not isinstance(text, str):
        return None
    digits = "".join(text[: 4 * MOST_EXIF].split("\n")[3:])[: 2 * MOST_EXIF]
    try:
        return bytes.fromhex(digits)
    except ValueError:
        return None


def _reason(error: BaseException) -> str:
    return first_line(error)[:200].rstrip(".")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
