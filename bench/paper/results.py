"""Records of a run as numbers: by method, subject and seed; means, intervals and pairs.

Knows nothing of ComfyUI or torch: it reads the JSON that :mod:`.trial` wrote.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DRAWS = 2000  # of a bootstrap


@dataclass(frozen=True)
class Result:
    """One method on one subject with one seed."""

    subject: str
    method: str
    seed: int
    likeness: float  # mean of judges, over prompts
    place: float | None  # probability of the place asked for, mean of judges
    thing: float | None
    nbytes: int | None
    seconds: float | None
    peak_megabytes: float | None
    ranks: dict[str, int]

    @property
    def prompt(self) -> float | None:
        """How much the prompt is obeyed: what can be asked, on average."""
        told = [value for value in (self.place, self.thing) if value is not None]
        return statistics.fmean(told) if told else None


def read(folder: Path) -> list[Result]:
    """All records of a run, whatever their order on the disk."""
    files = sorted((folder / "records").glob("*/*.json"))
    return [_result(json.loads(file.read_text("utf-8"))) for file in files]


def _result(record: dict[str, Any]) -> Result:
    settings = record["settings"]

    def mean(key: str) -> float | None:
        told = [scores[key] for scores in record["scores"].values() if key in scores]
        return statistics.fmean(map(statistics.fmean, told)) if told else None

    likeness = mean("likeness")
    assert likeness is not None, "every judge compares"
    return Result(
        settings["subject"], settings["method"], settings["seed"], likeness, mean("place"),
        mean("object"), record.get("bytes"), record.get("seconds"),
        record.get("peak_megabytes"), record.get("ranks", {}),
    )  # fmt: skip


Value = Callable[[Result], "float | None"]


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


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Of a mean, by drawing subjects with replacement. Raises ValueError for no value."""
    if not values:
        raise ValueError("there is nothing to take the mean of; run a method first.")
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(_DRAWS))
    return Interval(statistics.fmean(values), means[_DRAWS // 40], means[-_DRAWS // 40 - 1])


def paired(results: Sequence[Result], first: str, second: str, value: Value) -> Interval | None:
    """By how much the second method is above the first, subject by subject; None without pairs."""
    one, two = (by_subject(results, name, value) for name in (first, second))
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


def rank_distances(results: Sequence[Result], method: str) -> tuple[float, float]:
    """How far learnt ranks lie apart: (between seeds of a subject, between subjects).

    The mean over pairs of the mean over components of |log2 rank − log2 rank|.
    """
    told = [one for one in results if one.method == method and one.ranks]
    within, between = [], []
    for index, one in enumerate(told):
        for other in told[index + 1 :]:
            if one.subject == other.subject:
                within.append(_distance(one.ranks, other.ranks))
            elif one.seed == other.seed:
                between.append(_distance(one.ranks, other.ranks))
    if not within or not between:
        raise ValueError(f"{method} needs two subjects and two seeds to compare ranks.")
    return statistics.fmean(within), statistics.fmean(between)


def _distance(one: dict[str, int], other: dict[str, int]) -> float:
    keys = one.keys() | other.keys()
    return statistics.fmean(
        abs(math.log2(max(1, one.get(key, 0))) - math.log2(max(1, other.get(key, 0))))
        for key in keys
    )
