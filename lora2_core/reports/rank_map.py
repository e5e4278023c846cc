"""Where every component of a LoRA goes in the rank picture: pure functions, nothing drawn.

Attention makes a grid as in the panel of a running training: transformer blocks from top to bottom
in the order the network runs them, one column for each of q, k, v, out of self- and of
cross-attention. As down and mid together have about as many blocks as up, they stand side by side:
the way into the network on the left, the way out on the right. The rest stands in strips below, by
kind. Every component has exactly one cell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ..files.places import BANDS, PROJECTIONS, Block, group_label, sort_components
from ..files.read import ComponentInfo
from .canvas import FAINT, MUTED, Box, Colour, Point, fitted, text_width

WIDTH, MARGIN, GUTTER = 1280, 36, 32
HALF = (WIDTH - 2 * MARGIN - GUTTER) // 2  # px: each of two things that stand side by side
PLOT_HEIGHT = 272
LOW_ROW = 16  # px: of many blocks
_NAME, _NUMBER, _MEAN = 56, 20, 44  # px: of a group, of a block in it, of a row's mean
_SPACE, _BAND_GAP, _GROUP_GAP, _STAGE_GAP = 8, 8, 4, 12
_HEADING = 46
# Most blocks beside each other, and how high their rows are; most cells of all strips, and how
# wide and high each is.
_ROW_HEIGHTS = ((12, 28), (40, 22), (math.inf, LOW_ROW))
_STRIP_CELLS = ((800, 31, 22), (4000, 16, 16), (math.inf, 8, 8))
_SHORT = {"difference": "diff", "set weight": "set"}
_FEW = 200  # cells that half the width is enough for

Blocks = dict[Block, dict[int, ComponentInfo]]


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
    """The mean rank with one decimal; their kind where none has a rank; "-" where that is none."""
    ranks = [c.rank for c in components if c.ranked]
    if not ranks:
        kinds = {short_kind(c) for c in components}
        return kinds.pop() if len(kinds) == 1 else "-"
    mean = statistics.fmean(ranks)
    return f"{mean:.1f}" if mean < 9999.5 else short(mean)


def short_kind(component: ComponentInfo) -> str:
    """Of a component without a rank, in at most five characters."""
    return _SHORT.get(component.kind, component.kind[:5])


def short(value: float, unit: str = "") -> str:
    """A number in about five characters: "14", "7.25", "560", "23.4M"."""
    for limit, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= limit:
            return short(value / size, letter)
    return (f"{value:.0f}" if value >= 99.95 else f"{value:.3g}") + unit


def layout(components: Sequence[ComponentInfo], top: float, row: int | None = None) -> Layout:
    """Where everything of the rank grid goes when it starts at ``top``; draws nothing.

    ``row``: height of a block's row, px; None: as high as the number of blocks allows.
    """
    blocks, kinds = sort_components(components)
    if not components:
        nothing = Label(MARGIN, top + 12, "No components.", 13, MUTED)
        return Layout((), (nothing,), (), top + 30)
    sides = [
        {b: found for b, found in blocks.items() if (b[0][0] == 2) is up} for up in (False, True)
    ]
    sides = [side for side in sides if side]
    row = row or _fitting(_ROW_HEIGHTS, max(map(len, sides), default=0))[0]
    bands = [n for n in range(2) if any(c // 4 == n for found in blocks.values() for c in found)]
    parts = [
        _lay_side(side, bands, (MARGIN + n * (HALF + GUTTER), top), row)
        for n, side in enumerate(sides)
    ]
    below = max((part.bottom for part in parts), default=top)
    few = len(sides) < 2 and sum(map(len, kinds.values())) <= _FEW
    parts.append(_lay_strips(kinds, HALF if few else WIDTH - 2 * MARGIN, below))
    return Layout(
        tuple(cell for part in parts for cell in part.cells),
        tuple(label for part in parts for label in part.labels),
        tuple(rule for part in parts for rule in part.rules),
        parts[-1].bottom,
    )


def _fitting(sizes: Sequence[tuple[float, ...]], count: int) -> tuple[int, ...]:
    """The sizes, px, for ``count`` of something: the first whose limit reaches it."""
    return next(tuple(map(int, rest)) for limit, *rest in sizes if count <= limit)


def _lay_side(blocks: Blocks, bands: Sequence[int], at: Point, height: int) -> Layout:
    """One side of the grid, its upper left corner ``at``: a row a block, with means all round."""
    left, y = at
    columns, width = _column_lefts(bands, left)
    labels, rules = _lay_headings(bands, columns, width, at)
    right = left + HALF
    cells: list[Cell] = []
    y += _HEADING
    before = None
    for group, members in groupby(blocks, key=lambda block: block[0]):
        if before is not None:
            y += _GROUP_GAP if before == group[0] else _STAGE_GAP
        before = group[0]
        middle = (height - 1) / 2 + 4
        labels.append(Label(left, y + middle, fitted(group_label(group), 12, _NAME), 12, MUTED))
        numbers = [number for _, number in members]
        for number in numbers:
            text = str(number)
            if len(numbers) > 1 and text_width(text, 11) <= _NUMBER:
                edge = left + _NAME + _NUMBER
                labels.append(Label(edge, y + middle, text, 11, FAINT, "right"))
            found = blocks[group, number]
            mean = mean_text(list(found.values()))
            labels.append(Label(right, y + middle, mean, 12, MUTED, "right"))
            for column, edge in columns.items():
                box = (edge, y, edge + width - 1, y + height - 1)
                cells.append(Cell(box, found.get(column)))
            y += height
    labels += _lay_means(blocks, columns, width, (left, y + 16))
    return Layout(tuple(cells), tuple(labels), tuple(rules), y + 34)


def _column_lefts(bands: Sequence[int], left: float) -> tuple[dict[int, float], int]:
    """The left edge of every column, and their pitch; whole pixels keep the edges sharp."""
    room = HALF - _NAME - _NUMBER - _SPACE - _MEAN - _BAND_GAP * (len(bands) - 1)
    pitch = room // (4 * len(bands))
    start = left + _NAME + _NUMBER + _SPACE
    return {
        4 * band + n: start + (4 * place + n) * pitch + place * _BAND_GAP
        for place, band in enumerate(bands)
        for n in range(4)
    }, pitch


def _lay_headings(
    bands: Sequence[int], columns: dict[int, float], width: int, at: Point
) -> tuple[list[Label], list[tuple[float, float, float]]]:
    """The names above the columns, and a rule under the name of each kind of attention."""
    left, top = at
    labels = [Label(left + HALF, top + 36, "mean", 11, FAINT, "right")]
    rules = []
    for band in bands:
        start, end = columns[4 * band], columns[4 * band + 3] + width - 1
        labels.append(Label((start + end) / 2, top + 12, BANDS[band], 12, MUTED, "centre"))
        rules.append((start, end, top + 20))
    for column, edge in columns.items():
        centre = edge + (width - 1) / 2
        labels.append(Label(centre, top + 36, PROJECTIONS[column % 4], 12, FAINT, "centre"))
    return labels, rules


def _lay_means(blocks: Blocks, columns: dict[int, float], width: int, at: Point) -> list[Label]:
    """The mean of every column, and of all of this side, on the baseline of ``at``."""
    left, y = at
    labels = [Label(left, y, "mean", 11, FAINT)]
    for column, edge in columns.items():
        mean = mean_text([found[column] for found in blocks.values() if column in found])
        labels.append(Label(edge + (width - 1) / 2, y, mean, 12, MUTED, "centre"))
    every = mean_text([c for found in blocks.values() for c in found.values()])
    return [*labels, Label(left + HALF, y, every, 12, MUTED, "right")]


def _lay_strips(kinds: dict[str, list[ComponentInfo]], width: int, top: float) -> Layout:
    pitch, height = _fitting(_STRIP_CELLS, sum(map(len, kinds.values())))
    across = (width + 1) // pitch
    cells: list[Cell] = []
    labels: list[Label] = []
    y = top
    for name, members in kinds.items():
        mean = "mean rank " if any(c.ranked for c in members) else ""
        text = f"{name} · {len(members)} · {mean}{mean_text(members)}"
        labels.append(Label(MARGIN, y + 12, text, 13, MUTED))
        y += 20
        for index, component in enumerate(members):
            left, above = MARGIN + index % across * pitch, y + index // across * height
            cells.append(Cell((left, above, left + pitch - 1, above + height - 1), component))
        y += math.ceil(len(members) / across) * height + 14
    return Layout(tuple(cells), tuple(labels), (), y)


def grid_top(subtitle: str = "", curves: bool = False) -> int:
    """Where the rank grid starts below the header, and below the curves if there are any."""
    return 126 + (24 if subtitle else 0) + (PLOT_HEIGHT + 40 if curves else 0)
