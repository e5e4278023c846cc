"""Several LoRAs in one picture: a rank map each, one scale of colours (the paper's figure 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..files.read import ComponentInfo
from .canvas import MUTED, Canvas, fitted, text_width
from .rank_map import LOW_ROW, MARGIN, WIDTH, Layout, layout
from .report import Scale, draw_grid, draw_legend
from .summary import summarize

_TITLE = 44  # of one file, above its map
_GAP = 26


@dataclass(frozen=True)
class Shown:
    """One file of the picture."""

    name: str
    components: Sequence[ComponentInfo]
    nbytes: int


def compare(files: Sequence[Shown]) -> Image.Image:
    """The rank maps of several LoRAs, one below the other. Raises ValueError for none."""
    if not files:
        raise ValueError("There is no LoRA to compare; choose at least one file.")
    every = [component for file in files for component in file.components]
    scale = Scale.of(every)
    plans: list[Layout] = []
    top = 118.0
    for file in files:
        plans.append(layout(file.components, top + _TITLE, LOW_ROW))
        top = plans[-1].bottom + _GAP
    canvas = Canvas(WIDTH, math.ceil(top - _GAP) + MARGIN)
    canvas.text((MARGIN, 54), f"{len(files)} LoRAs side by side", 26)
    cells = tuple(cell for plan in plans for cell in plan.cells)
    draw_legend(canvas, Layout(cells, (), (), 0), scale, 92)
    for file, plan in zip(files, plans, strict=True):
        _draw_title(canvas, file, plan)
        draw_grid(canvas, plan, scale)
    return canvas.finish()


def _draw_title(canvas: Canvas, file: Shown, plan: Layout) -> None:
    baseline = _top_of(plan) - 18
    figures = summarize(file.components)
    ranks = f"mean rank {figures.rank_mean:.1f} · {figures.rank_min} to {figures.rank_max}"
    if figures.rank_min == figures.rank_max:
        ranks = f"rank {figures.rank_max} everywhere"
    if figures.unranked == figures.count:
        ranks = f"{figures.count} components without a rank"
    facts = f"{ranks} · {file.nbytes / 1e6:,.2f} MB"
    room = WIDTH - 2 * MARGIN - text_width(facts, 14) - 24
    canvas.text((MARGIN, baseline), fitted(file.name, 17, room), 17)
    canvas.text((WIDTH - MARGIN, baseline), facts, 14, MUTED, "right")


def _top_of(plan: Layout) -> float:
    tops = [label.y - label.size for label in plan.labels] + [y for *_, y in plan.rules]
    return min(tops, default=0.0)
