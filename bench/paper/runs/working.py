"""Work done by one process or by many on the same folder, each piece once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from filelock import FileLock, Timeout

from .trial import Bench, Work

Told = Callable[[Work, dict[str, Any], float], None]  # work, its record, seconds
_PAUSE = 2.0  # seconds, while others do what is left


def do_all(bench: Bench, works: Sequence[Work], until: float, told: Told) -> bool:
    """Do what is not done yet, or wait for those who do it; False when the time was over before.

    A lock, which ends with its process however that ends, keeps others off the same work.
    ``until``: on time.monotonic's clock.
    """
    left = list(works)
    while left:
        waiting: list[Work] = []
        for work in left:
            if time.monotonic() > until:
                return False
            if not _done(bench, work, told):
                waiting.append(work)
        if len(waiting) == len(left):
            time.sleep(_PAUSE)
        left = waiting
    return True


def _done(bench: Bench, work: Work, told: Told, with_lora: bool = False) -> bool:
    """Do some work, and before it what it needs; False where another process is at it."""
    if (found := bench.found(work, with_lora)) is not None:
        told(work, found, 0.0)
        return True
    needs = bench.needs(work)
    cut = work.rate is None  # of a file; a training asks for no more than a record
    for one in (needs.of, needs.to):
        if one is not None and not _done(bench, one, told, with_lora=cut and one is needs.of):
            return False
    file = bench.file(work).with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file, timeout=0):
            started = time.monotonic()
            record = bench.record(work, with_lora)
            told(work, record, time.monotonic() - started)
    except Timeout:
        return False
    return True
