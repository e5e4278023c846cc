"""Draw what the demo shows in one picture: photos, the base's attempts, the LoRA²'s samples.

Pillow, which ComfyUI has, is imported only while drawing: the demo starts without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

# The colours of the reports, so that this picture and the ranks' go together.
BACKGROUND, TEXT, MUTED = (0x1E, 0x1E, 0x22), (0xEC, 0xEC, 0xF1), (0xB0, 0xB0, 0xBC)
WIDTH, MARGIN, GAP, CORNER = 1328, 48, 16, 12  # px
TITLE, SMALL = 29, 21  # px, sizes of text
HEADER, CAPTION, SPACE = 58, 34, 52  # px: above a row, above captioned tiles, between rows
FINE = 4  # times as large are round corners drawn before they are scaled down


class Row(NamedTuple):
    """Pictures side by side, and what stands above them."""

    title: str
    detail: str
    pictures: Sequence[Path]
    captions: Sequence[str] = ()  # one a picture

    @property
    def tile(self) -> int:
        """Side of each picture in px, so that the row is as wide as every other."""
        gaps = GAP * (len(self.pictures) - 1)
        return (WIDTH - 2 * MARGIN - gaps) // len(self.pictures)

    @property
    def height(self) -> int:
        """Height in px with the title and the captions."""
        return HEADER + (CAPTION if self.captions else 0) + self.tile


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, one below the other, as a picture."""
    from PIL import Image, ImageDraw

    height = 2 * MARGIN + sum(row.height for row in rows) + SPACE * (len(rows) - 1)
    # Letters stand lower than the line they hang from, which would make the upper margin wider.
    sheet = Image.new("RGB", (WIDTH, height - 6), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    y = MARGIN - 6
    for row in rows:
        _draw_row(sheet, draw, row, y)
        y += row.height + SPACE
    sheet.save(path)


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: Row, y: int) -> None:
    end = _draw_text(draw, (MARGIN, y + TITLE), row.title, TITLE, TEXT)
    _draw_text(draw, (end + 18, y + TITLE), row.detail, SMALL, MUTED)
    top = y + row.height - row.tile
    for number, picture in enumerate(row.pictures):
        x = MARGIN + number * (row.tile + GAP)
        if row.captions:
            _draw_text(draw, (x, top - 14), row.captions[number], SMALL, MUTED)
        _paste(sheet, picture, (x, top), row.tile)


def _draw_text(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: float,
    colour: tuple[int, int, int],
) -> float:
    """Write a line from the left end of its baseline; return where it ends.

    Pillow's own font has no raised 2, so "²" is drawn as a small one.
    """
    from PIL import ImageFont

    x, y = at
    for index, piece in enumerate(text.split("²")):
        if index:
            font = ImageFont.load_default(size=0.62 * size)
            draw.text((x, y - 0.33 * size), "2", colour, font, anchor="ls")
            x += font.getlength("2")
        font = ImageFont.load_default(size=size)
        draw.text((x, y), piece, colour, font, anchor="ls")
        x += font.getlength(piece)
    return x


def _paste(sheet: Image.Image, file: Path, at: tuple[int, int], tile: int) -> None:
    """Put a picture down at `tile` px with round corners."""
    from PIL import Image, ImageDraw

    with Image.open(file) as opened:
        picture = opened.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS)
    mask = Image.new("L", (FINE * tile, FINE * tile))
    last = FINE * tile - 1
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, last, last), FINE * CORNER, fill=255)
    sheet.paste(picture, at, mask.resize((tile, tile), Image.Resampling.LANCZOS))
