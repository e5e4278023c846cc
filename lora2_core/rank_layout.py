"""Where every component of a LoRA goes in the rank picture: pure functions, nothing drawn.

Attention makes a grid as in the paper's rank figures: transformer blocks from left to right in
the order the network runs them, one row for each of q, k, v, out of self- and of
cross-attention. The rest stands in strips below, by kind. Every component has exactly one cell.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .canvas import FAINT, MUTED, Box, Colour, Point, text_width
from .lora_file import ComponentInfo

WIDTH, MARGIN = 1280, 36
ROWS = ("q", "k", "v", "out")
BANDS = ("Self-attention", "Cross-attention")
_STAGES = ("down", "mid", "up")
_MAX_COLUMNS = 120  # more blocks than this would make cells too narrow to see
_GRID_LEFT, _GRID_WIDTH = MARGIN + 34, WIDTH - 2 * MARGIN - 34 - 52
PLOT_HEIGHT = 272

_BLOCK = re.compile(
    r"(input_blocks|down_blocks|middle_block|mid_block|output_blocks|up_blocks)_(?:(\d+)_)?"
    r"(?:attentions_)?(\d+)_transformer_blocks_(\d+)_attn([12])_(?:processor_)?"
    r"to_(q|k|v|out)(?:_0)?(?:_lora)?$"
)
_STAGE_OF = {"input": 0, "down": 0, "middle": 1, "mid": 1, "output": 2, "up": 2}
_KINDS = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("Text encoder 1", r"^(lora_te1?_|text_encoder_)(?!2_)"),
        ("Text encoder 2", r"^(lora_te2_|text_encoder_2_)"),
        ("Feed-forward", r"_ff_|_mlp_"),
        ("Projections", r"proj_(in|out)$"),
        ("Other attention", r"attn|_to_(q|k|v|out)"),
        ("Embeddings", r"emb"),
        ("Convolutions", r"conv|(in|out)_layers|skip|_op$|samplers|resnets|blocks_0_0$|unet_out_"),
        ("Other", r""),
    )
)

Group = tuple[int, int, int]  # stage, and the two indices of the attention module
Column = tuple[Group, int]  # one transformer block of a group


@dataclass(frozen=True)
class Place:
    """Where an attention component belongs: its block, and its row (self q 0 … cross out 7)."""

    column: Column
    row: int


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


def parse_attention(key: str) -> Place | None:
    """The place of an attention component, named as in ComfyUI or as in diffusers."""
    match = None if key.startswith("lora_te") else _BLOCK.search(key.replace(".", "_"))
    if match is None:
        return None
    stage, first, second, block, kind, row = match.groups()
    group = (_STAGE_OF[stage.split("_")[0]], int(first or 0), int(second))
    return Place((group, int(block)), 4 * (int(kind) - 1) + ROWS.index(row))


def kind_of(key: str) -> str:
    """What a component is that has no place in the attention grid."""
    return next(name for name, pattern in _KINDS if pattern.search(key.replace(".", "_")))


def group_label(group: Group) -> str:
    """The name of a group, as in "down 4.1", "mid" and "up 0.1"."""
    stage, first, second = group
    return "mid" if stage == 1 else f"{_STAGES[stage]} {first}.{second}"


def sort_components(
    components: Sequence[ComponentInfo],
) -> tuple[dict[Column, dict[int, ComponentInfo]], dict[str, list[ComponentInfo]]]:
    """Attention by column and row in forward order, and the rest by kind."""
    grid: dict[Column, dict[int, ComponentInfo]] = {}
    rest: list[tuple[str, ComponentInfo]] = []
    for component in components:
        place = parse_attention(component.key)
        # Two spellings of one place: the second keeps a cell of its own among the rest.
        if place is None or place.row in grid.get(place.column, {}):
            rest.append((kind_of(component.key), component))
        else:
            grid.setdefault(place.column, {})[place.row] = component
    kept = sorted(grid)[:_MAX_COLUMNS]
    for column in sorted(grid)[_MAX_COLUMNS:]:
        rest += [("Other attention", c) for c in grid[column].values()]
    columns = _with_gaps_filled(kept)
    rest.sort(key=lambda item: _natural(item[1].key))
    kinds = {name: [c for kind, c in rest if kind == name] for name, _ in _KINDS}
    return {c: grid.get(c, {}) for c in columns}, {k: found for k, found in kinds.items() if found}


def _natural(text: str) -> list[tuple[str, int]]:
    """A sort key that puts block 2 before block 10."""
    return [(name, int(number or 0)) for name, number in re.findall(r"([^0-9]*)([0-9]*)", text)]


def _with_gaps_filled(columns: Sequence[Column]) -> list[Column]:
    """``columns`` with the blocks that a file leaves out entirely, where they are few."""
    last: dict[Group, int] = {}
    for group, block in columns:
        last[group] = max(block, last.get(group, 0))
    if sum(block + 1 for block in last.values()) > _MAX_COLUMNS:
        return list(columns)
    return [(group, block) for group in sorted(last) for block in range(last[group] + 1)]


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
        rules.append((*name_above(members, _STAGES[stage], 12, top + 12), top + 20))
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
