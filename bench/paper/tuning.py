"""Every method at its own best learning rate, all tried at the same ones on one subject.

That subject is in no table. A method's rate is the one with the highest sum of likeness and of how
much prompts are obeyed. What only differs from another method by a term of the loss takes its rate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...tools.tiny_sdxl.figures import write_json
from . import results
from .bases import Base
from .methods import Method
from .subjects import Study
from .trial import Bench, Work

FILE = Path(__file__).parent / "rates.json"
_SHARED = "balanced-"  # begins the names of those that take the rate of `balanced`


def tried(methods: Mapping[str, Method]) -> list[str]:
    """The methods that are tuned."""
    return [name for name, one in methods.items() if one.trained and not name.startswith(_SHARED)]


def works(study: Study, names: Sequence[str] | Mapping[str, Method], base: Base) -> list[Work]:
    return [Work(study, name, 0, rate) for name in names for rate in base.rates]


def keep(bench: Bench, done: Sequence[Work]) -> None:
    """Write the best rate of each method beside this file, with what all of them reached."""
    known = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
    mine = known.setdefault(bench.base.name, {})
    for name in dict.fromkeys(work.name for work in done):
        reached: dict[str, list[float]] = {}
        for work in done:
            record = bench.found(work)
            if work.name == name and record is not None:
                one = results.result(record)
                reached[f"{work.rate:g}"] = [round(one.likeness, 4), round(one.prompt or 0, 4)]
        best = max(reached, key=lambda rate: sum(reached[rate]))
        mine[name] = {"rate": float(best), "tried": reached}
    write_json(FILE, known)


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
