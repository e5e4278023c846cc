"""Notices when a loss explodes, and keeps the last good state to go back to."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

_WINDOW = 20  # steps; single losses differ by ten with their timestep
_EXPLODED = 5.0  # times the mean of the first window
_GOOD = 2.0  # times it, at most, for a state to be worth keeping
_KEEP_EVERY = 50  # steps between two kept states


class LossGuard:
    """Watches the loss of a run. Source: ours."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._start: float | None = None  # mean of the first window
        self._good: tuple[int, Any] | None = None

    def exploded(self, step: int, loss: float, state: Callable[[], Any]) -> bool:
        """Take in the loss of a finished step; whether the run has left its path.

        ``state`` is asked for what to keep, now and then, while the loss is sane.
        """
        self._recent.append(loss)
        if len(self._recent) < _WINDOW:
            return False
        mean = statistics.fmean(self._recent)
        if self._start is None:
            self._start = mean
        if mean > _EXPLODED * self._start:
            return True
        due = self._good is None or step >= self._good[0] + _KEEP_EVERY
        if due and mean <= _GOOD * self._start:
            self._good = (step, state())
        return False

    @property
    def last_good(self) -> tuple[int, Any] | None:
        """The step and the state to go back to."""
        return self._good

    def state(self) -> dict[str, Any]:
        """Plain values, and the kept state as it is."""
        step, good = self._good or (0, {})
        return {"recent": list(self._recent), "start": self._start, "step": step, "good": good}

    def load_state(self, state: dict[str, Any]) -> None:
        self._recent = deque(state["recent"], maxlen=_WINDOW)
        self._start = state["start"]
        self._good = (state["step"], _copied(state["good"])) if state["good"] else None


def _copied(tree: Any) -> Any:
    """Copies of all tensors: those of a checkpoint lie in its file, which is to be deleted."""
    if isinstance(tree, dict):
        return {name: _copied(part) for name, part in tree.items()}
    return tree.clone() if torch.is_tensor(tree) else tree
