"""The ranks of a file in figures: totals, a histogram, a table of text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..files.places import BANDS, PROJECTIONS, group_label, sort_components
from ..files.read import ComponentInfo
from .rank_map import mean_text, short


@dataclass(frozen=True)
class RankSummary:
    """Key figures. Left-out components count as rank 0 in all of them."""

    count: int
    zero_count: int
    rank_min: int
    rank_median: float
    rank_mean: float
    rank_max: int
    parameters: int
    nbytes: int


def summarize(components: Sequence[ComponentInfo]) -> RankSummary:
    """The key figures of ``components``; all zero for none."""
    ranks = [c.rank for c in components] or [0]
    return RankSummary(
        count=len(components),
        zero_count=sum(c.rank == 0 for c in components),
        rank_min=min(ranks),
        rank_median=float(statistics.median(ranks)),
        rank_mean=statistics.fmean(ranks),
        rank_max=max(ranks),
        parameters=sum(c.rank * (c.in_features + c.out_features) for c in components),
        nbytes=sum(c.nbytes for c in components),
    )


def histogram(components: Sequence[ComponentInfo]) -> list[tuple[str, int, int]]:
    """Bars of label, highest rank and count: 0, 1, 2, 3-4, 5-8, … up to the largest rank."""
    largest = max((c.rank for c in components), default=0)
    counts = [0] * (max(largest - 1, 0).bit_length() + 1)
    for component in components:
        if component.rank:
            counts[(component.rank - 1).bit_length()] += 1
    bars = [("0", 0, len(components) - sum(counts))] if sum(counts) < len(components) else []
    for power, count in enumerate(counts):
        low, high = 2 ** (power - 1) + 1 if power else 1, 2**power
        bars.append((str(high) if low == high else f"{short(low)}-{short(high)}", high, count))
    return bars


def rank_table(components: Sequence[ComponentInfo]) -> str:
    """The ranks as monospaced text of at most 100 columns."""
    figures = summarize(components)
    lines = [
        f"Components   {figures.count}, of which {figures.zero_count} left out (rank 0)",
        f"Rank         lowest {figures.rank_min}, median {figures.rank_median:g}, "
        f"mean {figures.rank_mean:.1f}, highest {figures.rank_max}",
        f"Parameters   {figures.parameters:,}",
        f"Size         {figures.nbytes / 1e6:,.2f} MB",
    ]
    blocks, kinds = sort_components(components)
    found = [
        (group_label(group), column, c)
        for (group, _), by_column in blocks.items()
        for column, c in by_column.items()
    ]
    if found:
        lines += ["", "Mean rank", *_attention_lines(found)]
    if kinds:
        lines += ["", f"{'Other components':<18}{'count':>8}{'mean rank':>12}"]
        lines += [f"{k:<18}{len(c):>8}{mean_text(c):>12}" for k, c in kinds.items()]
    return "\n".join(line.rstrip() for line in [*lines, *_extreme_lines(components)]) + "\n"


def _attention_lines(found: Sequence[tuple[str, int, ComponentInfo]]) -> list[str]:
    head = "".join(f"{name:>8}" for name in PROJECTIONS)
    lines = [f"{'':12}{BANDS[0]:^34}{BANDS[1]:^34}", f"{'block':<12}{head}  {head}"]
    for name in [*dict.fromkeys(name for name, *_ in found), "all"]:
        named = [(at, c) for group, at, c in found if name in (group, "all")]
        cells = [f"{mean_text([c for at, c in named if at == column]):>8}" for column in range(8)]
        lines.append(f"{fit_middle(name, 12):<12}{''.join(cells[:4])}  {''.join(cells[4:])}")
    return lines


def _extreme_lines(components: Sequence[ComponentInfo]) -> list[str]:
    if len({c.rank for c in components}) <= 1:
        return ["", f"Every component has rank {components[0].rank}."] if components else []
    ordered = sorted(components, key=lambda c: -c.rank)  # stable: ties stay in the file's order
    if len(ordered) <= 20:
        parts = {"All components": ordered}
    else:
        parts = {"Ten largest": ordered[:10], "Ten smallest": ordered[-10:]}
    lines = []
    for name, members in parts.items():
        lines += ["", name]
        lines += [f"{c.rank:>8}  {fit_middle(c.key, 88)}" for c in members]
    return lines


def fit_middle(text: str, length: int) -> str:
    """``text`` on one line, its middle cut out where it is longer than ``length``.

    A stranger's name may hold what moves a terminal's cursor; that becomes a question mark.
    """
    text = "".join(c if c.isprintable() else "?" for c in text)
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
