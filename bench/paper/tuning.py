"""Every method at its own best learning rate, all tried at the same ones on one subject.

That subject is in no table. A method's rate is the one with the highest sum of likeness and of how
much prompts are obeyed. What only differs from another method by a term of the loss takes its rate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...tools.tiny_sdxl.figures import write_json
from . import results
from .methods import Method
from .subjects import Study
from .trial import Bench, Work

FILE = Path(__file__).parent / "rates.json"
_SHARED = "balanced-"  # begins the names of those that take the rate of `balanced`


def tried(methods: Mapping[str, Method]) -> list[str]:
    """The methods that are tuned."""
    return [name for name, one in methods.items() if one.trained and not name.startswith(_SHARED)]


def works(study: Study, names: Iterable[str], rates: Sequence[float]) -> list[Work]:
    return [Work(study, name, 0, rate) for name in names for rate in rates]


def keep(bench: Bench, study: Study, names: Iterable[str]) -> None:
    """Write the best rate of each method beside this file, with what all of them reached."""
    known = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
    mine = known.setdefault(bench.base.name, {})
    for name in names:
        reached: dict[float, list[float] | str] = {}
        for file in bench.folder.glob(f"records/{study.name}/{name}-*-0.json"):
            record = json.loads(file.read_text("utf-8"))
            told = record["settings"]
            if told["method"] == name and bench.found(Work(study, name, 0, told["rate"])):
                reached[told["rate"]] = _reached(record)
        good = {rate: sum(one) for rate, one in reached.items() if not isinstance(one, str)}
        if good:
            tried = {f"{rate:g}": reached[rate] for rate in sorted(reached)}
            mine[name] = {"rate": max(good, key=lambda rate: good[rate]), "tried": tried}
    write_json(FILE, known)


def _reached(record: dict[str, Any]) -> list[float] | str:
    """Likeness and prompt score."""
    if "failed" in record:
        return "diverged"
    one = results.result(record)
    return [round(one.likeness, 4), round(one.prompt or 0, 4)]


def rates(bench: Bench) -> dict[str, float]:
    """The rate of each method that trains: the chosen one, or else the base's usual one."""
    known = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
    mine = known.get(bench.base.name, {})
    usual = sorted(bench.base.rates)[len(bench.base.rates) // 2]
    found: dict[str, float] = {}
    for name, method in bench.methods.items():
        if method.trained:
            # A variant of a sweep has no rate of its own either.
            asked = name if name in tried(bench.methods) and name in mine else "balanced"
            found[name] = mine.get(asked, {}).get("rate", usual)
    return found
