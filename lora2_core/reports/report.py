"""Ranks for people: pictures and a text table of what every component of a LoRA received.

:mod:`.rank_map` decides where each component goes, :mod:`.canvas` holds the drawing
primitives, and this module puts them together. Pillow and numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..files.read import ComponentInfo
from .canvas import (
    FAINT,
    HAIRLINE,
    MUTED,
    OUTLINE,
    SURFACE,
    TEXT,
    Box,
    Canvas,
    Colour,
    Curve,
    cividis,
    draw_plot,
    fitted,
    ink_on,
    text_width,
)
from .rank_map import (
    GUTTER,
    HALF,
    MARGIN,
    PLOT_HEIGHT,
    WIDTH,
    Layout,
    grid_top,
    layout,
    short,
    short_kind,
)
from .summary import RankSummary, histogram, summarize

_LEGEND = 290  # px: the scale of colours
_RAW, _SMOOTH, _PROBE, _RANK = (
    (0x3A, 0x4E, 0x62),
    (0x6C, 0xB6, 0xFF),
    (0xFF, 0xB4, 0x54),
    (0xF0, 0xC1, 0x4B),
)  # of the loss and of the mean rank those of the panel; see web/lib/curve.mjs


@dataclass(frozen=True)
class TrainingHistory:
    """The curves of a run. Values that are not finite are allowed and not drawn."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]  # raw mean squared error, one a step
    mean_ranks: tuple[float, ...]  # one a step
    probe_steps: tuple[int, ...]
    probe_losses: tuple[float, ...]  # fixed noise and timesteps: the honest curve
    target_rank: float | None


@dataclass(frozen=True)
class Scale:
    """Colours of ranks: logarithmic from 1 to ``highest``, or one calm colour for one rank."""

    lowest: int
    highest: int

    @classmethod
    def of(cls, components: Sequence[ComponentInfo]) -> Scale:
        """The scale that fits the ranks of ``components``."""
        ranks = [c.rank for c in components if c.rank] or [1]
        return cls(min(ranks), max(ranks))

    @property
    def uniform(self) -> bool:
        """Whether there is only one rank, so that "high" and "low" mean nothing."""
        return self.lowest == self.highest

    def position(self, rank: int) -> float:
        """Where ``rank`` stands on the scale, 0 to 1."""
        return 0.2 if self.uniform else math.log(max(rank, 1)) / math.log(self.highest)

    def colour(self, rank: int) -> Colour:
        """The colour of ``rank``."""
        return cividis(self.position(rank))


def scale_ticks(largest: int) -> list[int]:
    """At most eleven ranks for the legend: powers of two, and ``largest`` itself."""
    powers = [2**index for index in range(max(largest, 2).bit_length())]
    powers = powers[:: math.ceil(len(powers) / 10)]
    if largest <= powers[-1]:
        return powers
    # The last power makes room when its label would touch that of the end.
    return [p for p in powers if p == 1 or _apart(p, largest)] + [largest]


def _apart(rank: int, largest: int) -> bool:
    distance = _LEGEND * (1 - math.log(rank) / math.log(largest))
    labels = text_width(short(rank), 11) + text_width(short(largest), 11)
    return distance >= labels / 2 + 6


def rank_picture(
    components: Sequence[ComponentInfo], title: str, subtitle: str = ""
) -> Image.Image:
    """The heat map of all ranks, their histogram and the key figures."""
    return _picture(components, None, title, subtitle)


def training_picture(
    components: Sequence[ComponentInfo], history: TrainingHistory, title: str, subtitle: str = ""
) -> Image.Image:
    """:func:`rank_picture` below the curves of the loss and of the mean rank."""
    return _picture(components, history, title, subtitle)


def _picture(
    components: Sequence[ComponentInfo], history: TrainingHistory | None, title: str, subtitle: str
) -> Image.Image:
    top = grid_top(subtitle, history is not None)
    plan = layout(components, top)
    bars_box, figures_box = _foot_boxes(plan, top)
    canvas = Canvas(WIDTH, math.ceil(max(plan.bottom, figures_box[3])) + MARGIN)
    canvas.text((MARGIN, 54), fitted(title, 26, WIDTH - 2 * MARGIN), 26)
    canvas.text((MARGIN, 80), fitted(subtitle, 14, WIDTH - 2 * MARGIN), 14, MUTED)
    if history is not None:
        _draw_curves(canvas, history, grid_top(subtitle) - 46)
    scale = Scale.of(components)
    draw_legend(canvas, plan, scale, top - 30)
    draw_grid(canvas, plan, scale)
    _draw_histogram(canvas, components, scale, bars_box)
    _draw_figures(canvas, summarize(components), figures_box)
    return canvas.finish()


