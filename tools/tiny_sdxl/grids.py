"""Grids of samples with words beside them, and strips that hold samples as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .latents import to_pixels

PAPER, INK, FAINT, MARK = "#ffffff", "#1d1d22", "#6b6b76", "#d1495b"
MARGIN, GAP, CORNER = 40, 14, 10  # px
FINE = 4  # times as large are corners and dots drawn before they are scaled down


class Row(NamedTuple):
    """Pictures of one origin, and what stands to their left."""

    label: str
    details: tuple[str, ...]  # a line each
    images: Tensor  # (n, 3, h, w) in 0 to 1


def sample_grid(
    path: Path,
    images: Tensor,
    captions: Sequence[str],
    marked: Sequence[bool],
    legend: str,
    columns: int = 8,
    tile: int = 192,
) -> Path:
    """Write pictures (n, 3, h, w) in 0 to 1 in rows, each over its caption.

    ``marked`` ones get a dot before their caption, which ``legend`` explains below all.
    """
    font, step = _font(15), 19
    texts = [
        _wrapped(caption, font, tile - 6, indent=15 if dot else 0)
        for caption, dot in zip(captions, marked, strict=True)
    ]
    high = tile + 10 + step * max(map(len, texts)) + 16  # px, of a tile with its caption
    rows = -(-len(images) // columns)
    width = 2 * MARGIN + columns * (tile + GAP) - GAP
    sheet = Image.new(
        "RGB", (width, 2 * MARGIN + rows * high + (step if any(marked) else 0)), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for number, (picture, lines) in enumerate(zip(to_pictures(images), texts, strict=True)):
        x = MARGIN + number % columns * (tile + GAP)
        y = MARGIN + number // columns * high
        _paste(sheet, picture, (x, y), tile)
        if marked[number]:
            _dot(sheet, x + 6, y + tile + 20)
        for line, text in enumerate(lines):
            indent = 15 if marked[number] and line == 0 else 0
            draw.text((x + 1 + indent, y + tile + 10 + line * step), text, INK, font)
    if any(marked):
        y = MARGIN + rows * high
        _dot(sheet, MARGIN + 6, y + 10)
        draw.text((MARGIN + 16, y), legend, FAINT, font)
    sheet.save(path)
    return path


def subject_grid(
    path: Path,
    title: str,
    notes: Sequence[str],
    photos: Tensor,
    rows: Sequence[Row],
    columns: Sequence[str],
    tile: int = 132,
) -> Path:
    """Write what a subject looks like, and below it rows of pictures of it in other places.

    ``photos`` (n, 3, h, w) in 0 to 1 start the first row, and ``notes`` fill it where there are
    more columns than photos; ``columns`` names what each column of ``rows`` was asked to show.
    """
    label, space, small = 176, 10, _font(14)
    across = max(len(columns), len(photos))
    width = 2 * MARGIN + label + across * (tile + space) - space
    top = MARGIN + tile + 64  # px, of the first row of samples
    sheet = Image.new("RGB", (width, top + len(rows) * (tile + space) - space + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    _label(draw, MARGIN, tile, title, ("what it learns from",), 22)
    for number, picture in enumerate(to_pictures(photos)):
        _paste(sheet, picture, (MARGIN + label + number * (tile + space), MARGIN), tile)
    x = MARGIN + label + len(photos) * (tile + space) + 16
    for line, text in enumerate(notes):
        draw.text((x, MARGIN + 4 + line * 21), text, FAINT, small)
    draw.line((MARGIN, top - 40, width - MARGIN, top - 40), "#dcdce2")
    for number, name in enumerate(columns):
        middle = MARGIN + label + number * (tile + space) + tile / 2
        draw.text((middle, top - 10), name, FAINT, small, anchor="ms")
    for number, row in enumerate(rows):
        y = top + number * (tile + space)
        _label(draw, y, tile, row.label, row.details, 17)
        for column, picture in enumerate(to_pictures(row.images)):
            _paste(sheet, picture, (MARGIN + label + column * (tile + space), y), tile)
    sheet.save(path)
    return path


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Return (n, 3, h, w) in 0 to 1 as 8-bit pictures."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)  # (n, h, w, 3)
    return [Image.fromarray(array) for array in pixels.cpu().numpy()]


def write_strip(path: Path, images: Tensor) -> None:
    """Write square pictures (n, 3, h, h) in 0 to 1 side by side as one file."""
    row = torch.cat(list(images), dim=-1)[None]  # (1, 3, h, n·h)
    to_pictures(row)[0].save(path)


def read_strip(path: Path) -> Tensor:
    """Return the square pictures of a strip, (n, 3, h, h) in 0 to 1, in steps of 1/255."""
    with Image.open(path) as strip:
        pixels = np.asarray(strip.convert("RGB"))  # (h, n·h, 3)
    return to_pixels(np.split(pixels, pixels.shape[1] // pixels.shape[0], axis=1))


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise SystemExit("This Pillow has no FreeType for captions: pip install --upgrade pillow")
    return font


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, indent: int = 0) -> list[str]:
    """Return a text in lines of at most ``width`` px, the first one shorter by ``indent``."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - (indent if len(lines) == 1 else 0):
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _label(
    draw: ImageDraw.ImageDraw, y: int, high: int, label: str, details: Sequence[str], size: int
) -> None:
    """Write a label and its details, together centred beside a row that starts at ``y``."""
    first = y + (high - size - 8 - 19 * len(details)) // 2
    x = float(MARGIN)
    for number, piece in enumerate(label.split("²")):
        if number:  # Pillow's font has no "²"
            draw.text((x, first - 2), "2", INK, _font(size * 2 // 3))
            x += _font(size * 2 // 3).getlength("2")
        draw.text((x, first), piece, INK, _font(size))
        x += _font(size).getlength(piece)
    for line, text in enumerate(details):
        draw.text((MARGIN, first + size + 8 + 19 * line), text, FAINT, _font(14))


def _paste(sheet: Image.Image, picture: Image.Image, place: tuple[int, int], tile: int) -> None:
    """Put a picture down with round corners, at ``tile`` px."""
    if picture.size != (tile, tile):
        picture = picture.resize((tile, tile), Image.Resampling.LANCZOS)
    mask = Image.new("L", (FINE * tile, FINE * tile))
    last = FINE * tile - 1
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, last, last), FINE * CORNER, fill=255)
    sheet.paste(picture, place, mask.resize((tile, tile), Image.Resampling.LANCZOS))


def _dot(sheet: Image.Image, x: int, y: int) -> None:
    """Draw the dot of a marked picture around a point."""
    side = 8
    mask = Image.new("L", (FINE * side, FINE * side))
    ImageDraw.Draw(mask).ellipse((0, 0, FINE * side - 1, FINE * side - 1), fill=255)
    small = mask.resize((side, side), Image.Resampling.LANCZOS)
    sheet.paste(Image.new("RGB", (side, side), MARK), (x - side // 2, y - side // 2), small)
