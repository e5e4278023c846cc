"""Records of a run as numbers: by method, subject and seed; means, intervals and pairs.

Knows nothing of ComfyUI: it reads the JSON that :mod:`..runs.trial` wrote.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from scipy.stats import t as student_t

from . import archive

_GROUP = re.compile(r"(\d+)-subjects-")  # that share a LoRA
_WAY = re.compile(r"-(many|one|picture)-(told|untold)$")  # of seeing a subject
_SEEN = {"many": "many scenes", "one": "one scene", "picture": "one picture"}
_DRAWN, _PHOTOGRAPHS = "drawn subjects", "photographs"
_DRAWS = 1000  # of a permutation test
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One method on one subject with one seed."""

    subject: str
    method: str
    seed: int
    likeness: float  # over prompts; of two judges of one kind, as the demo's, the mean
    place: float | None  # probability of the place asked for, mean of judges
    thing: float | None
    text: float | None  # cosine of pictures with their prompts
    nbytes: int | None
    seconds: float | None
    peak_megabytes: float | None
    ranks: dict[str, int]  # of the file
    judges: dict[str, float] = field(default_factory=dict)  # "measure, judge" → mean
    learnt: dict[str, int] = field(default_factory=dict)  # ranks before a file is cut to its size

    @property
    def prompt(self) -> float | None:
        """How much the prompt is obeyed: what can be asked, on average."""
        told = [one for one in (self.place, self.thing, self.text) if one is not None]
        return statistics.fmean(told) if told else None


def read(source: Path) -> list[Result]:
    """All results of a run's folder or of an archive."""
    if source.is_file():
        return results_of(archive.read(source))
    return results_of(json.loads(file.read_text("utf-8")) for file in archive.files(source))


def results_of(records: Iterable[dict[str, Any]]) -> list[Result]:
    """Without those of runs that failed."""
    return [result(record) for record in records if "failed" not in record]


def result(record: dict[str, Any]) -> Result:
    """Of one record."""
    settings = record["settings"]

    def mean(key: str) -> float | None:
        told = [scores[key] for scores in record["scores"].values() if key in scores]
        return statistics.fmean(map(statistics.fmean, told)) if told else None

    likeness = mean("likeness")
    assert likeness is not None, "every judge compares"
    return Result(
        settings["subject"], settings["method"], settings["seed"], likeness, mean("place"),
        mean("object"), mean("text"), record.get("bytes"), record.get("seconds"),
        record.get("peak_megabytes"), record.get("ranks", {}),
        {
            f"{measure}, {judge}": statistics.fmean(values)
            for judge, told in record["scores"].items()
            for measure, values in told.items()
        },
        record.get("learnt", {}),
    )  # fmt: skip


def kinds_of(found: Sequence[Result]) -> dict[str, list[Result]]:
    """The results by kind of subject, in the order of columns."""
    kinds: dict[str, list[Result]] = {}
    for one in sorted(found, key=lambda one: one.thing is None):  # photographs are the last
        kinds.setdefault(_kind_of(one), []).append(one)
    if kinds.keys() < {_DRAWN, _PHOTOGRAPHS}:  # no need to tell one from the other
        return {"subjects": list(found)}
    return kinds


def _kind_of(one: Result) -> str:
    if group := _GROUP.match(one.subject):
        return f"groups of {group[1]}"
    if way := _WAY.search(one.subject):
        return f"subjects, {_SEEN[way[1]]}, place {way[2]}"
    return _PHOTOGRAPHS if one.thing is None else _DRAWN


Value = Callable[[Result], "float | None"]


def likeness(one: Result) -> float | None:
    return one.likeness


def prompt(one: Result) -> float | None:
    return one.prompt


MEASURES: tuple[tuple[Value, str], ...] = ((likeness, "Likeness"), (prompt, "Prompt score"))


def by_subject(results: Iterable[Result], method: str, value: Value) -> dict[str, float]:
    """subject → a value's mean over seeds; subjects that lack it are left out."""
    found: dict[str, list[float]] = {}
    for one in results:
        told = value(one) if one.method == method else None
        if told is not None:
            found.setdefault(one.subject, []).append(told)
    return {subject: statistics.fmean(values) for subject, values in found.items()}


@dataclass(frozen=True)
class Interval:
    """A mean over subjects, and where it would lie with other subjects of this kind."""

    mean: float
    low: float  # 2.5 %
    high: float  # 97.5 %


def interval(values: Sequence[float]) -> Interval:
    """Of a mean, by Student's t; without end for a single value. Raises ValueError for none."""
    if not values:
        raise ValueError("there is nothing to take the mean of; run a method first.")
    return jackknife(values, statistics.fmean)


