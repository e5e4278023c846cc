"""The strength at which a LoRA is saved: the smallest that keeps what it has learnt. Source: ours.

At the learning rate that a subject likes best a run ends stronger than it need be: the last fifth
of its strength buys hardly any loss on fixed noise, and costs the prompt (docs/method.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

# At which the loss is measured: none, all, and those between which the answer lies.
STRENGTHS = (0.0, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0)


def least_strength(losses: Mapping[float, float], share: float) -> float:
    """The smallest strength that keeps ``share`` of what the full one gains, in hundredths.

    ``losses``: on the same draws, by strength; 0 and 1 among them. Between two of them the loss is
    taken to be a line, which is above the true curve: what is kept is no less. 1 where the full
    strength gains nothing, or a loss is no number. Raises ValueError without 0 and 1.
    """
    if not {0.0, 1.0} <= losses.keys():
        raise ValueError(f"losses are those of {sorted(losses)}; take 0 and 1 among them.")
    gain = losses[0.0] - losses[1.0]
    if not gain > 0 or not all(map(math.isfinite, losses.values())):
        return 1.0
    wanted = share * gain
    points = [(strength, losses[0.0] - losses[strength]) for strength in sorted(losses)]
    for (low, less), (high, more) in itertools.pairwise(points):
        if more >= wanted:
            found = high if less >= wanted else low + (high - low) * (wanted - less) / (more - less)
            return min(1.0, round(math.ceil(100 * found - 1e-7) / 100, 2))
    return 1.0
