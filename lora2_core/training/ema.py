"""A running average of A and B, which is steadier than the weights of the last step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Resize = Callable[[Tensor], Tensor]


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

    def follow(self, new_of: Mapping[nn.Parameter, tuple[nn.Parameter, Resize]]) -> None:
        """Resize as the weights were: each old one with its successor and the way to it.

        A new row of A starts at its weight and not at 0: its average is what was drawn.
        """
        for old, (new, resize) in new_of.items():
            place = self._place.pop(old)
            self._place[new] = place
            self._averages[place] = resize(self._averages[place])

    @torch.no_grad()
    def start_rows(self, weight: nn.Parameter, rows: slice, dim: int) -> None:
        """Begin the average of new ``rows`` of ``weight``, along ``dim``, at their values."""
        start, stop, _ = rows.indices(weight.shape[dim])
        average = self._averages[self._place[weight]].narrow(dim, start, stop - start)
        average.copy_(weight.detach().narrow(dim, start, stop - start))

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
