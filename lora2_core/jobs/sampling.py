"""Pictures painted while a LoRA learns.

Painting takes the weights that would be saved at that moment and a generator of its own, so a run
with samples gives the same file as one without.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config.train import TrainConfig
from ..files.write import write_atomically, write_beside_others
from ..training.setup import Painter

THUMBNAIL = 224  # px, the longer side of every picture but the newest
_PNG_HEAD = 33  # bytes of a PNG's signature and first chunk; texts may follow
_COLUMNS = 12  # at most, whatever the number of steps


@dataclass(frozen=True)
class SampleEvent:
    """What the LoRA painted after a step."""

    step: int
    prompts: tuple[str, ...]
    pictures: Tensor  # (prompts, height, width, 3) uint8, on the CPU


@dataclass(frozen=True)
class StripFile:
    """Where the strip of all pictures goes, and who draws it.

    ``draw``: a PNG of the events, the title, and the longer side of a picture in px.
    """

    path: Path
    draw: Callable[[Sequence[SampleEvent], str, int], bytes]


class SampleStrip:
    """Paints when it is time, and keeps the strip in ``file`` (None: only in memory).

    ``events``: the newest in full size, earlier ones as thumbnails, and no more of them than the
    strip has columns: a run of any length stays within some ten megabytes.
    """

    def __init__(
        self,
        painter: Painter,
        config: TrainConfig,
        file: StripFile | None,
        title: str,
        run_hash: str = "",
    ):
        mark = hashlib.sha256("\0".join([run_hash, *config.samples.prompts]).encode())
        self._mark = _png_text("lora2.run", mark.hexdigest())
        self.painter, self.file, self.title = painter, file, title
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
        options, pictures = self.options, []
        for prompt in options.prompts:
            if stop():
                return None
            size = (self.side, self.side)
            picture = self.painter.paint(
                [prompt], options.seed, size, options.steps, options.guidance
            )
            pictures.append((picture * 255).round().clamp(0, 255).to(torch.uint8).cpu())
        event = SampleEvent(step, options.prompts, torch.cat(pictures))
        self.events[:] = thinned([*map(thumbnail, self.events), event])
        self.write()
        return event

    def write(self) -> None:
        """The strip as it is now, in its file: over its older self, and over nothing else."""
        if self.file is None or not self.events:
            return
        png = self.file.draw(self.events, self.title, THUMBNAIL)
        data = png[:_PNG_HEAD] + self._mark + png[_PNG_HEAD:]

        def write(path: Path, new: bool) -> Path:
            write_atomically(path, data, new)
            return path

        path = write_beside_others(self.file.path, write, self._is_own)
        self.file = replace(self.file, path=path)

    def _is_own(self, path: Path) -> bool:
        """Whether it is a strip of these prompts and of this run, before a resume or after."""
        try:
            with path.open("rb") as file:
                return file.read(_PNG_HEAD + len(self._mark))[_PNG_HEAD:] == self._mark
        except OSError:
            return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the pictures as thumbnails."""
        return {
            "prompts": list(self.options.prompts),
            "steps": [event.step for event in self.events],
            "pictures": {str(n): thumbnail(e).pictures for n, e in enumerate(self.events)},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with a strip; other prompts than its own begin a new one."""
        if tuple(state["prompts"]) != self.options.prompts:
            return
        pictures = [state["pictures"][str(number)].clone() for number in range(len(state["steps"]))]
        self.events[:] = [
            SampleEvent(int(step), self.options.prompts, painted)
            for step, painted in zip(state["steps"], pictures, strict=True)
        ]


def _png_text(name: str, text: str) -> bytes:
    """A tEXt chunk of a PNG, which viewers pass over."""
    data = b"tEXt" + name.encode("latin-1") + b"\0" + text.encode("latin-1")
    return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def thinned(events: Sequence[SampleEvent], columns: int = _COLUMNS) -> list[SampleEvent]:
    """At most ``columns`` of ``events``, the first and the last always among them.

    The ones between that are nearest to their neighbours go, so the steps stay evenly spread.
    """
    kept = list(events)
    while len(kept) > max(2, columns):
        gaps = [kept[n + 1].step - kept[n - 1].step for n in range(1, len(kept) - 1)]
        del kept[1 + gaps.index(min(gaps))]
    return kept


def thumbnail(event: SampleEvent) -> SampleEvent:
    """``event`` with no side above THUMBNAIL; small pictures stay as they are."""
    height, width = event.pictures.shape[1:3]
    scale = THUMBNAIL / max(height, width)
    if scale >= 1:
        return event
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = [
        np.array(Image.fromarray(np.asarray(pixels)).resize(size, Image.Resampling.LANCZOS))
        for pixels in event.pictures
    ]
    return SampleEvent(event.step, event.prompts, torch.from_numpy(np.stack(small)))
