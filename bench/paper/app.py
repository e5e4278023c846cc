"""The command: train, paint and judge what is wanted and not there yet."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ...tools.tiny_sdxl.evaluation import load_parts
from ...tools.tiny_sdxl.personalising import fingerprint
from . import methods, plan, subjects
from .trial import BASE, OWN, Bench


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    return tune(options) if options.tune else run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="records, pictures and files")
    parser.add_argument("--methods", default="", help="names with commas; all if left out")
    parser.add_argument("--subjects", default="", help="names with commas; all if left out")
    parser.add_argument("--seeds", type=int, default=3, help="how many, 3 if left out")
    parser.add_argument("--quick", action="store_true", help="3 subjects, 4 methods, 1 seed")
    parser.add_argument("--tune", action="store_true", help="try learning rates on one subject")
    parser.add_argument("--minutes", type=float, help="begin nothing new after that long")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def _bench(options: argparse.Namespace) -> Bench:
    parts = load_parts()
    width = 64  # of the demo's narrowest attention
    much = plan.QUICK if options.quick else plan.Plan()
    known = methods.methods_for(width)
    return Bench(parts, fingerprint(parts), options.out, much, known)


def _chosen(wanted: str, known: list[str], what: str) -> list[str]:
    names = [name.strip() for name in wanted.split(",") if name.strip()] or known
    for name in names:
        if name not in known:
            sys.exit(f"{name} is no {what}; choose among {', '.join(known)}.")
    return [name for name in known if name in names]  # in the order of tables


def tune(options: argparse.Namespace) -> int:
    """Try every rate with every method that trains, on the subject that is in no table."""
    bench = _bench(options)
    study = subjects.tuning_of_demo(bench.plan.prompts)
    trained = [name for name, method in bench.methods.items() if method.trained]
    until = _until(options)
    for name in _chosen(options.methods, trained, "method that trains"):
        for rate in plan.RATES:
            if time.monotonic() > until:
                return 3
            started = time.monotonic()
            record = bench.record(study, name, 0, rate)
            _say(study.name, f"{name} at {rate:g}", record, time.monotonic() - started)
    return 0


def run(options: argparse.Namespace) -> int:
    """Everything that is wanted and not there yet; 3 when the time was over before."""
    bench = _bench(options)
    studies = {study.name: study for study in subjects.of_demo(bench.plan.prompts)}
    names = _chosen(options.methods, list(bench.methods), "method")
    chosen = _chosen(options.subjects, list(studies), "subject")
    seeds = options.seeds
    if options.quick:
        names, chosen, seeds = [n for n in names if n in methods.QUICK], chosen[:3], 1
    rates, until = _rates(), _until(options)
    for seed in range(seeds):
        for subject in chosen:
            study = studies[subject]
            for name in (BASE, *([OWN] if study.own else []), *names):
                if time.monotonic() > until:
                    return 3
                if seed and name in (BASE, OWN):
                    continue  # they know no training
                method = bench.methods.get(name)
                rate = rates.get(name, method.rate) if method and method.trained else None
                started = time.monotonic()
                record = bench.record(study, name, seed, rate)
                _say(subject, f"{name}, seed {seed}", record, time.monotonic() - started)
    return 0


def _rates() -> dict[str, float]:
    """The rates that tuning chose; see docs/method.md."""
    file = Path(__file__).parent / "rates.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _until(options: argparse.Namespace) -> float:
    return time.monotonic() + 60 * options.minutes if options.minutes else float("inf")


def _say(subject: str, what: str, record: dict[str, Any], seconds: float) -> None:
    told = {
        key: statistics.fmean(
            statistics.fmean(judge[key]) for judge in record["scores"].values() if key in judge
        )
        for key in ("likeness", "place", "object")
        if all(key in judge for judge in record["scores"].values())
    }
    figures = ", ".join(f"{key} {value:.3f}" for key, value in told.items())
    size = f", {record['bytes'] / 1e6:.2f} MB" if "bytes" in record else ""
    print(f"{subject}: {what}: {figures}{size} ({seconds:.0f} s)", flush=True)
