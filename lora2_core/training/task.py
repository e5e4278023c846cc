"""What the trainer asks of whatever is to be learnt."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .objective import Prediction


class Task(Protocol):
    """What is learnt. ``batch`` is whatever the task itself made in ``draw``."""

    def draw(self, generator: torch.Generator, size: int) -> Any:
        """A random batch of ``size`` images with noise and timesteps."""
        ...

    def spread(self, generator: torch.Generator, count: int, size: int) -> list[Any]:
        """``count`` draws in batches of ``size`` with timesteps spread evenly."""
        ...

    def predict(self, batch: Any) -> Prediction:
        """The model's prediction for a batch and its target."""
        ...

    def state(self) -> dict[str, Any]:
        """The order of draws, as plain values and tensors."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...
