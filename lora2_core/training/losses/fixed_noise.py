"""The loss on images, noise and timesteps that never change: the judge of a run."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import torch

from ...adapters.network import AdaptiveRankNetwork
from ...config.train import PROBE_DRAWS
from ..objective import loss_parts
from ..out_of_memory import is_out_of_memory
from ..task import Task
from .strength import STRENGTHS, least_strength

_SEED = 0x10A2  # the same for every run, so that runs can be compared with each other


class FixedNoise:
    """Measures what ``network`` makes of ``task``, in batches of ``size``."""

    def __init__(self, network: AdaptiveRankNetwork, task: Task, size: int):
        self.network, self.task, self._size = network, task, size

    @cached_property
    def batches(self) -> list[Any]:
        """All draws; made when they are first asked for."""
        generator = torch.Generator().manual_seed(_SEED)
        return self.task.spread(generator, PROBE_DRAWS, self._size)

    @torch.no_grad()
    def loss(self) -> float | None:
        """The mean over all draws; None where there is no memory for it."""
        self.network.refresh()
        try:
            losses = [sum(loss_parts(self.task.predict(batch))) for batch in self.batches]
            return float(torch.stack(losses).mean())  # type: ignore[arg-type]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logging.warning("LoRA²: no memory to measure the loss on fixed noise; it is left out.")
            return None

    def least_strength(self, share: float) -> float | None:
        """The smallest strength of the network that keeps ``share`` of its gain; None where it
        cannot be measured."""
        losses: dict[float, float] = {}
        for strength in STRENGTHS:
            with self.network.at_strength(strength):
                found = self.loss()
            if found is None:
                return None
            losses[strength] = found
        self.network.refresh()
        return least_strength(losses, share)
