"""A running average of A and B, which is steadier than the weights of the last step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..adapters.rank_change import RankChange


class AveragedWeights:
    """Exponential moving average with a decay per step; fp32, as large as A and B themselves.

    The decay grows from 0 with the steps n that are behind, min(decay, n/(9 + n)), so that the
    start, which is random, is forgotten at once.
    """

    def __init__(self, weights: Sequence[nn.Parameter], decay: float):
        self.decay, self.steps = decay, 0
        self._averages = [weight.detach().clone() for weight in weights]
        self._place = {weight: place for place, weight in enumerate(weights)}

    @torch.no_grad()
    def update(self, weights: Sequence[nn.Parameter]) -> None:
        """Take in the weights of a finished step, in the order of the start."""
        decay = min(self.decay, self.steps / (9 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self._averages, [weight.detach() for weight in weights], 1 - decay
        )

    def follow(self, change: RankChange) -> None:
        """Resize as the weights were. New rows begin at their weight: at what was drawn, not 0."""
        for weight in change.weights:
            place = self._place.pop(weight.old)
            self._place[weight.new] = place
            self._averages[place] = weight.begun(self._averages[place])

    @contextmanager
    def swapped(self, weights: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, the weights hold their averages; afterwards they are as before, bit by bit."""
        kept = [weight.data for weight in weights]
        try:
            for weight, average in zip(weights, self._averages, strict=True):
                weight.data = average
            yield
        finally:
            for weight, values in zip(weights, kept, strict=True):
                weight.data = values

    def state(self) -> dict[str, Any]:
        """The averages themselves and no copies: write or copy them before the next step."""
        return {"steps": self.steps, **{str(n): a for n, a in enumerate(self._averages)}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        self._averages = [
            state[str(n)].to(average).clone() for n, average in enumerate(self._averages)
        ]
