"""A running average of A and B, which is steadier than the weights of the last step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.rank_change import RankChange, Slot
from ..adapters.stacks import WeightStack


class AveragedWeights:
    """Exponential moving average with a decay per step; fp32, as large as A and B themselves.

    The decay grows from 0 with the steps n that are behind, min(decay, n/(9 + n)), so that the
    start, which is random, is forgotten at once.
    """

    def __init__(self, stacks: Sequence[WeightStack], decay: float):
        self.stacks, self.decay, self.steps = stacks, decay, 0
        self._averages = [weight.detach().clone() for weight in self._weights()]

    def _weights(self) -> list[nn.Parameter]:
        return [stack.down for stack in self.stacks] + [stack.up for stack in self.stacks]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of a finished step."""
        decay = min(self.decay, self.steps / (9 + self.steps))
        self.steps += 1
        weights = [weight.detach() for weight in self._weights()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self._averages, weights, 1 - decay
        )

    def follow(self, change: RankChange) -> None:
        """Resize as the weights were. New rows begin at their weight: at what was drawn, not 0."""
        resized = {weight.new: weight for weight in change.weights}
        for place, weight in enumerate(self._weights()):
            if weight in resized:
                self._averages[place] = resized[weight].begun(self._averages[place])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the weights hold their averages; afterwards they are as before, bit by bit."""
        weights = self._weights()
        kept = [weight.data for weight in weights]
        try:
            for weight, average in zip(weights, self._averages, strict=True):
                weight.data = average
            yield
        finally:
            for weight, values in zip(weights, kept, strict=True):
                weight.data = values

    def state(self) -> dict[str, Any]:
        """The averages themselves and no copies: write or copy them before the next step. A of
        every component, (rank, in), then every B, (out, rank)."""
        views = sorted(self._by_component(), key=lambda view: view[0])
        downs = [down[slot.rows] for _, slot, down, _ in views]
        ups = [up[slot.rows].t() for _, slot, _, up in views]
        return {"steps": self.steps, **{str(n): part for n, part in enumerate([*downs, *ups])}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        self._averages = [torch.zeros_like(weight.detach()) for weight in self._weights()]
        views = sorted(self._by_component(), key=lambda view: view[0])
        for place, (_, slot, down, up) in enumerate(views):
            down[slot.rows] = state[str(place)].to(down)
            up[slot.rows] = state[str(len(views) + place)].to(up).t()

    def _by_component(self) -> Iterator[tuple[int, Slot, Tensor, Tensor]]:
        """The number of each component, its slot, and the averages of its stack's A and B."""
        count = len(self.stacks)
        sides = zip(self.stacks, self._averages[:count], self._averages[count:], strict=True)
        for stack, down, up in sides:
            for component, slot in zip(stack.components, stack.slots, strict=True):
                yield component, slot, down, up
