"""What the numbers say, also where we lose: a row a comparison, drawings and photographs apart.

Every gap is taken subject by subject, over the seeds that both methods have, and has a 95 %
interval by Student's t over subjects. A score is *better* where the interval is above zero,
*worse* where it is below, and else *level*. Of two scores one better and none worse holds, one
worse and none better fails; one of each is a trade, and none of either cannot be told: both are
open. Means of the two kinds of subjects are never taken together: how many there are of each is
an accident.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..methods import IN_RANKS, KEPT, OURS, SMALLER, Method, uniform
from ..records import results
from ..records.results import Interval, Point, Result, Value, likeness, prompt

Verdict = Literal["holds", "open", "fails"]
_RANK_MATTERS = "fixed-2"  # has to be worse than the largest, or ranks cannot be told apart here


@dataclass(frozen=True)
class Cell:
    """One comparison on one kind of subjects."""

    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Row:
    """One comparison; a cell of each kind, None where it was not made."""

    about: str
    cells: tuple[Cell | None, ...]


def heads(found: Sequence[Result]) -> list[str]:
    """Of the columns: what the numbers of each kind rest on."""
    told: list[str] = []
    for kind, group in results.kinds_of(found).items():
        ours = [one for one in group if one.method == OURS]
        subjects, seeds = len({one.subject for one in ours}), len({one.seed for one in ours})
        told.append(f"{subjects} {kind}, {seeds} seed{'s' * (seeds != 1)} each")
    return told


def calibrated(found: Sequence[Result]) -> list[Result]:
    """The results at calibrated strength, each by the name of the method that was weakened."""
    return [
        replace(one, method=one.method.removesuffix(KEPT))
        for one in found
        if one.method.endswith(KEPT)
    ]


def rows(found: Sequence[Result], methods: Mapping[str, Method]) -> list[Row]:
    """All that can be said of these results; what lacks a method is left out."""
    run = {one.method for one in found}
    fixed = [name for name in methods if name in run and methods[name].plain]
    if OURS not in run or not fixed:
        return []
    groups = list(results.kinds_of(found).values())
    said = [_front(groups, fixed), _against(found, groups, fixed[-1], OURS, methods)]
    for name, method in methods.items():
        alike = name in (IN_RANKS, uniform(methods))
        if name in run and (method.rival or alike):
            said.append(_against(found, groups, name, OURS, methods))
            if SMALLER in run and name == methods[SMALLER].to:
                said.append(_against(found, groups, name, SMALLER, methods))
    said += [*_ablation(groups), _ranks_follow(groups)]
    if _RANK_MATTERS in fixed[:-1]:
        said.append(_ranks_matter(groups, fixed[-1], methods))
    return [row for row in said if any(row.cells)]


def way(gap: Interval) -> Literal["better", "worse", "level"]:
    return "better" if gap.low > 0 else "worse" if gap.high < 0 else "level"


def judged(*gaps: Interval | None) -> Verdict:
    """Of scores that a method may trade for each other; None of one that nobody took."""
    ways = {way(gap) for gap in gaps if gap is not None}
    if {"better", "worse"} <= ways:
        return "open"
    return "fails" if "worse" in ways else "holds" if "better" in ways else "open"


def _cell(liked: Interval | None, asked: Interval | None, more: str = "") -> Cell | None:
    if liked is None:
        return None
    text = f"likeness {signed(liked)}"
    if asked is not None:
        text += f", prompt {signed(asked)}"
    trade = {"better", "worse"} <= {way(gap) for gap in (liked, asked) if gap is not None}
    return Cell(judged(liked, asked), text + "; a trade" * trade + more)


def _against(
    found: Sequence[Result],
    groups: Sequence[Sequence[Result]],
    name: str,
    ours: str,
    methods: Mapping[str, Method],
) -> Row:
    """``ours`` beside another method."""
    (point,) = results.points(found, [name])
    cut = ", ours cut to its bytes" if ours == SMALLER else ""
    about = f"{methods[name].label} ({point.nbytes / 1e6:.2f} MB{_memory(found, name)}{cut})"
    cells: list[Cell | None] = []
    for group in groups:
        liked, asked = (results.paired(group, name, ours, one) for one in (likeness, prompt))
        cells.append(_cell(liked, asked, _fewer(group, name, ours)))
    return Row(about, tuple(cells))


def _fewer(group: Sequence[Result], name: str, ours: str) -> str:
    """Said where fewer seeds or subjects are shared than there are of ours."""
    shared = results.shared_runs(group, name, ours)
    mine = {(one.subject, one.seed) for one in group if one.method == ours}
    subjects = [len({subject for subject, _ in runs}) for runs in (shared, mine)]
    seeds = [len({seed for _, seed in runs}) for runs in (shared, mine)]
    told = f"; {subjects[0]} subjects" if subjects[0] < subjects[1] else ""
    return told + (f"; {seeds[0]} seed{'s' * (seeds[0] != 1)}" if seeds[0] < seeds[1] else "")


def _memory(found: Sequence[Result], name: str) -> str:
    """How much more or less the training took than ours, where both were measured."""
    sizes = [results.by_subject(found, one, lambda run: run.peak_megabytes) for one in (name, OURS)]
    shared = [subject for subject in sizes[0] if sizes[1].get(subject, 0) > 0]
    if not shared:
        return ""
    theirs, ours = (statistics.fmean(table[subject] for subject in shared) for table in sizes)
    return f", {theirs / ours:.2f} × the memory to train"


def _front(groups: Sequence[Sequence[Result]], fixed: Sequence[str]) -> Row:
    cells = [
        _cell(*(above_front(group, fixed, one) for one in (likeness, prompt))) for group in groups
    ]
    return Row("LoRA of one rank in the same bytes, between two ranks by proportion", tuple(cells))


def above_front(found: Sequence[Result], fixed: Sequence[str], value: Value) -> Interval | None:
    """By how much ``balanced`` is above the front of fixed ranks at its own bytes."""
    tables = {name: results.by_subject(found, name, value) for name in (OURS, *fixed)}
    sizes = {
        name: results.by_subject(found, name, lambda one: one.nbytes) for name in (OURS, *fixed)
    }
    subjects = [one for one in tables[OURS] if all(one in table for table in tables.values())]
    if not subjects:
        return None

    def gap(chosen: Sequence[str]) -> float:
        def mean(table: Mapping[str, float]) -> float:
            return statistics.fmean(table[subject] for subject in chosen)

        front = [Point(name, mean(sizes[name]), mean(tables[name]), None) for name in fixed]
        reached = results.front_at(front, mean(sizes[OURS]), lambda point: point.likeness)
        return mean(tables[OURS]) - reached

    return results.jackknife(subjects, gap)


def _ablation(groups: Sequence[Sequence[Result]]) -> list[Row]:
    """Table 1, of the budget in ranks: one in bytes would hold the file where it is."""
    sized: list[Cell | None] = []
    obeyed: list[Cell | None] = []
    for group in groups:
        grown = results.paired(group, IN_RANKS, "balanced-no-rank", lambda one: one.nbytes)
        gap = results.paired(group, "balanced-no-entropy", IN_RANKS, prompt)
        text = f"{grown.mean / 1e6:+.2f} MB ({_range(grown, 1e6, 2)})" if grown else ""
        sized.append(Cell(judged(grown), text) if grown else None)
        obeyed.append(Cell(judged(gap), f"prompt {signed(gap, 4)}") if gap else None)
    return [
        Row("Without the rank term files grow (the paper: they do)", tuple(sized)),
        Row("With the entropy term prompts are obeyed better (the paper: they are)", tuple(obeyed)),
    ]


def _ranks_follow(groups: Sequence[Sequence[Result]]) -> Row:
    """Whether learnt ranks are those of a subject."""
    cells: list[Cell | None] = []
    for group in groups:
        test = results.rank_test(group, OURS)
        if test is None:
            cells.append(None)
            continue
        far = test.between > test.within
        told: Verdict = "holds" if far and test.chance < 0.05 else "open" if far else "fails"
        text = f"{test.between:.3f} and {test.within:.3f} octaves (chance: p = {test.chance:.3f})"
        cells.append(Cell(told, text))
    about = "Learnt ranks of two subjects lie farther apart than those of two seeds of one"
    return Row(about, tuple(cells))


def _ranks_matter(
    groups: Sequence[Sequence[Result]], largest: str, methods: Mapping[str, Method]
) -> Row:
    """Whether the bench can tell ranks apart at all."""
    cells: list[Cell | None] = []
    for group in groups:
        gap = results.paired(group, _RANK_MATTERS, largest, likeness)
        if gap is None:
            cells.append(None)
            continue
        told: Verdict = "holds" if way(gap) == "better" else "fails"
        cells.append(Cell(told, f"likeness {signed(gap)}"))
    names = methods[largest].label, methods[_RANK_MATTERS].label
    return Row(
        f"Ranks can be told apart: {names[0]} is nearer to the subject than {names[1]}",
        tuple(cells),
    )


def signed(gap: Interval, digits: int = 3) -> str:
    """``+0.012 (-0.004 to +0.030)``."""
    return f"{gap.mean:+.{digits}f} ({_range(gap, 1, digits)})"


def _range(gap: Interval, unit: float, digits: int) -> str:
    if math.isinf(gap.low):
        return "one subject"
    return f"{gap.low / unit:+.{digits}f} to {gap.high / unit:+.{digits}f}"
