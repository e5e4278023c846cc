"""A run as of its last finished step, for another thread, while the next one takes its time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Abandoned(Exception):
    """The step that runs does not count: the run was saved as of the one before."""


class LastStep:
    """Keeps what a step has drawn apart from what is saved, and its changes out of a save.

    Until its gradients are there a step changes nothing but the draws; those of ``before`` are
    what a save takes then.
    """

    def __init__(self) -> None:
        self.before: tuple[Any, Any] | None = None  # generator and task, while a step runs
        self.abandoned = False
        self._lock = threading.RLock()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, a step changes the run. Raises Abandoned when it was saved meanwhile."""
        with self._lock:
            if self.abandoned:
                raise Abandoned
            yield

    @contextmanager
    def held(self, seconds: float = -1) -> Iterator[bool]:
        """Inside, no other thread changes the run; false where that takes over ``seconds``."""
        got = self._lock.acquire(timeout=seconds)
        try:
            yield got
        finally:
            if got:
                self._lock.release()
