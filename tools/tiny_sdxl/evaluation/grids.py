"""A grid of samples, each over its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pictures import to_pictures

PAPER, INK, FAINT, MARK = "#ffffff", "#1d1d22", "#6b6b76", "#d1495b"
MARGIN, GAP, CORNER = 40, 14, 10  # px
FINE = 4  # times as large are corners and dots drawn before they are scaled down


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
