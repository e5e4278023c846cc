"""Every method at its own best learning rate, all tried alike on subjects that are in no table.

Each is tried at the base's usual rates on one subject, and at the better two of these on all. Its
rate is the one with the highest sum of likeness and prompt score, over subjects. What lacks a term
of the loss takes the rate of the same with all terms, and given ranks that of uniform ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ....tools.tiny_sdxl.evaluation.figures import write_json
from ..bases.protocol import Base
from ..methods import IN_RANKS, OURS, Method, uniform
from ..records import results
from ..subjects.study import Study
from .trial import Bench, Work

FILE = Path(__file__).parent.parent / "rates.json"
_FURTHER = 2  # rates that all subjects see


def tried(methods: Mapping[str, Method]) -> list[str]:
    """The methods that are tuned."""
    return [
        name for name, one in methods.items()
        if one.trained and not one.gives and (name in (OURS, IN_RANKS) or not name.startswith(OURS))
    ]  # fmt: skip


def first(studies: Sequence[Study], names: Iterable[str], rates: Sequence[float]) -> list[Work]:
    """All rates on one subject."""
    return [Work(studies[0], name, 0, rate) for name in names for rate in rates]


def second(bench: Bench, studies: Sequence[Study], names: Iterable[str]) -> list[Work]:
    """The better half of what was tried on the first subject, on the others."""
    found: list[Work] = []
    for name in names:
        tried = _tried(bench, studies[0], name)
        good = {rate: sum(one) for rate, one in tried.items() if not isinstance(one, str)}
        best = sorted(good, key=lambda rate: -good[rate])[:_FURTHER]
        found += [Work(study, name, 0, rate) for rate in best for study in studies[1:]]
    return found


def keep(bench: Bench, studies: Sequence[Study], names: Iterable[str]) -> None:
    """Write the best rate of each method, with what all of them reached."""
    known = _known()
    mine = known.setdefault(bench.tuned_as, {})
    for name in names:
        tried = {study.name: _tried(bench, study, name) for study in studies}
        every = list(tried.values())
        shared = [rate for rate in every[0] if all(rate in one for one in every)]
        sums = {rate: _sum([one[rate] for one in every]) for rate in shared}
        if sums:
            shown = {
                study: {f"{rate:g}": reached[rate] for rate in sorted(reached)}
                for study, reached in tried.items()
            }
            mine[name] = {"rate": max(sums, key=lambda rate: sums[rate]), "tried": shown}
    write_json(FILE, known)


def _sum(reached: Sequence[list[float] | str]) -> float:
    return sum(-1.0 if isinstance(one, str) else sum(one) for one in reached)


def _tried(bench: Bench, study: Study, name: str) -> dict[float, list[float] | str]:
    """Learning rate → likeness and prompt score, or what became of it."""
    found: dict[float, list[float] | str] = {}
    for file in bench.folder.glob(f"records/{study.name}/{name}-*-0.json"):
        record = json.loads(file.read_text("utf-8"))
        rate = record["settings"]["rate"]
        if bench.is_of(record, Work(study, name, 0, rate)):
            found[rate] = _reached(record)
    return found


def _reached(record: dict[str, Any]) -> list[float] | str:
    """Likeness and prompt score."""
    if "failed" in record:
        return "diverged"
    one = results.result(record)
    return [round(one.likeness, 4), round(one.prompt or 0, 4)]


def _known() -> dict[str, Any]:
    """Base, and task where it is not the usual one → method → what :func:`keep` wrote of it."""
    return json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}


def rates(base: Base, tuned_as: str, known: Mapping[str, Method]) -> dict[str, float]:
    """The rate of each method that trains: the chosen one, or else the base's usual one."""
    mine = _known().get(tuned_as, {})
    tuned = [name for name in tried(known) if name in mine]
    usual = sorted(base.rates)[len(base.rates) // 2]
    found: dict[str, float] = {}
    for name, method in known.items():
        if method.trained:
            # A variant of a sweep has no rate of its own either.
            others = uniform(known) if method.gives else IN_RANKS
            asked = [one for one in (name, others, OURS) if one in tuned]
            found[name] = mine[asked[0]]["rate"] if asked else usual
    return found
