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
    """Key figures. Left-out components count as rank 0 in all of them; those of a kind that has no
    rank (LoKr, OFT, differences) are in none of a rank."""

    count: int
    zero_count: int
    rank_min: int
    rank_median: float
    rank_mean: float
    rank_max: int
    parameters: int
    nbytes: int
    unranked: int = 0  # components of kinds without a rank


def summarize(components: Sequence[ComponentInfo]) -> RankSummary:
    """The key figures of ``components``; all zero for none."""
    ranks = [c.rank for c in components if c.ranked] or [0]
    return RankSummary(
        count=len(components),
        zero_count=sum(c.ranked and c.rank == 0 for c in components),
        rank_min=min(ranks),
        rank_median=float(statistics.median(ranks)),
        rank_mean=statistics.fmean(ranks),
        rank_max=max(ranks),
        parameters=sum(c.parameters for c in components),
        nbytes=sum(c.nbytes for c in components),
        unranked=sum(not c.ranked for c in components),
    )


def histogram(components: Sequence[ComponentInfo]) -> list[tuple[str, int, int]]:
    """Bars of label, highest rank and count: 0, 1, 2, 3-4, 5-8, … up to the largest rank; of
    components that have one."""
    components = [c for c in components if c.ranked]
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
        f"Components   {_counts(figures)}",
        *_rank_lines(figures),
        f"Parameters   {figures.parameters:,}",
        f"Size         {figures.nbytes / 1e6:,.2f} MB",
        *_kind_lines(components, figures),
    ]
    blocks, kinds = sort_components(components)
    found = [
        (group_label(group), column, c)
        for (group, _), by_column in blocks.items()
        for column, c in by_column.items()
    ]
    if found:
        lines += ["", "Mean rank" if any(c.ranked for *_, c in found) else "Kind"]
        lines += _attention_lines(found)
    if kinds:
        lines += ["", f"{'Other components':<18}{'count':>8}{'mean rank':>12}"]
        lines += [f"{k:<18}{len(c):>8}{mean_text(c):>12}" for k, c in kinds.items()]
    return "\n".join(line.rstrip() for line in [*lines, *_extreme_lines(components)]) + "\n"


def _counts(figures: RankSummary) -> str:
    if figures.unranked == figures.count > 0:
        return f"{figures.count}, of kinds without a rank"
    text = f"{figures.count}, of which {figures.zero_count} left out (rank 0)"
    return f"{text} and {figures.unranked} of kinds without a rank" if figures.unranked else text


def _rank_lines(figures: RankSummary) -> list[str]:
    if figures.unranked == figures.count > 0:
        return []
    return [
        f"Rank         lowest {figures.rank_min}, median {figures.rank_median:g}, "
        f"mean {figures.rank_mean:.1f}, highest {figures.rank_max}",
    ]


def _kind_lines(components: Sequence[ComponentInfo], figures: RankSummary) -> list[str]:
    """Size by kind, where there is one without ranks."""
    if not figures.unranked:
        return []
    kinds: dict[str, list[ComponentInfo]] = {}
    for component in components:
        kinds.setdefault(component.kind, []).append(component)
    lines = ["", f"{'Kind':<18}{'count':>8}{'parameters':>14}{'MB':>10}"]
    for kind, some in kinds.items():
        numbers, size = sum(c.parameters for c in some), sum(c.nbytes for c in some) / 1e6
        lines.append(f"{kind:<18}{len(some):>8}{numbers:>14,}{size:>10.3f}")
    return lines


def _attention_lines(found: Sequence[tuple[str, int, ComponentInfo]]) -> list[str]:
    head = "".join(f"{name:>8}" for name in PROJECTIONS)
    lines = [f"{'':12}{BANDS[0]:^34}{BANDS[1]:^34}", f"{'block':<12}{head}  {head}"]
    for name in [*dict.fromkeys(name for name, *_ in found), "all"]:
        named = [(at, c) for group, at, c in found if name in (group, "all")]
        cells = [f"{mean_text([c for at, c in named if at == column]):>8}" for column in range(8)]
        lines.append(f"{fit_middle(name, 12):<12}{''.join(cells[:4])}  {''.join(cells[4:])}")
    return lines


def _extreme_lines(components: Sequence[ComponentInfo]) -> list[str]:
    ranked = [c for c in components if c.ranked]
    if len({c.rank for c in ranked}) <= 1:
        which = "Every component" + (" with a rank" if len(ranked) < len(components) else "")
        return ["", f"{which} has rank {ranked[0].rank}."] if ranked else []
    ordered = sorted(ranked, key=lambda c: -c.rank)  # stable: ties stay in the file's order
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
