"""Events of trainings for every open screen, so few that neither side notices them.

A job tells of every step, from its own thread, hundreds of times a second if the model is small.
Here the newest of each job waits for the next free slot; what a slot sends is made only then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ...lora2_core.jobs.progress import ENDED

INTERVAL = 0.34  # seconds between two messages of all jobs together: at most three in any second


class Entry(Protocol):
    """What is needed of a lora2_core.jobs.queue.Entry."""

    @property
    def id(self) -> str: ...

    @property
    def state(self) -> str: ...


class Announcer:
    """Sends ``tell(entry)`` of jobs that have news, one a slot.

    Changes of state go before steps, each kind in the order of its news. ``tell`` and ``send``
    are called in a thread of the announcer's own; an error of theirs costs one message.
    """

    def __init__(
        self,
        tell: Callable[[Any], dict[str, Any]],
        send: Callable[[dict[str, Any]], None],
        interval: float = INTERVAL,
    ):
        self._tell, self._send, self._interval = tell, send, interval
        self._lock = threading.Lock()
        self._states: dict[str, str] = {}
        self._changed: dict[str, Entry] = {}
        self._stepped: dict[str, Entry] = {}
        self._news = threading.Event()
        self._thread: threading.Thread | None = None

    def listen(self, entry: Entry) -> None:
        """Something of ``entry`` is new; to be given to JobQueue.listen."""
        with self._lock:
            state = entry.state
            if self._states.pop(entry.id, None) != state:
                self._stepped.pop(entry.id, None)
                self._changed.setdefault(entry.id, entry)
            elif entry.id not in self._changed:
                self._stepped.setdefault(entry.id, entry)
            if state not in ENDED:  # of those that are over nothing more comes
                self._states[entry.id] = state
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lora2-news", daemon=True)
                self._thread.start()
        self._news.set()

    def _run(self) -> None:
        while True:
            self._news.wait()
            entry = self._next()
            if entry is None:
                continue
            try:
                self._send(self._tell(entry))
            except Exception:  # a screen may miss a message, a training must miss nothing
                logging.exception("LoRA²: the news of a training could not be told.")
            time.sleep(self._interval)

    def _next(self) -> Entry | None:
        with self._lock:
            for waiting in (self._changed, self._stepped):
                if waiting:
                    return waiting.pop(next(iter(waiting)))
            self._news.clear()
            return None