def _foot_boxes(plan: Layout, top: float) -> tuple[Box, Box]:
    """The panels of the histogram and the key figures: below the grid, or beside a narrow one."""
    left, right, height = MARGIN, MARGIN + HALF + GUTTER, 152
    if max((cell.box[2] for cell in plan.cells), default=0) <= left + HALF:
        below = top + height + GUTTER
        return _half(right, top, height), _half(right, below, height)
    top = plan.bottom + 8
    return _half(left, top, height), _half(right, top, height)


def _half(left: float, top: float, height: float) -> Box:
    return left, top, left + HALF, top + height


def draw_legend(canvas: Canvas, plan: Layout, scale: Scale, baseline: float) -> None:
    """What the colours mean, on one line."""
    canvas.text((MARGIN, baseline), "Rank of each component", 15)
    left, right = WIDTH - MARGIN - 10 - _LEGEND, WIDTH - MARGIN - 10
    empty = any(not cell.component or _left_out(cell.component) for cell in plan.cells)
    if not any(cell.component and cell.component.rank for cell in plan.cells):
        left = WIDTH - MARGIN
    elif scale.uniform:
        label = f"rank {short(scale.highest)}" + ("" if empty else " everywhere")
        left = round(WIDTH - MARGIN - text_width(label, 12)) - 22
        canvas.box((left, baseline - 12, left + 14, baseline + 2), scale.colour(1), radius=2)
        canvas.text((left + 22, baseline), label, 12, MUTED)
    else:
        for x in range(left, right):
            share = (x - left) / (right - left)
            canvas.box((x, baseline - 18, x + 1, baseline - 6), cividis(share))
        for tick in scale_ticks(scale.highest):
            x = left + scale.position(tick) * (right - left)
            canvas.text((x, baseline + 8), short(tick), 11, FAINT, "centre")
    left -= 0 if left == WIDTH - MARGIN else 32
    y = baseline if scale.uniform else baseline - 7
    if empty:
        left = _draw_key(canvas, (left, y), "left out", None)
    if any(cell.component and not cell.component.ranked for cell in plan.cells):
        _draw_key(canvas, (left, y), "of a kind without a rank", HAIRLINE)


def _left_out(component: ComponentInfo) -> bool:
    return component.ranked and not component.rank


def _draw_key(canvas: Canvas, right: tuple[float, float], text: str, fill: Colour | None) -> float:
    """A box and what it means, ending at ``right``; where the next may end."""
    start, y = right[0] - text_width(text, 12), right[1]
    canvas.text((start, y), text, 12, MUTED)
    canvas.box((round(start) - 22, y - 12, round(start) - 8, y + 2), fill, OUTLINE, 2)
    return start - 40


