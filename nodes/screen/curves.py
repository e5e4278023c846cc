"""Curves of a run: those of its report, smooth ones, and fewer points that keep every peak.

Pure functions of numbers. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...lora2_core.jobs.saving import TrainedLoRA
from ...lora2_core.reports.report import TrainingHistory

# A curve is smoothed over a 25th of the run, but over 5 steps at least and 100 at most.
_SHARE, _SHORTEST, _LONGEST = 25, 5, 100


def decay_for(steps: int) -> float:
    """The decay a step of the smoothed loss of a run of ``steps``."""
    return 1 - 1 / min(max(steps / _SHARE, _SHORTEST), _LONGEST)


class Smoother:
    """A running mean with exponential weights and Adam's correction of its start at 0.

    The first value comes out as it is; a value that is not finite leaves the mean where it was.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """The mean with ``value`` in it; not a number as long as there is nothing to average."""
        if math.isfinite(value):
            self._sum = self.decay * self._sum + (1 - self.decay) * value
            self._weight = self.decay * self._weight + (1 - self.decay)
        return self._sum / self._weight if self._weight else math.nan


def keep_peaks(values: Sequence[float], limit: int) -> list[int]:
    """At most ``limit`` indices, rising, that show what ``values`` look like; ``limit`` ≥ 4.

    The first and the last are among them, and of each of equal stretches between them the lowest
    and the highest value: no peak of the whole is lost. Values that are not finite give way.
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    stretches = (limit - 2) // 2
    kept = {0, count - 1}
    for rounded in range(stretches):
        start = 1 + rounded * (count - 2) // stretches
        end = 1 + (rounded + 1) * (count - 2) // stretches
        finite = [index for index in range(start, end) if math.isfinite(values[index])]
        if finite:
            kept.add(min(finite, key=values.__getitem__))
            kept.add(max(finite, key=values.__getitem__))
        else:
            kept.add(start)
    return sorted(kept)


def rounded(value: float | None, digits: int = 5) -> float | None:
    """``value`` with so many digits that count, as JSON can hold it; None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def training_history(trained: TrainedLoRA) -> TrainingHistory:
    """The curves of a run, for its report."""
    events, rank = trained.events, trained.config.rank
    probes = [(event.step, event.probe) for event in events if event.probe is not None]
    return TrainingHistory(
        steps=tuple(event.step for event in events),
        losses=tuple(event.loss for event in events),
        mean_ranks=tuple(event.mean_rank for event in events),
        probe_steps=tuple(step for step, _ in probes),
        probe_losses=tuple(loss for _, loss in probes),
        target_rank=None if rank.target_megabytes is not None else rank.target_rank,
    )
