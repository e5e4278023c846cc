"""Pictures painted while a LoRA learns, and the strip of them: one row a prompt, one column a step.

Painting takes the weights that would be saved at that moment and a generator of its own, so a run
with samples gives the same file as one without.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .canvas import FAINT, HAIRLINE, MUTED, SURFACE, TEXT, Canvas, fitted, text_width
from .config import TrainConfig
from .lora_file import write_atomically
from .rank_layout import MARGIN

CELL = 224  # px, the longer side of a picture in the strip
_COLUMNS = 12  # at most, whatever the number of steps
_GAP, _PROMPT, _TOP = 10, 34, 118  # px: between cells, for a prompt above its row, for the head
_NARROWEST = 560  # px: the title needs some room


class Painter(Protocol):
    """Paints prompts with the model in training; see comfy_host.painting."""

    def paint(
        self,
        prompts: Sequence[str],
        seed: int,
        size: tuple[int, int],
        steps: int,
        guidance: float,
    ) -> Tensor: ...


@dataclass(frozen=True)
class SampleEvent:
    """What the LoRA painted after a step."""

    step: int
    prompts: tuple[str, ...]
    pictures: Tensor  # (prompts, height, width, 3) uint8, on the CPU


class SampleStrip:
    """Paints when it is time, and keeps the strip in ``path`` (None: only in memory).

    ``events``: the newest in full size, earlier ones no larger than in the strip, and no more of
    them than it has columns: a run of any length stays within some ten megabytes.
    """

    def __init__(self, painter: Painter, config: TrainConfig, path: Path | None, title: str):
        self.painter, self.path, self.title = painter, path, title
        self.options, self.steps = config.samples, config.steps
        self.side = config.resolution
        self.events: list[SampleEvent] = []

    def due(self, step: int) -> bool:
        """Whether pictures belong after this step and are not there yet."""
        wanted = step % self.options.every == 0 or step == self.steps
        return wanted and (not self.events or self.events[-1].step < step)

    def paint(self, step: int, stop: Callable[[], bool]) -> SampleEvent | None:
        """All prompts as of now, and the strip anew; None, and nothing kept, after ``stop()``.

        The network must hold the weights to show, its importances fresh. Raises what the painter
        raises, and LoRAFileError when the strip cannot be written.
        """
        options, found = self.options, []
        for prompt in options.prompts:
            if stop():
                return None
            size = (self.side, self.side)
            picture = self.painter.paint(
                [prompt], options.seed, size, options.steps, options.guidance
            )
            found.append((picture * 255).round().clamp(0, 255).to(torch.uint8).cpu())
        event = SampleEvent(step, options.prompts, torch.cat(found))
        self.events[:] = thinned([*map(_small, self.events), event])
        self.write()
        return event

    def write(self) -> None:
        """The strip as it is now, in its file."""
        if self.path is not None and self.events:
            data = io.BytesIO()
            strip_picture(self.events, self.title).save(data, "PNG")
            write_atomically(self.path, data.getvalue())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the pictures at the size of the strip."""
        return {
            "prompts": list(self.options.prompts),
            "steps": [event.step for event in self.events],
            "pictures": {str(n): _small(e).pictures for n, e in enumerate(self.events)},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with a strip; other prompts than its own begin a new one."""
        if tuple(state["prompts"]) != self.options.prompts:
            return
        pictures = [state["pictures"][str(number)].clone() for number in range(len(state["steps"]))]
        self.events[:] = [
            SampleEvent(int(step), self.options.prompts, found)
            for step, found in zip(state["steps"], pictures, strict=True)
        ]


def thinned(events: Sequence[SampleEvent], columns: int = _COLUMNS) -> list[SampleEvent]:
    """At most ``columns`` of ``events``, the first and the last always among them.

    The ones between that are nearest to their neighbours go, so the steps stay evenly spread.
    """
    kept = list(events)
    while len(kept) > max(2, columns):
        gaps = [kept[n + 1].step - kept[n - 1].step for n in range(1, len(kept) - 1)]
        del kept[1 + gaps.index(min(gaps))]
    return kept


def strip_picture(events: Sequence[SampleEvent], title: str) -> Image.Image:
    """The strip of ``events``, all of the same prompts: rows are prompts, columns are steps."""
    prompts = events[-1].prompts
    height, width = _fit(*events[-1].pictures.shape[1:3])
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
            picture = Image.fromarray(np.asarray(pixels)).resize((width, height), _filter(pixels))
            left = MARGIN + column * (width + _GAP)
            image.paste(picture, (left, _TOP + number * row + _PROMPT))
    return image


def _draw_head(canvas: Canvas, events: Sequence[SampleEvent], width: int) -> None:
    """The step above every column."""
    for column, event in enumerate(events):
        left = MARGIN + column * (width + _GAP)
        canvas.box((left, _TOP - 36, left + width, _TOP - 10), SURFACE, radius=4)
        label, number = "step ", f"{event.step:,}"
        start = left + (width - text_width(label, 13) - text_width(number, 13)) / 2
        canvas.text((start, _TOP - 18), label, 13, FAINT)
        canvas.text((start + text_width(label, 13), _TOP - 18), number, 13, TEXT)


def _fit(height: int, width: int) -> tuple[int, int]:
    scale = CELL / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _filter(pixels: Tensor) -> Image.Resampling:
    large = max(pixels.shape[:2]) >= CELL
    return Image.Resampling.LANCZOS if large else Image.Resampling.BICUBIC


def _small(event: SampleEvent) -> SampleEvent:
    """``event`` at the size of the strip; small pictures stay as they are."""
    if max(event.pictures.shape[1:3]) <= CELL:
        return event
    height, width = _fit(*event.pictures.shape[1:3])
    small = [
        torch.from_numpy(
            np.array(Image.fromarray(np.asarray(p)).resize((width, height), _filter(p)))
        )
        for p in event.pictures
    ]
    return SampleEvent(event.step, event.prompts, torch.stack(small))