def draw_grid(canvas: Canvas, plan: Layout, scale: Scale) -> None:
    """The map itself: a cell a component, its rank in it where there is room."""
    for left, right, y in plan.rules:
        canvas.line([(left, y), (right, y)], OUTLINE)
    for label in plan.labels:
        canvas.text((label.x, label.y), label.text, label.size, label.colour, label.align)
    longest = "8" * len(short(scale.highest))
    for cell in plan.cells:
        radius = min(3, (cell.box[2] - cell.box[0]) // 8)
        if cell.component is None or _left_out(cell.component):
            canvas.box(cell.box, None, OUTLINE, radius)
            continue
        if not cell.component.ranked:
            canvas.box(cell.box, HAIRLINE, OUTLINE, radius)
            _draw_inside(canvas, cell.box, short_kind(cell.component), MUTED)
            continue
        fill = scale.colour(cell.component.rank)
        canvas.box(cell.box, fill, radius=radius)
        _draw_inside(canvas, cell.box, short(cell.component.rank), ink_on(fill), longest)


def _draw_inside(canvas: Canvas, box: Box, text: str, ink: Colour, longest: str = "") -> None:
    """``text`` in the middle of a cell, where it can be read; of a size that fits ``longest``."""
    left, top, right, bottom = box
    size = min(12.0, bottom - top - 4, 10 * (right - left - 2) / text_width(longest or text, 10))
    if size >= 8:
        at = ((left + right) / 2, (top + bottom) / 2 + size * 0.35)
        canvas.text(at, text, size, ink, "centre")


def _draw_figures(canvas: Canvas, figures: RankSummary, box: Box) -> None:
    canvas.box(box, SURFACE, radius=6)
    small = figures.nbytes < 1e5
    size, unit = (figures.nbytes / 1e3, "kB") if small else (figures.nbytes / 1e6, "MB")
    none = figures.unranked == figures.count > 0
    tiles = (
        ("lowest rank", "-" if none else short(figures.rank_min)),
        ("median", "-" if none else short(figures.rank_median)),
        ("mean", "-" if none else short(figures.rank_mean)),
        ("highest", "-" if none else short(figures.rank_max)),
        ("components", str(figures.count)),
        ("left out", str(figures.zero_count)),
        ("parameters", short(figures.parameters)),
        ("size", f"{short(size)} {unit}"),
    )
    step = (box[2] - box[0] - 18) / 4
    for index, (name, value) in enumerate(tiles):
        x, y = box[0] + 18 + index % 4 * step, box[1] + 32 + index // 4 * 68
        canvas.text((x, y), name, 12, FAINT)
        canvas.text((x, y + 28), value, 22)


def _draw_histogram(
    canvas: Canvas, components: Sequence[ComponentInfo], scale: Scale, box: Box
) -> None:
    canvas.box(box, SURFACE, radius=6)
    canvas.text((box[0] + 18, box[1] + 27), "Components by rank", 13, MUTED)
    if components and not any(c.ranked for c in components):
        canvas.text((box[0] + 18, box[1] + 60), "No component has a rank.", 13, FAINT)
        return
    bars = histogram(components)
    most = max(1, *(count for *_, count in bars))
    step = min(92.0, (box[2] - box[0] - 36) / len(bars))
    base = box[3] - 30
    for index, (label, high, count) in enumerate(bars):
        left, right = box[0] + 18 + index * step, box[0] + 18 + (index + 1) * step - 4
        height = max(1.0, round(66 * count / most))
        fill = scale.colour(min(high, scale.highest)) if count else HAIRLINE
        area = (round(left), base - height, round(right), base)
        canvas.box(area, fill if high else None, None if high else OUTLINE)
        centre = (left + right) / 2
        if count:
            canvas.text((centre, base - height - 5), short(count), 11, TEXT, "centre")
        if text_width(label, 11) <= step - 4:
            canvas.text((centre, base + 16), label, 11, FAINT, "centre")


def running_median(values: Sequence[float], at_most: int = 400) -> list[tuple[int, float]]:
    """Index and median of a window around it, at ``at_most`` evenly spread indices."""
    count = len(values)
    reach = max(2, count // 40)
    indices = sorted({round(i) for i in np.linspace(0, count - 1, min(count, at_most))})
    return [(i, float(np.median(values[max(i - reach, 0) : i + reach + 1]))) for i in indices]


def _draw_curves(canvas: Canvas, history: TrainingHistory, top: float) -> None:
    # A handful of steps has no median worth the name, so the raw line itself comes forward.
    noisy = len(history.losses) >= 8
    raw = Curve.of(
        "each step",
        history.steps,
        history.losses,
        colour=_RAW if noisy else _SMOOTH,
        robust=True,
    )
    probe = Curve.of(
        "probe", history.probe_steps, history.probe_losses, colour=_PROBE, width=2, dots=True
    )
    curves = [raw, probe]
    if noisy and raw.points:
        medians = running_median([y for _, y in raw.points])
        points = tuple((raw.points[index][0], value) for index, value in medians)
        curves.insert(1, Curve("median", points, _SMOOTH, width=2))
    ranks = Curve.of("mean", history.steps, history.mean_ranks, colour=_RANK, width=2)
    right = MARGIN + HALF + GUTTER
    draw_plot(canvas, _half(MARGIN, top, PLOT_HEIGHT), "Loss", curves)
    draw_plot(canvas, _half(right, top, PLOT_HEIGHT), "Mean rank", [ranks], history.target_rank)
