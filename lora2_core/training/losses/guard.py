"""Notices when a run explodes or does harm, and keeps a good state to go back to."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..out_of_memory import is_out_of_memory

_WINDOW = 20  # steps
_EXPLODED = 5.0  # times the mean of the first window
_GOOD = 2.0  # times it, at most, for a state to be worth keeping
_RUINED = 1.4  # times the loss on fixed noise before the first step
_IN_A_ROW = 2  # such measurements; the last of a run is enough by itself
_KEEP_EVERY = 50  # steps between two kept states


class LossGuard:
    """Watches the loss of a run. Source: ours.

    An explosion is a median of the last 20 losses over 5 times the mean of the first 20. Single
    losses differ by ten with their timestep, and their mean follows the largest: by the mean, 18 %
    of sane runs of 5,000 steps would be stopped (lognormal losses, standard deviation a factor of
    3.2), by the median none of 400. It takes 11 steps to notice.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._start: float | None = None  # mean of the first window
        self._kept: list[tuple[int, Any]] = []  # the newest last; two, see last_good

    def exploded(self, step: int, loss: float, state: Callable[[], Any]) -> bool:
        """Take in the loss of a finished step; whether the run has left its path.

        ``state`` is asked for what to keep, now and then, while the loss is sane; it is kept on
        the CPU.
        """
        self._recent.append(loss)
        if len(self._recent) < _WINDOW:
            return False
        mean = statistics.fmean(self._recent)
        if self._start is None:
            self._start = mean
        if statistics.median(self._recent) > _EXPLODED * self._start:
            self._forget_after(step - _WINDOW)
            return True
        due = not self._kept or step >= self._kept[-1][0] + _KEEP_EVERY
        if due and mean <= _GOOD * self._start:
            self._keep(step, state)
        return False

    @property
    def last_good(self) -> tuple[int, Any] | None:
        """The step and the state to go back to.

        Once the loss has exploded it is older than the losses that told: the step after which a
        state was kept may have been the bad one, which only the next loss shows.
        """
        return self._kept[-1] if self._kept else None

    def state(self) -> dict[str, Any]:
        """Plain values, and the kept states as they are."""
        kept = {str(n): {"step": s, "good": good} for n, (s, good) in enumerate(self._kept)}
        return {"recent": list(self._recent), "start": self._start, "kept": kept}

    def load_state(self, state: dict[str, Any]) -> None:
        self._recent = deque(state["recent"], maxlen=_WINDOW)
        self._start = state["start"]
        kept = [state["kept"][name] for name in sorted(state["kept"])]
        self._kept = [(int(one["step"]), _on_cpu(one["good"])) for one in kept]

    def _keep(self, step: int, state: Callable[[], Any]) -> None:
        try:
            good = _on_cpu(state())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return  # a step that went well must not fail by it: an older state is kept
        self._kept = [*self._kept[-1:], (step, good)]

    def _forget_after(self, step: int) -> None:
        """Leave out the newest state if it is from after ``step`` and an older one is there."""
        if len(self._kept) > 1 and self._kept[-1][0] > step:
            self._kept.pop()


class Measured(Protocol):
    """A finished step."""

    @property
    def step(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def probe(self) -> float | None: ...


class ProbeGuard:
    """Judges a run by its loss on fixed noise, against that before the first step. Source: ours.

    These draws never change, so the loss does not scatter: two fifths above the start, twice in
    a row, is damage. The losses of the steps cannot tell: a run can be ruined within their first
    window, and a ruined loss saturates near that of a guess of nothing, some three times the start.
    """

    def __init__(self) -> None:
        self.start: float | None = None  # before the first step; None: not measured
        self._above = 0  # measurements in a row that are clearly above it
        self._lowest = math.inf
        self.best: tuple[int, Any] | None = None  # the step, and the state on the CPU

    def ruined(self, event: Measured, state: Callable[[], Any]) -> bool:
        """Take in what was measured after a step; whether the run does harm.

        ``state`` is asked for what to keep of a step that is the best so far, below the start.
        """
        probe = event.probe
        if probe is None or self.start is None:
            return False
        if not probe <= _RUINED * self.start:  # nor where it is no number
            self._above += 1
            return event.step == event.steps or self._above >= _IN_A_ROW
        self._above = 0
        if probe < min(self._lowest, self.start):
            try:
                self.best = event.step, _on_cpu(state())
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return False  # as LossGuard: an older state is kept
            self._lowest = probe
        return False

    def state(self) -> dict[str, Any]:
        """Plain values, and the kept state as it is."""
        best = {} if self.best is None else {"step": self.best[0], "good": self.best[1]}
        lowest = None if self.best is None else self._lowest
        return {"start": self.start, "above": self._above, "lowest": lowest, "best": best}

    def load_state(self, state: dict[str, Any]) -> None:
        self.start, self._above, best = state["start"], state["above"], state["best"]
        self._lowest = state["lowest"] if best else math.inf
        self.best = (int(best["step"]), _on_cpu(best["good"])) if best else None


def _on_cpu(tree: Any) -> Any:
    """Copies of all tensors: those of a checkpoint lie in its file, which is to be deleted; and a
    run's device has no memory to spare for them."""
    if isinstance(tree, dict):
        return {name: _on_cpu(part) for name, part in tree.items()}
    return tree.detach().to("cpu", copy=True) if torch.is_tensor(tree) else tree
