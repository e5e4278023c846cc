"""The kinds of pictures that are read: how they are told, opened, and checked before that.

A file's first bytes choose the decoder. All that decides what it will take is read before it
starts: the pixels, and what a camera or a program noted beside them. Source of the limits: ours;
what the cameras of today write is well within them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from . import boxes, tiff
from .limits import (
    CUT_UP,
    MOST_EXIF,
    MOST_NOTES,
    MOST_OF_GIF,
    MOST_OF_HEIF,
    MOST_OF_JXL,
    MOST_OF_WEBP,
    MOST_PARTS,
    MOST_PIXELS,
    MOST_STREAMED,
    TOO_MUCH_BESIDE,
    PictureError,
    check_pixels,
)

JPEG = b"\xff\xd8\xff"
SCAN = b"\xff\xda"
READ = "PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF, HEIC or JPEG XL"
_BARE = {0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}  # marks of a JPEG that no length follows


class NoDecoderError(PictureError):
    """This Pillow has no decoder for a picture: ``kind`` of it, and how to ``get`` one."""

    def __init__(self, kind: str, get: str):
        super().__init__(f"is a picture in {kind}; {get}, or save it as PNG")
        self.kind, self.get = kind, get


@dataclass(frozen=True)
class Format:
    """One of the kinds that are read."""

    name: str
    starts: Callable[[bytes], bool]  # by the first 32 bytes
    open: Callable[[BinaryIO], Image.Image]  # reads the header alone, but for JPEG XL
    check: Callable[[BinaryIO], None]  # before that
    most_pixels: int
    # Whether a picture has more frames or pages than the first.
    goes_on: Callable[[BinaryIO, Image.Image], bool]

    def __post_init__(self) -> None:
        if self.most_pixels < 1:
            raise ValueError(f"most_pixels is {self.most_pixels}; use the limit of the format.")


def format_of(start: bytes) -> Format | None:
    """The kind of a picture by its first 32 bytes; None where it is none that is read."""
    return next((kind for kind in FORMATS if kind.starts(start)), None)


def check_jpeg(file: BinaryIO) -> None:
    """What comes before the first scan: Pillow goes through it byte by byte, and keeps it all."""
    place, exif = 2, 0
    for _ in range(MOST_PARTS):
        file.seek(place)
        head = file.read(10)
        if len(head) < 4 or head[:2] == SCAN:
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
        raise PictureError(CUT_UP)
    if place > MOST_NOTES or exif > MOST_EXIF:
        raise PictureError(TOO_MUCH_BESIDE)


def check_png(file: BinaryIO) -> None:
    """Pillow goes through all parts of a file, one after the other, and keeps what it finds."""
    place, notes, size = 8, 0, file.seek(0, 2)
    for _ in range(MOST_PARTS):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            break
        length = int.from_bytes(head[:4], "big")
        if head[4:] not in (b"IDAT", b"fdAT"):
            notes += min(length, size - place)  # a length may be damaged
        place += 12 + length
    else:
        raise PictureError(CUT_UP)
    if notes > MOST_NOTES:
        raise PictureError(TOO_MUCH_BESIDE)


def check_webp(file: BinaryIO) -> None:
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
    check_pixels(*size, MOST_OF_WEBP)


def check_bmp(file: BinaryIO) -> None:
    """Pillow unpacks runs of pixels in Python, a second for every megabyte."""
    file.seek(30)
    if int.from_bytes(file.read(4), "little") in (1, 2):  # a small header has its pixels there
        file.seek(14)
        if int.from_bytes(file.read(4), "little") >= 40:
            raise PictureError("is a BMP with packed rows; save it as PNG")


def check_gif(file: BinaryIO) -> None:
    """The screen and the first picture on it, which may be larger; Pillow makes room for both."""
    file.seek(6)
    screen = file.read(4)
    place = _first_of_gif(file)
    file.seek(place + 1)
    frame = file.read(8).ljust(8, b"\0")
    left, top, *side = (int.from_bytes(frame[n : n + 2], "little") for n in range(0, 8, 2))
    width, height = (int.from_bytes(screen[n : n + 2], "little") for n in (0, 2))
    check_pixels(max(width, left + side[0]), max(height, top + side[1]), MOST_OF_GIF)


def _first_of_gif(file: BinaryIO) -> int:
    """Where the first picture begins; past the end where there is none."""
    file.seek(10)
    flags = file.read(1)[0]
    place = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    for _ in range(MOST_PARTS):
        if place > MOST_NOTES:
            raise PictureError(TOO_MUCH_BESIDE)
        file.seek(place)
        kind = file.read(1)
        if kind in (b",", b"", b";"):
            return place
        place += 1
        if kind == b"!":
            file.seek(place + 1)
            place += 1
            while length := file.read(1):
                place += 1 + length[0]
                if not length[0] or place > MOST_NOTES:
                    break
                file.seek(place)
    raise PictureError(CUT_UP)


def _gif_goes_on(file: BinaryIO, _: Image.Image) -> bool:
    place = _first_of_gif(file)
    file.seek(place)
    data = file.read()
    flags = data[9] if len(data) > 9 else 0
    at = 11 + (3 << (flags & 7) + 1 if flags & 128 else 0)  # behind the size of its codes
    while at < len(data) and data[at]:
        at += 1 + data[at]
    at += 1
    while data[at : at + 1] == b"!":  # notes behind it, or those of the next picture
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return data[at : at + 1] == b","


def _counted(_: BinaryIO, picture: Image.Image) -> bool:
    return getattr(picture, "n_frames", 1) > 1


def _avif(file: BinaryIO) -> Image.Image:
    plugin: Any = None
    for name in ("PIL.AvifImagePlugin", "pillow_avif.AvifImagePlugin"):
        plugin = _imported(name)
        if plugin is not None and getattr(plugin, "SUPPORTED", True):
            return plugin.AvifImageFile(file)
    raise NoDecoderError("AVIF", "update Pillow to 11.3, or install the package pillow-avif-plugin")


def _heif(file: BinaryIO) -> Image.Image:
    plugin = _imported("pillow_heif.as_plugin")
    if plugin is None:
        raise NoDecoderError("HEIC", "install the package pillow-heif")
    return plugin.HeifImageFile(file)


def _jxl(file: BinaryIO) -> Image.Image:
    plugin = _imported("pillow_jxl.JpegXLImagePlugin")
    if plugin is None:
        raise NoDecoderError("JPEG XL", "install the package pillow-jxl-plugin")
    return plugin.JXLImageFile(file)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # not there, or without a library of its own
        return None


def _starts(*marks: bytes) -> Callable[[bytes], bool]:
    return lambda start: start.startswith(marks)


_JXL_BOX = b"\0\0\0\x0cJXL \r\n\x87\n"
FORMATS = (
    Format(
        "JPEG", _starts(JPEG), JpegImagePlugin.JpegImageFile, check_jpeg, MOST_STREAMED,
        lambda *_: False,  # what some cameras put behind is a map of depth, or a preview
    ),
    Format(
        "PNG", _starts(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile, check_png, MOST_PIXELS,
        _counted,
    ),
    Format(
        "WebP", lambda start: start[:4] == b"RIFF" and start[8:12] == b"WEBP",
        WebPImagePlugin.WebPImageFile, check_webp, MOST_OF_WEBP, _counted,
    ),
    Format(
        "BMP", _starts(b"BM"), BmpImagePlugin.BmpImageFile, check_bmp, MOST_PIXELS,
        lambda *_: False,
    ),
    Format(
        "GIF", _starts(b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile, check_gif, MOST_OF_GIF,
        _gif_goes_on,
    ),
    Format(
        "TIFF", _starts(*tiff.MARKS), TiffImagePlugin.TiffImageFile, tiff.check, MOST_PIXELS,
        lambda file, _: tiff.goes_on(file),
    ),
    Format("AVIF", boxes.is_avif, _avif, boxes.check_heif, MOST_OF_HEIF, _counted),
    Format("HEIC", boxes.is_heif, _heif, boxes.check_heif, MOST_OF_HEIF, _counted),
    Format(
        "JPEG XL", _starts(b"\xff\x0a", _JXL_BOX), _jxl, boxes.check_jxl, MOST_OF_JXL, _counted
    ),
)  # fmt: skip
