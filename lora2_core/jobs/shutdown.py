"""When the process is asked to end, running trainings save first.

``install`` puts itself before the handlers of SIGINT and SIGTERM that are there, ComfyUI's own
among them: trainings are asked to stop and waited for, those that wait their turn never start,
then the earlier handler does what it did before. A second signal goes straight to that one. Where
there are no signals, ``atexit`` remains.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

WAIT_SECONDS = 20.0  # for all trainings together to finish their step and save
PATIENCE = 5.0  # of them for the step; then the one before it is saved
_NAMES = ("SIGINT", "SIGTERM", "SIGBREAK")  # the last is Windows' way to ask

_running: dict[int, weakref.ref[Job]] = {}  # changed and listed in one step each, so no lock
_before: list[weakref.WeakMethod[Callable[[], None]]] = []
_previous: dict[int, Any] = {}
_installed = False
_hurried = False  # a second signal came while trainings were saving


class Job(Protocol):
    """A training that can be asked to stop and waited for."""

    def stop(self) -> None: ...

    def wait(self, seconds: float | None = None) -> bool: ...

    def save_last_step(self, seconds: float) -> bool: ...


def install() -> None:
    """Once per process, from its main thread where signals are to be seen; harmless again."""
    global _installed
    if not _installed:
        atexit.register(_at_exit)
        _installed = True
    if threading.current_thread() is not threading.main_thread():
        return
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is None or number in _previous:
            continue
        previous = signal.getsignal(number)
        # None: not Python's. Ignored ones, as under nohup, are to stay without effect.
        if previous is not None and previous is not signal.SIG_IGN:
            _previous[number] = previous
            signal.signal(number, _handle)


def enter(job: Job) -> None:
    """``job`` runs from now on; it is not kept alive by that."""
    _running[id(job)] = weakref.ref(job)


def leave(job: Job) -> None:
    """``job`` has saved and is over."""
    _running.pop(id(job), None)


def before_stopping(close: Callable[[], None]) -> None:
    """Call the method ``close`` before trainings are stopped: it sees to it that none begins.

    Its object is not kept alive by that.
    """
    _before[:] = [reference for reference in _before if reference() is not None]
    _before.append(weakref.WeakMethod(close))


def stop_all(seconds: float = WAIT_SECONDS) -> bool:
    """Ask all running trainings to stop and wait for them; whether all have saved in time.

    Of a step that takes longer than PATIENCE the one before it is saved.
    """
    for close in [reference() for reference in _before]:
        if close is not None:
            try:
                close()
            except Exception:  # what runs must be saved all the same
                logging.exception("LoRA²: trainings that wait their turn could not be taken off.")
    jobs = [job for reference in list(_running.values()) if (job := reference()) is not None]
    for job in jobs:
        job.stop()
    end = time.monotonic() + seconds
    patient = time.monotonic() + min(PATIENCE, seconds)
    late = [job for job in jobs if not job.wait(max(0.0, patient - time.monotonic()))]
    return all([_saved(job, end) for job in late])


def _saved(job: Job, end: float) -> bool:
    """Whether a training is over, or its last complete step saved, by ``end``."""
    try:
        if job.save_last_step(max(0.0, end - time.monotonic())):
            return True
    except Exception:  # the next one may still be saved, and this one end by itself
        logging.exception("LoRA²: the last complete step could not be saved.")
    return job.wait(max(0.0, end - time.monotonic()))


def _at_exit() -> None:
    if not _hurried:
        stop_all()


def _handle(number: int, frame: FrameType | None) -> None:
    global _hurried
    previous = _previous[number]
    signal.signal(number, previous)  # a second signal goes straight to it
    if _running:
        name = signal.Signals(number).name
        logging.warning("LoRA²: %s: the training stops after its step and saves.", name)
        try:
            stop_all()
        except BaseException:  # the second signal's handler raised, as that of Ctrl-C does
            _hurried = True
            raise
    if callable(previous):
        signal.signal(number, _handle)  # it may decide to live on
        previous(number, frame)
    else:
        os.kill(os.getpid(), number)  # the system's own way: the process ends by this signal
