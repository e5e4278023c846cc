"""Where every component stands in a heat map on the screen: rows of blocks, columns of projections.

The order is that of the picture in the report: attention in the order the network runs it, and
below it everything else by kind. See :mod:`.rank_layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .lora_file import ComponentInfo
from .lora_format import kohya_key
from .rank_layout import ROWS, group_label, sort_components
from .targets import Target

COLUMNS = tuple(f"attn{kind}.{row}" for kind in (1, 2) for row in ROWS)


@dataclass(frozen=True)
class Place:
    """One cell of the map."""

    key: str  # kohya key, as in the file
    label: str  # for people: "down 4.1 · 0 · attn1.q"
    row: str  # "down 4.1 · 0", or a kind such as "Feed-forward"
    column: str  # of COLUMNS, or the running number within the kind
    in_features: int
    out_features: int

    @property
    def parameters_per_rank(self) -> int:
        return self.in_features + self.out_features


def places(components: Sequence[ComponentInfo]) -> list[Place]:
    """Every component once, rows in forward order."""
    grid, kinds = sort_components(components)
    found: list[Place] = []
    for (group, block), by_row in grid.items():
        row = f"{group_label(group)} · {block}"
        found += [_place(by_row[n], row, COLUMNS[n]) for n in sorted(by_row)]
    for kind, members in kinds.items():
        found += [_place(component, kind, str(n)) for n, component in enumerate(members)]
    return found


def of_targets(targets: Sequence[Target]) -> list[ComponentInfo]:
    """Targets as the file will name them, at rank 0."""
    return [
        ComponentInfo(kohya_key(t.name, t.root), 0, t.in_features, t.out_features, None, 0)
        for t in targets
    ]


def _place(component: ComponentInfo, row: str, column: str) -> Place:
    label = f"{row} · {column}"
    return Place(component.key, label, row, column, component.in_features, component.out_features)
