"""The command: train, paint and judge what is wanted and not there yet."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...lora2_core.reports import vision
from ...tools.tiny_sdxl.evaluation.figures import write_json
from . import floor, methods, painted, plan
from .bases import seeded
from .bases.checkpoint import Checkpoint
from .bases.demo import Demo
from .bases.protocol import Base
from .methods import BASE, OWN, Method
from .records import archive, results
from .report import page
from .runs import sweep, tuning, working
from .runs.trial import Bench, Work
from .subjects import dreambooth, table_a1, tasks
from .subjects.study import Study

_START = Path(__file__).parent / "__main__.py"


def main() -> int:
    options = _parser().parse_args()
    if not options.worker:  # whoever ends it wants to keep what is done
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.archive and options.archive.is_file() and not options.worker:
        archive.unpack(options.archive, options.out)
    try:
        several = options.processes > 1 and not (options.report or options.floor)
        code = _in_processes(options) if several else _alone(options)
    finally:
        if options.archive and not options.worker:
            archive.write(options.out, options.archive)
    return code


def _alone(options: argparse.Namespace) -> int:
    """Do the work in this process; 3 when the time was over before the end."""
    torch.set_num_threads(options.threads)
    if options.floor:
        return _floor(options.out / "floor.json")
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    asked = _asked(options)
    bench = asked.bench
    if options.tune:
        tried = [float(options.rate)] if options.rate else bench.base.rates
        works = tuning.first(asked.studies, asked.methods, tried)
    else:
        parts = asked.studies, asked.methods, asked.seeds, bench.rates
        works = works_of(*parts, levels=not options.sweep)
    if options.sweep:  # one variant on all subjects after the other
        order = list(asked.methods)
        works.sort(key=lambda work: order.index(work.name))
    done = options.report or working.do_all(bench, works, until, _say)
    if done and options.tune and not options.report:
        further = tuning.second(bench, asked.studies, asked.methods)
        done = working.do_all(bench, further, until, _say)
    if not options.worker:
        _conclude(options, asked, works)
    return 0 if done else 3


def _floor(file: Path) -> int:
    base = Demo.load()
    studies = tasks.tested(tasks.ONE, base.plan.prompts)
    found = floor.measured(base, [study for study in studies if study.things])
    write_json(file, found)
    for judge, told in found.items():
        left = f"{told['greyed']} without the subject, {told['most']} at most"
        print(f"{judge}: {told['itself']} as it is, {left}")
    return 0


def _conclude(options: argparse.Namespace, asked: Asked, works: Sequence[Work]) -> None:
    """Say what the records that are there come to."""
    if options.tune:
        tuning.keep(asked.bench, asked.studies, asked.methods)
        return
    records = (asked.bench.found(work) for work in works)
    found = results.results_of(record for record in records if record is not None)
    if options.sweep:
        print(sweep.table(found, asked.bench.methods), flush=True)
    else:
        _report(asked, found, len(works))


def _report(asked: Asked, found: Sequence[results.Result], wanted: int) -> None:
    bench = asked.bench
    much = bench.plan
    about = (
        f"Base: {bench.base.name}. {much.steps} steps of batch {much.batch}; {much.prompts} prompts"
        f" a subject, {much.pictures} picture(s) of each; {len(found)} of {wanted} records."
    )
    folder = bench.folder / "report"
    shown = painted.draw(bench, asked.studies, folder)
    print(page.write(found, bench.methods, about, folder, shown), flush=True)
    for title, some in page.views(found).items():
        print(f"\n{title}\n\n{page.markdown(some, bench.methods)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="records, pictures and files")
    known = f"demo, a checkpoint file, or with --dry {' or '.join(seeded.SHAPES)}"
    parser.add_argument("--base", default="demo", help=known)
    parser.add_argument("--dino", default=vision.DINO, help="of a checkpoint: a folder or a name")
    parser.add_argument("--clip", default=vision.CLIP, help="of a checkpoint: a folder or a name")
    parser.add_argument("--task", choices=tasks.TASKS, default=tasks.ONE, help="what is learnt")
    subjects_are = "of a checkpoint: the DreamBooth data set's folder"
    parser.add_argument("--subjects", type=Path, help=subjects_are)
    parser.add_argument("--dry", action="store_true", help="a few steps with seeded weights")
    parser.add_argument("--methods", default="", help="names with commas; all if left out")
    parser.add_argument("--only", default="", help="subjects with commas; all if left out")
    parser.add_argument("--seeds", type=int, default=3, help="how many, 3 if left out")
    parser.add_argument("--quick", action="store_true", help="3 subjects, 4 methods, 1 seed")
    much = "another amount: steps=300,batch=1,prompts=10,pictures=1, or some of them"
    parser.add_argument("--plan", default="", help=much)
    parser.add_argument("--tune", action="store_true", help="try learning rates")
    parser.add_argument("--sweep", action="store_true", help="try what the paper leaves open")
    parser.add_argument("--floor", action="store_true", help="only what judges see without it")
    parser.add_argument("--rate", type=float, help="of learning, in place of the tuned ones")
    parser.add_argument("--report", action="store_true", help="only write it, of what is there")
    parser.add_argument("--minutes", type=float, help="begin nothing new after that long")
    parser.add_argument("--archive", type=Path, help="a file that all records are kept in, too")
    cores = os.cpu_count() or 1
    usual = 1 if torch.cuda.is_available() else min(4, cores)  # more need more memory
    parser.add_argument("--processes", type=int, default=usual, help="at work on it together")
    parser.add_argument("--threads", type=int, default=max(1, cores // usual), help="of each")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _in_processes(options: argparse.Namespace) -> int:
    """The same command in several processes, which share the work; 0 when all are done."""
    alone = [sys.executable, str(_START), *sys.argv[1:], "--processes=1", "--worker"]
    running = [subprocess.Popen(alone) for _ in range(options.processes)]
    try:
        code = max(abs(process.wait()) for process in running)
    finally:
        for process in running:
            process.terminate()
    options.report = True
    _alone(options)
    return code


@dataclass(frozen=True)
class Asked:
    """What the command is to do."""

    bench: Bench
    studies: list[Study]
    methods: dict[str, Method]
    seeds: int


def _asked(options: argparse.Namespace) -> Asked:
    """The bench, and which subjects, methods and seeds it is asked for."""
    base = _base(options)
    several = tasks.size_of(options.task) > 1
    much = tasks.plan_of(options.task) if options.task in tasks.OF_THE_DEMO else base.plan
    known, seeds = methods.methods_for(base.width, several), options.seeds
    able, what = list(known), "method"
    if options.tune:
        able, what = tuning.tried(known), "method that is tuned"
        much = much if several else replace(much, pictures=plan.TUNING_PICTURES)
    elif options.sweep:
        much = much if several else plan.SWEEP
        known, what = sweep.variants(known[methods.IN_RANKS]), "variant"
        able = list(known)
    elif options.quick:
        much, able, seeds = plan.QUICK, list(methods.quick(known)), 1
    much = plan.changed(much, options.plan)
    studies = _studies(options, much.prompts)
    names = _chosen(options.methods, able, what)
    wanted = _chosen(options.only, [study.name for study in studies], "subject")
    studies = [study for study in studies if study.name in wanted]
    tuned_as = f"{base.name}, several" if several else base.name
    rates = tuning.rates(base, tuned_as, known)
    if options.rate:
        # What others need is made at its own rate.
        rates = {name: options.rate if name in names else rate for name, rate in rates.items()}
    bench = Bench(base, options.out, much, known, rates, tuned_as)
    return Asked(bench, studies, {name: known[name] for name in names}, seeds)


def _base(options: argparse.Namespace) -> Base:
    if options.base == "demo":
        return Demo.load()
    if not options.dry:
        judges = map(vision.located, (options.dino, options.clip))
        return Checkpoint.load(Path(options.base), *judges)
    place = options.out / "seeded"
    if not torch.cuda.is_available():  # SDXL in fp32, twice, is more than most machines have
        importlib.import_module("comfy.cli_args").args.bf16_unet = True
    file = seeded.checkpoint(options.base, place / f"{options.base}.safetensors")
    judges = seeded.dino(place / "dino"), seeded.clip(place / "clip")
    found = Checkpoint.load(file, *judges, resolution=128)
    sampling = replace(found.parts.sampling, steps=1)
    return replace(found, parts=replace(found.parts, sampling=sampling), plan=plan.DRY)


def _studies(options: argparse.Namespace, prompts: int) -> list[Study]:
    if options.base != "demo":
        if options.task in tasks.OF_THE_DEMO:
            sys.exit(f"Only the demo base can be asked for {options.task}; leave --task out.")
        folder = options.subjects
        if options.dry and folder is None:
            folder = seeded.photographs(options.out / "seeded" / "photographs")
        if folder is None:
            sys.exit("A checkpoint needs --subjects: the folder of the DreamBooth data set.")
        if options.task == tasks.COMPLEX:
            return dreambooth.complex_scenes(folder)
        found = dreambooth.read(folder, prompts)
        tuned = table_a1.TUNING
        return [study for study in found if (study.name == tuned) == bool(options.tune)]
    if options.task == tasks.COMPLEX:
        sys.exit("The demo base knows nothing of these scenes; give a checkpoint by --base.")
    if options.subjects is not None:
        sys.exit("The demo base brings subjects of its own; leave --subjects out.")
    if options.tune:
        return tasks.for_tuning(options.task, prompts)
    if options.sweep:
        return tasks.for_sweep(options.task, prompts)
    return tasks.tested(options.task, prompts)[: 3 if options.quick else None]


def _chosen(wanted: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in wanted.split(",") if name.strip()] or known
    for name in names:
        if name not in known:
            sys.exit(f"{name} is no {what}; choose among {', '.join(known)}.")
    return [name for name in known if name in names]  # in the order of tables


def works_of(
    studies: Sequence[Study],
    chosen: Mapping[str, Method],
    seeds: int,
    rates: Mapping[str, float],
    levels: bool = True,
) -> list[Work]:
    """Everything, one seed of all subjects after the other; ``levels``: also without a LoRA."""
    found: list[Work] = []
    for seed in range(seeds):
        for study in studies:
            if not seed and levels:  # these know no training
                names = (BASE, OWN) if study.own else (BASE,)
                found += [Work(study, name, 0) for name in names]
            found += [Work(study, name, seed, rates.get(name)) for name in chosen]
    return found


def _say(work: Work, record: dict[str, Any], seconds: float) -> None:
    if not seconds:
        return  # was there already
    if "failed" in record:
        print(f"{work.study.name}: {work.stem}: {record['failed']}", flush=True)
        return
    scores = record["scores"].values()
    measures = dict.fromkeys(key for judge in scores for key in judge)
    told = {
        key: statistics.fmean(statistics.fmean(judge[key]) for judge in scores if key in judge)
        for key in measures
    }
    figures = ", ".join(f"{key} {value:.3f}" for key, value in told.items())
    size = f", {record['bytes'] / 1e6:.2f} MB" if "bytes" in record else ""
    print(f"{work.study.name}: {work.stem}: {figures}{size} ({seconds:.0f} s)", flush=True)
