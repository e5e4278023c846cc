"""Pictures from strangers: what is decoded, and how much memory and time that may take.

A file's first bytes choose the decoder, among four. All that decides what it will take is read
before it starts: the pixels, the scans of a JPEG, and what a camera or a program noted beside them.
Source of the limits: ours; what the cameras of today write is well within them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from ..files.raw.regular import NotAFile, open_regular

MOST_PIXELS = 80_000_000  # of a picture that has to be decoded whole
MOST_CLEAR = 50_000_000  # px of one that may be transparent; two more copies are made of those
MOST_OF_WEBP = 40_000_000  # px; its decoder holds four copies
MOST_STREAMED = 250_000_000  # px of a JPEG with one scan, which can be decoded at half its sides
KEPT_PIXELS = 32_000_000  # above it a photo comes out smaller: nothing is trained at so many
MOST_BYTES = 300_000_000  # of a file
_FEW_SCANS = 20  # of a JPEG; programs write ten at most
_MOST_WORK = 100_000_000  # px × scans, where there are more of them
_MOST_PARTS = 100_000  # of a PNG or of what comes before the pixels of a JPEG
_MOST_NOTES = 20_000_000  # bytes beside the pixels: profiles, texts, previews
_MOST_EXIF = 70_000  # bytes; Pillow may copy all of them for each of their entries
_LONGEST_SIDE = 65_535  # px, as in a JPEG; Pillow cannot make a far longer one smaller
_CHUNK = 1 << 20  # bytes read at once
_STRIP = 256  # rows that are worked on at once
_DRAFTS = (8, 4, 2)  # a JPEG is decoded at 1/8, 1/4 or 1/2 of its sides at no cost
_SCAN = b"\xff\xda"
_BARE = {0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}  # marks of a JPEG that no length follows
_WITH_ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}
_MIXABLE = {"L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"}
_ORIENTATION = 0x0112  # in EXIF
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


class PictureError(ValueError):
    """A picture cannot be used; the message stands behind its name, and says why and what to do."""


@dataclass(frozen=True)
class _Format:
    """One of those that are read."""

    mark: bytes  # first bytes of a file
    open: Callable[[BinaryIO], Image.Image]  # reads the header alone
    check: Callable[[BinaryIO], None]  # before that
    most_pixels: int


def open_picture(source: Path | BinaryIO, most_pixels: int = MOST_STREAMED) -> Image.Image:
    """A PNG, JPEG, WebP or BMP picture whose header was read and checked; nothing is decoded.

    Close it when done. ``most_pixels``: a limit below those above. Raises PictureError for what is
    none of these, is larger than it may be, or would take too long.
    """
    file = _opened(source) if isinstance(source, Path) else source
    try:
        return _checked(file, most_pixels)
    except BaseException:
        file.close()
        raise


def decode(picture: Image.Image, most_pixels: int = KEPT_PIXELS) -> Image.Image:
    """The pixels of an opened picture, RGB, or RGBA where parts of it are transparent.

    Upright, whatever the camera noted, and of at most about ``most_pixels`` px. Never more than two
    copies of it are in memory. Raises PictureError for damaged data.
    """
    file = getattr(picture, "fp", None)
    try:
        _draft(picture, most_pixels)
        picture.load()
        turn = _TURNS.get(_orientation(picture.info))
        image = _smaller(_plain(picture), most_pixels)
        wanted = "RGBA" if image.mode in _WITH_ALPHA else "RGB"
        image = image if image.mode == wanted else image.convert(wanted)
        return image if turn is None else image.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        raise PictureError(f"is not a readable image ({_reason(error)}); remove it") from error
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


def _checked(file: BinaryIO, most_pixels: int) -> Image.Image:
    size = file.seek(0, 2)
    if size > MOST_BYTES:
        raise PictureError(
            f"has {size / 1e6:.0f} MB; at most {MOST_BYTES / 1e6:.0f} MB are read: make it smaller"
        )
    file.seek(0)
    start = file.read(32)
    kind = next((one for one in _FORMATS if start.startswith(one.mark)), None)
    if kind is None or (kind.mark == b"RIFF" and start[8:12] != b"WEBP"):
        raise PictureError(
            "is not a readable image (no PNG, JPEG, WebP or BMP); save it as PNG, or remove it"
        )
    try:
        kind.check(file)
        file.seek(0)
        picture = kind.open(file)
    except (PictureError, MemoryError):
        raise
    except Exception as error:  # anything, of damaged files
        raise PictureError(f"is not a readable image ({_reason(error)}); remove it") from error
    most = MOST_CLEAR if _may_be_clear(picture) else kind.most_pixels
    _check_pixels(*picture.size, min(most_pixels, most, kind.most_pixels))
    if kind.mark == _JPEG:
        _check_scans(file, picture)
    return picture


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise PictureError(
            f"has {width}×{height} px ({width * height / 1e6:.1f} MP); at most {most / 1e6:.0f} MP "
            "are read: make it smaller"
        )
    if max(width, height) > _LONGEST_SIDE:
        raise PictureError(f"has {width}×{height} px; no side may be over {_LONGEST_SIDE} px")


def _check_scans(file: BinaryIO, picture: Image.Image) -> None:
    """How often a JPEG goes over its pixels; with more than one scan it is decoded whole."""
    place = file.tell()  # where the first begins
    scans, last = 1, b""
    while data := file.read(_CHUNK):
        scans += (last + data).count(_SCAN)
        last = data[-1:]
    file.seek(place)
    if scans > 1 or picture.info.get("progressive"):
        _check_pixels(*picture.size, MOST_PIXELS)
    if scans > _FEW_SCANS and scans * picture.width * picture.height > _MOST_WORK:
        raise PictureError(f"has {scans} scans, which would take too long; save it anew")


def _check_jpeg(file: BinaryIO) -> None:
    """What comes before the first scan: Pillow goes through it byte by byte, and keeps it all."""
    place, exif = 2, 0
    for _ in range(_MOST_PARTS):
        file.seek(place)
        head = file.read(10)
        if len(head) < 4 or head[:2] == _SCAN:
            break
        if head[0] != 0xFF or head[1] in (0, 0xFF):  # filled up
            place += 1
            continue
        if head[1] in _BARE:
            place += 2
            continue
        length = int.from_bytes(head[2:4], "big")
        exif += length if head[1] == 0xE1 and head[4:8] == b"Exif" else 0
        place += 2 + length
    else:
        raise PictureError("is cut into too many parts; save it anew")
    if place > _MOST_NOTES or exif > _MOST_EXIF:
        raise PictureError("holds too much beside its pixels; save it anew without it")


def _check_png(file: BinaryIO) -> None:
    """Pillow goes through all parts of a file, one after the other, and keeps what it finds."""
    place, notes, size = 8, 0, file.seek(0, 2)
    for _ in range(_MOST_PARTS):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            break
        length = int.from_bytes(head[:4], "big")
        if head[4:] not in (b"IDAT", b"fdAT"):
            notes += min(length, size - place)  # a length may be damaged
        place += 12 + length
    else:
        raise PictureError("is cut into too many parts; save it anew")
    if notes > _MOST_NOTES:
        raise PictureError("holds too much beside its pixels; save it anew without it")


def _check_webp(file: BinaryIO) -> None:
    """Its decoder takes memory for every pixel as soon as it is opened."""
    file.seek(0)
    s = file.read(30).ljust(30, b"\0")
    number = int.from_bytes
    if s[12:16] == b"VP8X":
        size = number(s[24:27], "little") + 1, number(s[27:30], "little") + 1
    elif s[12:16] == b"VP8L":
        bits = number(s[21:25], "little")
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        size = number(s[26:28], "little") & 0x3FFF, number(s[28:30], "little") & 0x3FFF
    _check_pixels(*size, MOST_OF_WEBP)


def _check_bmp(file: BinaryIO) -> None:
    """Pillow unpacks runs of pixels in Python, a second for every megabyte."""
    file.seek(30)
    if int.from_bytes(file.read(4), "little") in (1, 2):  # a small header has its pixels there
        file.seek(14)
        if int.from_bytes(file.read(4), "little") >= 40:
            raise PictureError("is a BMP with packed rows; save it as PNG")


def _draft(picture: Image.Image, most_pixels: int) -> None:
    """Let a JPEG be decoded at a fraction of its sides that still has ``most_pixels``."""
    pixels = picture.width * picture.height
    part = next((n for n in _DRAFTS if pixels >= most_pixels * n * n), 1)
    if part > 1:
        picture.draft(None, (picture.width // part, picture.height // part))


def _plain(picture: Image.Image) -> Image.Image:
    """One that can be made smaller, in as few bytes as that takes."""
    if picture.mode.startswith("I"):
        return _eight_bit(picture)
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
    """16-bit grey scaled to 8 bits; Pillow's own conversion clips it to white."""
    image = Image.new("L", picture.size)
    for top in range(0, picture.height, _STRIP):
        box = (0, top, picture.width, min(top + _STRIP, picture.height))
        rows = np.asarray(picture.crop(box)).astype(np.uint32)
        image.paste(Image.fromarray(((rows * 255 + 32767) // 65535).astype(np.uint8)), box)
    return image


def _orientation(info: dict[str | tuple[int, int], object]) -> int:
    """How the camera was held, 1 to 8, as its notes tell; 1 where they do not.

    By code of ours: Pillow's reads every entry of the notes, each of which may claim all of them.
    """
    exif, xmp = info.get("exif"), info.get("xmp") or info.get("XML:com.adobe.xmp")
    if isinstance(exif, bytes) and (found := _in_exif(exif.removeprefix(b"Exif\0\0"))):
        return found
    if isinstance(xmp, str):
        xmp = xmp[:_MOST_EXIF].encode(errors="replace")
    told = _IN_XMP.search(xmp[:_MOST_EXIF]) if isinstance(xmp, bytes) else None
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
        tag, kind, _, value = struct.unpack_from(order + "HHLH", data, entry)
        if tag == _ORIENTATION and kind == 3:  # a 16-bit number
            return value
    return 0


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG = b"\xff\xd8\xff"
_FORMATS = (
    _Format(_JPEG, JpegImagePlugin.JpegImageFile, _check_jpeg, MOST_STREAMED),
    _Format(b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile, _check_png, MOST_PIXELS),
    _Format(b"RIFF", WebPImagePlugin.WebPImageFile, _check_webp, MOST_OF_WEBP),
    _Format(b"BM", BmpImagePlugin.BmpImageFile, _check_bmp, MOST_PIXELS),
)
