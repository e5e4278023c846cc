"""The trainings of this process: one runs, the others wait their turn, the newest stay listed.

Whoever asks for a training hands its job over here; the job's own thread starts the next one when
it is over, so there is no thread that waits for work.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..files.write import next_free
from . import shutdown
from .checkpoints import CheckpointFolder
from .job import TrainingJob
from .progress import ENDED, State
from .store import INTERRUPTED, JobStore, Kept

LISTED = 100  # trainings that are over
_WITH_PICTURES = 10  # of them with all their samples, the others with the newest
_STORE_SECONDS = 5.0  # between two notes of the step while nothing else changes

Listener = Callable[["Entry"], None]


class UnknownJob(LookupError):
    """There is no training of this id."""


class WrongState(RuntimeError):
    """What was asked for makes no sense now."""


@dataclass(frozen=True)
class Origin:
    """Where a training comes from."""

    name: str  # of the LoRA, without its ending
    node_id: str = ""
    prompt: dict[str, Any] | None = None  # API graph of the node and what it depends on
    base: str = ""  # the checkpoint, as a person would name it


class Entry:
    """A training in the list. ``background``: no prompt waits for its end."""

    def __init__(self, job: TrainingJob, origin: Origin, background: bool):
        self.id = secrets.token_urlsafe(16)
        self.job, self.origin, self.background = job, origin, background
        self.created = time.time()
        self.over = threading.Event()  # and its model is gone
        self.cut_off = False  # by the end of the process, not by a person
        self.name_was_taken = job.path.exists()
        self._noted: tuple[State, float] = ("queued", 0.0)

    @property
    def state(self) -> State:
        return self.job.progress.state

    def due(self) -> bool:
        """Whether its manifest should be written: after a change of state, and now and then."""
        state, written = self._noted
        now = time.monotonic()
        if state == self.state and now - written < _STORE_SECONDS:
            return False
        self._noted = (self.state, now)
        return True


class JobQueue:
    """First come, first served. Safe to use from any thread."""

    def __init__(self, store: JobStore | None = None, checkpoints: CheckpointFolder | None = None):
        self.store, self.checkpoints = store, checkpoints
        # Reentrant: a signal's handler may close the queue while this thread is in here.
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}  # the oldest first
        self._waiting: deque[Entry] = deque()
        self._current: Entry | None = None
        self._listeners: tuple[Listener, ...] = ()
        self._complained: set[Listener] = set()
        shutdown.before_stopping(self.close)

    # --- asking -------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All trainings, the newest first."""
        return list(self._entries.values())[::-1]

    def find(self, id: str) -> Entry:
        """Raises UnknownJob."""
        try:
            return self._entries[id]
        except KeyError:
            raise UnknownJob(
                "There is no such training in this session of ComfyUI; look at the list again."
            ) from None

    def position(self, id: str) -> int | None:
        """1 for the one that comes next; None for one that does not wait its turn."""
        entry = self.find(id)
        waiting = list(self._waiting)
        return waiting.index(entry) + 1 if entry in waiting else None

    def current(self) -> Entry | None:
        """The training whose turn it is, running or paused."""
        return self._current

    def prompt_waits(self) -> bool:
        """Whether a prompt waits for a training that is not at its turn yet.

        The one that runs must not wait for prompts then: both would wait for ever.
        """
        return any(not entry.background for entry in list(self._waiting))

    def paths(self) -> set[Path]:
        """Where trainings that are not over are going to write."""
        return {entry.job.path for entry in self.entries() if entry.state not in ENDED}

    def runs_in_use(self, kept: Sequence[Kept]) -> set[str]:
        """The hashes of runs that need their checkpoints: under way here, or cut off (``kept``)."""
        here = {entry.job.run_hash for entry in self.entries() if not entry.over.is_set()}
        return here | {one.run for one in kept if one.state == INTERRUPTED}

    def wait(self, id: str, seconds: float | None = None) -> bool:
        """Wait at most ``seconds``; whether the training is over and its thread gone."""
        entry = self.find(id)
        end = None if seconds is None else time.monotonic() + seconds
        if not entry.over.wait(seconds):
            return False
        return entry.job.wait(None if end is None else max(0.0, end - time.monotonic()))

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` after every step and change, mostly from the training's thread.

        It must be quick: the training waits for it. Its errors are logged and end nothing.
        """
        with self._lock:
            self._listeners = (*self._listeners, listener)

    # --- doing --------------------------------------------------------------------------------

    def add(self, job: TrainingJob, origin: Origin, background: bool = True) -> Entry:
        """Hand a job over: it starts now or when its turn comes."""
        entry = Entry(job, origin, background)
        job.watch = partial(self._changed, entry)
        job.ended = partial(self._ended, entry)
        if self.store is not None:
            self.store.supersede(job.run_hash)
        with self._lock:
            self._entries[entry.id] = entry
            self._waiting.append(entry)
        self._changed(entry)
        self._advance()
        return entry

    def stop(self, id: str) -> None:
        """End a training after its step, or take it off the queue. Raises WrongState."""
        with self._lock:
            entry = self.find(id)
            if entry.state in ENDED:
                raise WrongState(f"This training is over already ({entry.state}).")
            queued = entry in self._waiting
            if queued:
                self._waiting.remove(entry)
                entry.job.drop()
            else:
                entry.job.stop()
        self._changed(entry)
        if queued:
            self._close(entry)

    def pause(self, id: str) -> None:
        """Hold a running training after its step. Raises WrongState."""
        entry = self.find(id)
        if not entry.job.pause():
            raise WrongState(
                f"Only a training that runs can be paused; this one is {_described(entry)}."
            )
        self._changed(entry)

    def resume(self, id: str) -> None:
        """Let a paused training go on. Raises WrongState."""
        entry = self.find(id)
        if not entry.job.unpause():
            raise WrongState(f"Only a paused training can go on; this one is {_described(entry)}.")
        self._changed(entry)

    def close(self) -> None:
        """Start nothing more of what is here: the process ends. The queue can be used again.

        What is cut off by this is found as interrupted by the next process.
        """
        with self._lock:
            waiting, current = list(self._waiting), self._current
            self._waiting.clear()
            for entry in filter(None, (*waiting, current)):
                entry.cut_off = True
        for entry in waiting:  # nobody is told: this may be a signal's handler
            entry.job.drop()
            entry.over.set()

    # --- inside -------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Start the next one, if nothing runs."""
        while True:
            with self._lock:
                if self._current is not None or not self._waiting:
                    return
                entry = self._current = self._waiting.popleft()
                try:
                    if not entry.name_was_taken and entry.job.path.exists():
                        entry.job.move_to(next_free(entry.job.path))
                    entry.job.start()
                    return
                except RuntimeError as error:  # no thread could be started
                    logging.error("LoRA²: %s could not start: %s", entry.origin.name, error)
                    self._current = None
            self._close(entry)

    def _ended(self, entry: Entry) -> None:
        """In the training's thread, at its very end."""
        try:
            if entry.background:
                entry.job.slim()
        finally:
            with self._lock:
                self._current = None
            self._close(entry)
            self._advance()

    def _close(self, entry: Entry) -> None:
        """The last that is told of a training; the oldest of them all are forgotten."""
        self._changed(entry)
        entry.over.set()
        over = [listed for listed in self.entries() if listed.over.is_set()]
        for old in over[_WITH_PICTURES:]:
            old.job.progress.forget_pictures()
        with self._lock:
            for old in over[LISTED:]:
                self._entries.pop(old.id, None)
        if self.store is not None:
            self.store.prune()
            if self.checkpoints is not None:
                self.checkpoints.tidy(self.runs_in_use(self.store.all()))

    def _changed(self, entry: Entry) -> None:
        """Note and tell what ``entry`` is now. Takes no lock, since a signal's handler may wait
        for this thread while it holds one."""
        if entry.origin.name != entry.job.path.stem and entry.state != "queued":
            entry.origin = replace(entry.origin, name=entry.job.path.stem)  # a resumed run's own
        if self.store is not None and entry.due():
            self.store.put(partial(manifest, entry))
        for listener in self._listeners:
            try:
                listener(entry)
            except Exception:
                if listener not in self._complained:  # once, not at every step
                    self._complained.add(listener)
                    logging.exception("LoRA²: whoever watches trainings failed; training goes on.")


def _described(entry: Entry) -> str:
    ending = entry.state in ("running", "paused") and entry.job.stopping
    return "ending" if ending else entry.state


def manifest(entry: Entry) -> Kept:
    """What the store keeps of a training as it is now."""
    job, origin = entry.job, entry.origin
    progress, result = job.progress, job.result
    state = INTERRUPTED if entry.cut_off and entry.state == "stopped" else entry.state
    return Kept(
        id=entry.id,
        name=origin.name,
        node_id=origin.node_id,
        created=entry.created,
        state=state,
        step=progress.step,
        steps=job.config.steps,
        prompt=origin.prompt,
        file=None if result is None else str(result.path),
        error=None if progress.error is None else str(progress.error),
        background=entry.background,
        base=origin.base,
        run=job.run_hash,
    )
