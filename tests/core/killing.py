"""Trains in child processes and kills them: ``python killing.py FOLDER SEED KILLS`` or
``python killing.py FOLDER SIGNAL``. Started by test_kill.py; prints one JSON object a line.

PyTorch is imported once and the process forked, which makes a kill as cheap as a training.
"""

from __future__ import annotations

import json
import logging
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
NAME = "cat_00001_.safetensors"


def _train(path: Path, steps: int = STEPS) -> None:
    from lora2_pack.tests.core import toy_job

    toy_job.finish(toy_job.job(path, toy_job.config(steps=steps)))


def _child(path: Path) -> int:
    """A process that trains; its id. It ends with 0 when the run is over."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _train(path)
        code = 0
    finally:
        os._exit(code)


def _killed(path: Path, seconds: float) -> bool:
    """Whether a training process was still at it when SIGKILL came after ``seconds``."""
    pid = _child(path)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def kill_and_resume(folder: Path, seed: int, kills: int) -> None:
    """Kill at random moments, once or twice a run, and let each run come to its end."""
    draw = random.Random(seed)
    _train(folder / "warm" / NAME, steps=4)  # what PyTorch imports late is there before the forks
    whole = folder / "whole" / NAME
    started = time.monotonic()
    assert os.waitpid(_child(whole), 0)[1] == 0
    length = time.monotonic() - started
    number = done = 0
    while done < kills:
        path = folder / str(number) / NAME
        number += 1
        count = draw.choice((1, 1, 2))
        moments = [draw.uniform(0.05, 0.95) * length / count for _ in range(count)]
        killed = [_killed(path, moment) for moment in moments]
        hit = sum(killed)
        done += hit
        kept = len(list((path.parent / "checkpoints").glob("*.safetensors")))
        # Whoever came to an end before the signal has saved: one more would be another run.
        ended = not killed[-1] or os.waitpid(_child(path), 0)[1] == 0
        left = [p.name for p in path.parent.rglob("*") if p.is_file() and p != path]
        same = ended and path.read_bytes() == whole.read_bytes()
        told = {"moments": moments, "killed": hit, "kept": kept, "same": same, "left": left}
        print(json.dumps(told), flush=True)


def be_signalled(path: Path, name: str) -> None:
    """Train, with the signal's handler of ``shutdown``, until the parent sends it."""
    from lora2_pack.lora2_core.jobs import shutdown
    from lora2_pack.tests.core import toy_job

    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup, and & in a script, ignore it
    if name == "SIGUSR1":  # a handler that was there before and lives on
        signal.signal(signal.SIGTERM, lambda *_: print(json.dumps({"own": True}), flush=True))
    shutdown.install()
    shutdown.install()  # twice is once
    job = toy_job.job(path, toy_job.config(steps=100_000))
    if name == "slow":  # a step that outlasts everybody's patience
        toy_job.at_draw(job, 11, lambda: time.sleep(300))
    job.start()
    while job.progress.step < 5:
        time.sleep(0.01)
    try:  # the signal may come as soon as the parent has read the line
        print(json.dumps({"ready": True}), flush=True)
        end = time.monotonic() + 60
        # In short waits: a signal that comes just before one begins is seen when it ends.
        while not job.wait(0.2) and time.monotonic() < end:
            pass
    except KeyboardInterrupt:
        print(json.dumps({"interrupted": True, "state": job.progress.state}), flush=True)
        raise
    print(json.dumps({"state": job.progress.state}), flush=True)


if __name__ == "__main__":
    runpy.run_path(str(ROOT / "tools" / "pack.py"))["register"]()  # without ComfyUI
    import torch

    torch.set_num_threads(1)

    target, *rest = sys.argv[1:]
    if len(rest) == 2:
        kill_and_resume(Path(target), int(rest[0]), int(rest[1]))
    else:
        be_signalled(Path(target) / NAME, rest[0])
