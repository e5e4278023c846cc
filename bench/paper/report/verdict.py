"""What the numbers say, in plain sentences, also where we lose.

Every sentence has a verdict by one rule, on the mean over subjects and its 95 % interval:
"beats" holds when the interval is above zero; "no worse" when the mean is, or when the interval
lies above a hair's breadth below zero. An interval wholly on the wrong side fails; all else is
open. Beside another method likeness and prompt score both count: one won and one lost is open.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..methods import IN_RANKS, OURS, SMALLER, Method
from ..records import results
from ..records.results import Interval, Point, Result, Value, likeness, prompt

Verdict = Literal["holds", "open", "fails"]
HAIR = 0.01  # of a score: closer is a tie
SHARE_KEPT = 0.97  # of the largest rank's likeness, at a seventh of its bytes


@dataclass(frozen=True)
class Claim:
    """A sentence with its numbers."""

    verdict: Verdict
    sentence: str


def claims(found: Sequence[Result], methods: Mapping[str, Method]) -> list[Claim]:
    """All that can be said of these results; what lacks a method is left out."""
    run = {one.method for one in found}
    every = results.complete(found, methods, OURS)
    fixed = [name for name in every if methods[name].mode == "fixed"]
    if OURS not in run or not fixed:
        return []
    said = [*_front(found, fixed), *_largest(found, fixed[-1], methods)]
    for name, method in methods.items():
        if name in run and (method.rival or name == IN_RANKS):
            said.append(_against(found, name, method, must_beat=name == "adalora"))
            if SMALLER in run and name == methods[SMALLER].to:
                said.append(_at_its_bytes(found, name, method))
                said += _by_kind(found, name, SMALLER, method.label)
    return said + _ablation(found) + _ranks(found, methods)


def beats(gap: Interval) -> Verdict:
    return "holds" if gap.low > 0 else "fails" if gap.high < 0 else "open"


def no_worse(gap: Interval) -> Verdict:
    if gap.mean >= 0 or gap.low > -HAIR:
        return "holds"
    return "fails" if gap.high < 0 else "open"


def both(likeness: Verdict, prompt: Verdict) -> Verdict:
    """Of two scores that a method may trade for each other."""
    if {likeness, prompt} == {"holds", "fails"}:
        return "open"
    return next(one for one in ("fails", "open", "holds") if one in (likeness, prompt))


def extent(found: Sequence[Result]) -> str:
    """What the sentences rest on."""
    ours = [one for one in found if one.method == OURS]
    subjects, seeds = ({one.subject for one in ours}, {one.seed for one in ours})
    return f"{len(subjects)} subjects, seeds of each: {len(seeds)}"


def _front(found: Sequence[Result], fixed: Sequence[str]) -> list[Claim]:
    said: list[Claim] = []
    for value, what in ((likeness, "likeness"), (prompt, "prompt score")):
        gap = above_front(found, fixed, value)
        if gap is not None:
            sentence = f"Beside fixed ranks of the same bytes its {what} is {signed(gap)}."
            said.append(Claim(no_worse(gap), sentence))
    ours, *others = results.points(found, [OURS, *fixed])
    better = [one.method for one in others if _dominates(one, ours)]
    sentence = (
        f"No fixed rank is as small, as like and as obedient at once ({OURS}: {_of(ours)})."
        if not better
        else f"{', '.join(better)} is as small, as like and as obedient at once."
    )
    return [*said, Claim("fails" if better else "holds", sentence)]


def _dominates(one: Point, other: Point) -> bool:
    prompts = one.prompt is None or other.prompt is None or one.prompt >= other.prompt
    return one.nbytes <= other.nbytes and one.likeness >= other.likeness and prompts


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

    return results.bootstrap(subjects, gap)


def _largest(found: Sequence[Result], largest: str, methods: Mapping[str, Method]) -> list[Claim]:
    ours, other = results.points(found, [OURS, largest])
    tables = [results.by_subject(found, name, likeness) for name in (OURS, largest)]
    subjects = [one for one in tables[0] if one in tables[1]]
    if not subjects:
        return []

    def share(chosen: Sequence[str]) -> float:
        sums = [sum(table[subject] for subject in chosen) for table in tables]
        return sums[0] / sums[1]

    kept = results.bootstrap(subjects, share)
    label = methods[largest].label
    sentence = (
        f"At 1/{other.nbytes / ours.nbytes:.1f} of the bytes of {label} it keeps "
        f"{kept.mean:.1%} of its likeness ({kept.low:.1%} to {kept.high:.1%}; "
        f"asked for: {SHARE_KEPT:.0%})."
    )
    ok = kept.mean >= SHARE_KEPT
    said = [Claim("holds" if ok else "fails" if kept.high < SHARE_KEPT else "open", sentence)]
    gap = results.paired(found, largest, OURS, prompt)
    if gap is not None:
        said.append(Claim(no_worse(gap), f"Its prompt score beside {label} is {signed(gap)}."))
    return said + _by_kind(found, largest, OURS, label)


def _by_kind(found: Sequence[Result], name: str, ours: str, label: str) -> list[Claim]:
    """The same of drawn subjects and of photographs alone: a base of drawings knows one kind."""
    kinds = {
        "drawn subjects": [one for one in found if one.thing is not None],
        "photographs": [one for one in found if one.thing is None],
    }
    shared = {
        kind: results.by_subject(group, ours, likeness).keys()
        & results.by_subject(group, name, likeness).keys()
        for kind, group in kinds.items()
    }
    if not all(shared.values()):  # of one kind, or of the other not yet
        return []
    sized = ", cut to its bytes" if ours == SMALLER else ""
    said: list[Claim] = []
    for kind, group in kinds.items():
        gap, asked, told = _gaps(group, name, ours)
        sentence = f"On the {len(shared[kind])} {kind} alone, beside {label}{sized}, {told}."
        said.append(Claim(both(no_worse(gap), asked), sentence))
    return said


def _against(found: Sequence[Result], name: str, method: Method, must_beat: bool) -> Claim:
    gap, asked, told = _gaps(found, name, OURS)
    about = _of(*results.points(found, [name])) + _memory(found, name)
    told = f"Beside {method.label} ({about}) {told}"
    if not results.complete(found, [name], OURS):
        told += f"; on {len(results.by_subject(found, name, likeness))} subjects only"
    told += _fewer_seeds(found, name)
    return Claim(both(beats(gap) if must_beat else no_worse(gap), asked), f"{told}.")


def _fewer_seeds(found: Sequence[Result], name: str) -> str:
    """Said where a method was run with fewer seeds than ours."""
    theirs, ours = (len({one.seed for one in found if one.method == who}) for who in (name, OURS))
    return f"; seeds of it: {theirs}" if theirs < ours else ""


def _memory(found: Sequence[Result], name: str) -> str:
    """How much more or less the training took than ours, where both were measured."""
    sizes = [results.by_subject(found, one, lambda run: run.peak_megabytes) for one in (name, OURS)]
    shared = [subject for subject in sizes[0] if sizes[1].get(subject, 0) > 0]
    if not shared:
        return ""
    theirs, ours = (statistics.fmean(table[subject] for subject in shared) for table in sizes)
    return f", {theirs / ours:.2f} times the memory to train"


def _at_its_bytes(found: Sequence[Result], name: str, method: Method) -> Claim:
    gap, asked, told = _gaps(found, name, SMALLER)
    (point,) = results.points(found, [SMALLER])
    sentence = f"Cut to the bytes of {method.label} ({_of(point)}) {told}."
    return Claim(both(beats(gap), asked), sentence)


def _gaps(found: Sequence[Result], name: str, ours: str) -> tuple[Interval, Verdict, str]:
    """By how much ``ours`` is above a method in likeness; whether its prompt score is no worse;
    both in words."""
    gap, asked = (results.paired(found, name, ours, value) for value in (likeness, prompt))
    assert gap is not None, "both were run on the same subjects"
    told = f"its likeness is {signed(gap)}"
    if asked is None:
        return gap, "holds", told
    return gap, no_worse(asked), f"{told}, its prompt score {signed(asked)}"


def _ablation(found: Sequence[Result]) -> list[Claim]:
    """Table 1, of the budget in ranks: one in bytes would hold the file where it is."""
    said: list[Claim] = []
    growth = results.paired(found, IN_RANKS, "balanced-no-rank", lambda one: one.nbytes)
    if growth is not None:
        sizes = [point.nbytes for point in results.points(found, [IN_RANKS, "balanced-no-rank"])]
        sentence = (
            f"Without the rank term the file takes {sizes[1] / sizes[0]:.2f} times the bytes "
            f"(the paper: it grows{_fewer_seeds(found, 'balanced-no-rank')})."
        )
        said.append(Claim(beats(growth), sentence))
    gap = results.paired(found, "balanced-no-entropy", IN_RANKS, prompt)
    if gap is not None:
        sentence = (
            f"With the entropy term the prompt score is {signed(gap, 4)} beside without "
            f"(the paper: higher{_fewer_seeds(found, 'balanced-no-entropy')})."
        )
        said.append(Claim(beats(gap), sentence))
    return said


def _ranks(found: Sequence[Result], methods: Mapping[str, Method]) -> list[Claim]:
    said: list[Claim] = []
    for name in (OURS, IN_RANKS):
        test = results.rank_test(found, name)
        if test is None:
            continue
        whose = "" if name == OURS else f" of {methods[name].label}"
        sentence = (
            f"Learnt ranks{whose} of two subjects lie {test.between:.3f} octaves apart, those of "
            f"two seeds of a subject {test.within:.3f} (chance: p = {test.chance:.3f})."
        )
        further = test.between > test.within
        verdict = "holds" if further and test.chance < 0.05 else "open" if further else "fails"
        said.append(Claim(verdict, sentence))
    return said


def _of(point: Point) -> str:
    told = f"{point.nbytes / 1e6:.2f} MB, likeness {point.likeness:.3f}"
    return told + (f", prompt {point.prompt:.3f}" if point.prompt is not None else "")


def signed(gap: Interval, digits: int = 3) -> str:
    """``0.012 higher (-0.004 to 0.030)``."""
    way = "higher" if gap.mean >= 0 else "lower"
    return f"{abs(gap.mean):.{digits}f} {way} ({gap.low:+.{digits}f} to {gap.high:+.{digits}f})"