def jackknife(subjects: Sequence[T], measure: Callable[[Sequence[T]], float]) -> Interval:
    """Of any smooth measure of subjects, by leaving out one at a time; of a mean it is Student's t.

    Few subjects are what there is: five bootstrapped give intervals a third too narrow.
    """
    count, found = len(subjects), measure(subjects)
    if count < 2:
        return Interval(found, -math.inf, math.inf)
    without = [measure([*subjects[:n], *subjects[n + 1 :]]) for n in range(count)]
    spread = (count - 1) / math.sqrt(count) * statistics.stdev(without)
    reach = float(student_t.ppf(0.975, count - 1)) * spread
    return Interval(found, found - reach, found + reach)


Runs = set[tuple[str, int]]  # (subject, seed)


def shared_runs(results: Iterable[Result], first: str, second: str) -> Runs:
    """The subjects and seeds that both methods have."""
    runs: dict[str, Runs] = {first: set(), second: set()}
    for one in results:
        if one.method in runs:
            runs[one.method].add((one.subject, one.seed))
    return runs[first] & runs[second]


def paired(results: Sequence[Result], first: str, second: str, value: Value) -> Interval | None:
    """By how much the second method is above the first, subject by subject, over the seeds that
    both have: the mean of three seeds scatters less than one. None without pairs."""
    runs = shared_runs(results, first, second)
    alike = [one for one in results if (one.subject, one.seed) in runs]
    one, two = (by_subject(alike, name, value) for name in (first, second))
    shared = [two[subject] - one[subject] for subject in one if subject in two]
    return interval(shared) if shared else None


@dataclass(frozen=True)
class Point:
    """A method in a picture of scores against bytes."""

    method: str
    nbytes: float
    likeness: float
    prompt: float | None


def points(results: Sequence[Result], methods: Iterable[str]) -> list[Point]:
    """Each method's means over subjects."""
    found: list[Point] = []
    for name in methods:
        sizes = by_subject(results, name, lambda one: one.nbytes)
        likeness = by_subject(results, name, lambda one: one.likeness)
        prompt = by_subject(results, name, lambda one: one.prompt)
        if sizes:
            obeyed = statistics.fmean(prompt.values()) if prompt else None
            mean = statistics.fmean
            found.append(Point(name, mean(sizes.values()), mean(likeness.values()), obeyed))
    return found


def complete(results: Sequence[Result], methods: Iterable[str], like: str) -> list[str]:
    """The methods that were run on every subject that ``like`` was: means of others do not compare,
    as subjects differ more than methods do."""
    subjects = {one.subject for one in results if one.method == like}
    run: dict[str, set[str]] = {}
    for one in results:
        run.setdefault(one.method, set()).add(one.subject)
    return [name for name in methods if name in run and subjects <= run[name]]


def front_at(front: Sequence[Point], nbytes: float, value: Callable[[Point], float]) -> float:
    """The best that these methods reach with at most so many bytes, between two by proportion.

    Between two sizes a straight line over the logarithm of bytes; below the smallest its value.
    """
    known = sorted(front, key=lambda point: point.nbytes)
    best: list[tuple[float, float]] = []
    for point in known:  # what a larger file does worse than a smaller one is no front
        reached = value(point)
        if best and reached < best[-1][1]:
            reached = best[-1][1]
        best.append((math.log(point.nbytes), reached))
    place = math.log(nbytes)
    if place <= best[0][0]:
        return best[0][1]
    for (left, low), (right, high) in itertools.pairwise(best):
        if place <= right:
            return low + (high - low) * (place - left) / (right - left)
    return best[-1][1]


@dataclass(frozen=True)
class RankTest:
    """Whether learnt ranks follow the subject."""

    within: float  # mean distance between seeds of a subject
    between: float  # mean distance between subjects
    chance: float  # of a difference as large if subjects did not matter


def rank_test(results: Sequence[Result], method: str, seed: int = 0) -> RankTest | None:
    """A permutation test of learnt ranks; None without two subjects and two seeds.

    The distance of two runs is the mean over components of |log2 rank − log2 rank|; runs change
    subjects at random.
    """
    told = [one for one in results if one.method == method and one.learnt]
    pairs = list(itertools.combinations(range(len(told)), 2))
    distances = [_distance(told[one].learnt, told[other].learnt) for one, other in pairs]
    names = [one.subject for one in told]

    def split(names: Sequence[str]) -> tuple[float, float] | None:
        within, between = [], []
        for (one, other), distance in zip(pairs, distances, strict=True):
            (within if names[one] == names[other] else between).append(distance)
        return (statistics.fmean(within), statistics.fmean(between)) if within and between else None

    if (found := split(names)) is None:
        return None
    rng, as_large = random.Random(seed), 1
    for _ in range(_DRAWS):
        drawn = split(rng.sample(names, len(names)))
        assert drawn is not None, "the same subjects as often"
        as_large += drawn[1] - drawn[0] >= found[1] - found[0]
    return RankTest(*found, as_large / (_DRAWS + 1))


def _distance(one: dict[str, int], other: dict[str, int]) -> float:
    keys = one.keys() | other.keys()
    return statistics.fmean(
        abs(math.log2(max(1, one.get(key, 0))) - math.log2(max(1, other.get(key, 0))))
        for key in keys
    )
