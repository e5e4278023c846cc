"""How often what is tried at random is tried: 2,000 times, or as often as LORA2_TRIES says."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lora2_pack.bench.resident import risen, settled

TRIES = int(os.environ.get("LORA2_TRIES", "2000"))
MOST_SECONDS, MOST_MEGABYTES = 5.0, 1000.0


@contextmanager
def in_time(what: object = "") -> Iterator[None]:
    """One try: no hang."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < MOST_SECONDS, what


@contextmanager
def in_memory(megabytes: float = MOST_MEGABYTES) -> Iterator[None]:
    """All of them: memory never rises by more, not even for a moment.

    Linux counts pages a core at a time: leave tens of MB between what is usual and ``megabytes``.
    """
    before = settled()
    yield
    rise = risen(before)
    assert rise < megabytes, f"memory rose by {rise:.0f} MB"
