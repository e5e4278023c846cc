"""Where a run comes by between two steps: it passes, waits until it may go on, or ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from .progress import Progress, State

_POLL_SECONDS = 0.05  # how soon a run notices that it need not wait for a prompt any more


class StepGate:
    """Stops, holds and releases the run of ``progress``, from any thread.

    ``busy``: while it is true the run waits, because the machine is wanted for something else.
    ``changed``: called in the run's thread when that waiting begins and when it ends.
    """

    def __init__(self, progress: Progress, busy: Callable[[], bool], changed: Callable[[], None]):
        self._progress, self._busy, self._changed = progress, busy, changed
        # Reentrant: a signal's handler may stop a run while its thread is in here.
        self._condition = threading.Condition(threading.RLock())
        self._stopping = False

    @property
    def stopping(self) -> bool:
        """Whether an end was asked for."""
        return self._stopping

    def begin(self) -> None:
        """The run is on its way."""
        with self._condition:
            self._progress.state = "running"

    def end(self, state: State) -> None:
        """The run is over; from here on nothing can hold it."""
        with self._condition:
            self._stopping = True
            self._progress.state, self._progress.waits = state, False

    def stop(self) -> None:
        """Let the run end at its next coming by, at once if it waits here."""
        with self._condition:
            self._stopping = True
            if self._progress.state == "paused":
                self._progress.state = "running"
            self._condition.notify_all()

    def pause(self) -> bool:
        """Hold the run when it comes by; whether there is a run to hold."""
        with self._condition:
            if self._stopping or self._progress.state != "running":
                return False
            self._progress.state = "paused"
            self._condition.notify_all()
            return True

    def unpause(self) -> bool:
        """Let a held run go on; whether it was held."""
        with self._condition:
            if self._progress.state != "paused":
                return False
            self._progress.state = "running"
            self._condition.notify_all()
            return True

    def __call__(self) -> bool:
        """Wait as long as the run must; then whether it is to end."""
        while not self._stopping:
            if self._progress.state == "paused":
                self._wait(False)
                with self._condition:
                    self._condition.wait_for(
                        lambda: self._stopping or self._progress.state != "paused"
                    )
            elif self._is_busy():
                self._wait(True)
                with self._condition:
                    if not self._stopping and self._progress.state != "paused":
                        self._condition.wait(_POLL_SECONDS)
            else:
                break
        self._wait(False)
        return self._stopping

    def _wait(self, waits: bool) -> None:
        """Show whether the run waits for a prompt."""
        if self._progress.waits != waits:
            self._progress.waits = waits
            self._changed()

    def _is_busy(self) -> bool:
        try:
            return self._busy()
        except Exception as error:  # nobody to ask: training goes on as if it were alone
            logging.warning("LoRA²: whether a prompt runs cannot be told: %s", error)
            self._busy = lambda: False
            return False
