"""The strip of samples: one row a prompt, one column a step."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from .canvas import FAINT, HAIRLINE, MUTED, SURFACE, TEXT, Canvas, fitted, text_width
from .rank_map import MARGIN

_GAP, _PROMPT, _TOP = 10, 34, 118  # px: between cells, for a prompt above its row, for the head
_NARROWEST = 560  # px: the title needs some room


class Painted(Protocol):
    """Pictures of one step."""

    @property
    def step(self) -> int: ...

    @property
    def prompts(self) -> tuple[str, ...]: ...

    @property
    def pictures(self) -> Tensor: ...  # (prompts, height, width, 3) uint8


def strip_png(events: Sequence[Painted], title: str, side: int) -> bytes:
    """:func:`strip_picture` as the bytes of a PNG."""
    data = io.BytesIO()
    strip_picture(events, title, side).save(data, "PNG")
    return data.getvalue()


def strip_picture(events: Sequence[Painted], title: str, side: int) -> Image.Image:
    """The strip of ``events``, all of the same prompts: rows are prompts, columns are steps.

    ``side``: the longer side of every picture, px.
    """
    prompts = events[-1].prompts
    height, width = _fit(events[-1].pictures, side)
    across = max(_NARROWEST, 2 * MARGIN + len(events) * (width + _GAP) - _GAP)
    row = height + _PROMPT + _GAP
    canvas = Canvas(across, _TOP + len(prompts) * row + MARGIN - _GAP)
    inner = across - 2 * MARGIN
    canvas.text((MARGIN, 54), fitted(title, 26, inner), 26)
    _draw_head(canvas, events, width)
    for number, prompt in enumerate(prompts):
        y = _TOP + number * row
        canvas.line([(MARGIN, y + 4), (across - MARGIN, y + 4)], HAIRLINE)
        canvas.text((MARGIN, y + _PROMPT - 9), fitted(prompt or "no words", 13, inner), 13, MUTED)
    image = canvas.finish()
    for column, event in enumerate(events):
        for number, pixels in enumerate(event.pictures):
            large = max(pixels.shape[:2]) >= side
            way = Image.Resampling.LANCZOS if large else Image.Resampling.BICUBIC
            picture = Image.fromarray(np.asarray(pixels)).resize((width, height), way)
            left = MARGIN + column * (width + _GAP)
            image.paste(picture, (left, _TOP + number * row + _PROMPT))
    return image


def _draw_head(canvas: Canvas, events: Sequence[Painted], width: int) -> None:
    """The step above every column."""
    for column, event in enumerate(events):
        left = MARGIN + column * (width + _GAP)
        canvas.box((left, _TOP - 36, left + width, _TOP - 10), SURFACE, radius=4)
        label, number = "step ", f"{event.step:,}"
        start = left + (width - text_width(label, 13) - text_width(number, 13)) / 2
        canvas.text((start, _TOP - 18), label, 13, FAINT)
        canvas.text((start + text_width(label, 13), _TOP - 18), number, 13, TEXT)


def _fit(pictures: Tensor, side: int) -> tuple[int, int]:
    """Height and width of ``pictures`` (n, height, width, 3) with ``side`` as the longer one."""
    height, width = pictures.shape[1:3]
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))
