"""Where every component of a LoRA goes in the rank picture: pure functions, nothing drawn.

Attention makes a grid as in the paper's rank figures: transformer blocks from left to right in
the order the network runs them, one row for each of q, k, v, out of self- and of
cross-attention. The rest stands in strips below, by kind. Every component has exactly one cell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..files.places import BANDS, ROWS, STAGES, Column, group_label, sort_components
from ..files.read import ComponentInfo
from .canvas import FAINT, MUTED, Box, Colour, Point, text_width

WIDTH, MARGIN = 1280, 36
_GRID_LEFT, _GRID_WIDTH = MARGIN + 34, WIDTH - 2 * MARGIN - 34 - 52
PLOT_HEIGHT = 272


@dataclass(frozen=True)
class Cell:
    """A rectangle of the picture in pixels; no component means that the file has none here."""

    box: Box
    component: ComponentInfo | None


@dataclass(frozen=True)
class Label:
    """One line of text of the picture, ``x`` and ``y`` on its baseline."""

    x: float
    y: float
    text: str
    size: float
    colour: Colour = FAINT
    align: str = "left"


@dataclass(frozen=True)
class Layout:
    """All that the rank grid draws, and where it ends."""

    cells: tuple[Cell, ...]
    labels: tuple[Label, ...]
    rules: tuple[tuple[float, float, float], ...]  # left, right, y
    bottom: float


def mean_text(components: Sequence[ComponentInfo]) -> str:
    """The mean rank with one decimal, or "-" for no components."""
    if not components:
        return "-"
    mean = statistics.fmean(c.rank for c in components)
    return f"{mean:.1f}" if mean < 9999.5 else short(mean)


def short(value: float, unit: str = "") -> str:
    """A number in about five characters: "14", "7.25", "560", "23.4M"."""
    for limit, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= limit:
            return short(value / size, letter)
    return (f"{value:.0f}" if value >= 99.95 else f"{value:.3g}") + unit


def layout(components: Sequence[ComponentInfo], top: float) -> Layout:
    """Where everything of the rank grid goes when it starts at ``top``; draws nothing."""
    columns, kinds = sort_components(components)
    if not components:
        nothing = Label(MARGIN, top + 12, "No components.", 13, MUTED)
        return Layout((), (nothing,), (), top + 30)
    grid = _lay_grid(columns, top) if columns else Layout((), (), (), top)
    rest = _lay_rest(kinds, grid.bottom)
    return Layout(
        grid.cells + rest.cells, grid.labels + rest.labels, grid.rules + rest.rules, rest.bottom
    )


def _lay_grid(columns: dict[Column, dict[int, ComponentInfo]], top: float) -> Layout:
    lefts, pitch = _column_lefts(list(columns))
    space, height = (1, 22) if pitch < 40 else (2, 28)
    right = max(lefts.values()) + pitch - space
    labels, rules = _lay_headings(lefts, pitch - space, top)
    # At the page's edge, unless a narrow grid would leave its means alone out there.
    at_mean = WIDTH - MARGIN if right > _GRID_LEFT + 0.9 * _GRID_WIDTH else right + 52
    labels.append(Label(at_mean, top + 36, "mean", 11, FAINT, "right"))
    cells: list[Cell] = []
    y = top + 46
    for band, name in enumerate(BANDS):
        rows = range(4 * band, 4 * band + 4)
        if not any(row in found for found in columns.values() for row in rows):
            continue
        labels.append(Label(MARGIN, y + 12, name, 13, MUTED))
        y += 20
        for row in rows:
            middle = y + (height - space) / 2 + 4
            here = [found[row] for found in columns.values() if row in found]
            labels.append(Label(_GRID_LEFT - 10, middle, ROWS[row % 4], 12, FAINT, "right"))
            labels.append(Label(at_mean, middle, mean_text(here), 12, MUTED, "right"))
            for column, left in lefts.items():
                box = (left, y, left + pitch - space, y + height - space)
                cells.append(Cell(box, columns[column].get(row)))
            y += height
        y += 14
    return Layout(tuple(cells), tuple(labels), tuple(rules), y)


def _column_lefts(columns: Sequence[Column]) -> tuple[dict[Column, int], int]:
    """The left edge of every column, and their pitch; whole pixels keep the edges sharp."""
    breaks = len({group for group, _ in columns}) - 1
    pitch = min(140, (_GRID_WIDTH - (4 if breaks < 24 else 1) * breaks) // len(columns))
    gap = min(10, (_GRID_WIDTH - pitch * len(columns)) // max(breaks, 1))
    lefts, left = {}, _GRID_LEFT
    for _, members in groupby(columns, key=lambda column: column[0]):
        for column in members:
            lefts[column] = left
            left += pitch
        left += gap
    return lefts, pitch


def _lay_headings(
    lefts: dict[Column, int], width: int, top: float
) -> tuple[list[Label], list[tuple[float, float, float]]]:
    labels, rules = [], []

    def name_above(columns: Iterable[Column], name: str, size: float, y: float) -> Point:
        edges = [lefts[column] for column in columns]
        left, right = edges[0], edges[-1] + width
        if text_width(name, size) <= right - left:
            colour = MUTED if size == 12 else FAINT
            labels.append(Label((left + right) / 2, y, name, size, colour, "centre"))
        return left, right

    for stage, members in groupby(lefts, key=lambda column: column[0][0]):
        rules.append((*name_above(members, STAGES[stage], 12, top + 12), top + 20))
    for group, members in groupby(lefts, key=lambda column: column[0]):
        # The line above already says "mid", and a network has one middle.
        name = "" if group[0] == 1 else group_label(group).rpartition(" ")[2]
        name_above(members, name, 11, top + 36)
    return labels, rules


def _lay_rest(kinds: dict[str, list[ComponentInfo]], top: float) -> Layout:
    pitch = 32 if sum(map(len, kinds.values())) <= 320 else 16
    across = _GRID_WIDTH // pitch
    cells: list[Cell] = []
    labels: list[Label] = []
    y = top
    for name, members in kinds.items():
        text = f"{name} · {len(members)} · mean rank {mean_text(members)}"
        labels.append(Label(MARGIN, y + 12, text, 13, MUTED))
        y += 20
        for index, component in enumerate(members):
            left, above = _GRID_LEFT + index % across * pitch, y + index // across * 22
            cells.append(Cell((left, above, left + pitch - 1, above + 21), component))
        y += math.ceil(len(members) / across) * 22 + 14
    return Layout(tuple(cells), tuple(labels), (), y)


def grid_top(subtitle: str = "", curves: bool = False) -> int:
    """Where the rank grid starts below the header, and below the curves if there are any."""
    return 126 + (24 if subtitle else 0) + (PLOT_HEIGHT + 40 if curves else 0)
