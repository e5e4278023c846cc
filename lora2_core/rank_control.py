"""The rank term of the loss, eq. 12, or our budget with its controller."""

from __future__ import annotations

import math

from torch import Tensor

from . import adaptive_rank
from .network import AdaptiveRankNetwork

_LOSS_MEMORY = 0.98  # of the running mean of the loss, about 50 steps
_PROPORTIONAL = 30.0  # below target by more than 1/30 the term pulls ranks up
_LARGEST_PUSH = 1e3  # κ stays within this factor of its start: anti-windup


class RankControl:
    """Gives the weighted rank term of every step of a run and steers its weight.

    ``paper``: λ_r Σ |ν − ν_target| with a constant λ_r. ``balanced``: κ · loss · (mean rank /
    target), where a running mean of the loss makes the term follow the task (a ten times larger
    loss leaves the rank path unchanged). κ is a level times 1 + 30 · excess, that factor held
    within ±3, excess being the mean rank over its target minus one. The level rises while the mean
    is above its target and falls while it is below, by a gain per run, so that a short run covers
    the same ground. The factor turns negative when the mean has sunk: a term that can only push
    down ends 500 steps at 11.6 for a target of 16 on the demo model, since late gradients are too
    weak to climb again.
    """

    def __init__(self, network: AdaptiveRankNetwork, steps: int):
        self.network = network
        self.gain = network.config.controller_gain / steps
        self.config = network.config
        self.kappa = self._level = self.config.rank_weight
        self.loss_mean: float | None = None

    def term(self, loss: Tensor) -> Tensor:
        """The term to add to ``loss`` (a scalar that only lends its size). Scalar."""
        nu = self.network.nu
        if self.config.mode == "fixed":
            return loss.new_zeros(())
        if self.config.mode == "paper":
            penalty = adaptive_rank.rank_penalty(nu, self.network.target_rank, self.config.quantile)
            return self.config.rank_weight * penalty
        budget = adaptive_rank.rank_budget(
            nu, self.network.rank_weight, self.network.target_rank, self.config.quantile
        )
        size = loss.detach() if self.loss_mean is None else self.loss_mean
        return self.kappa * size * budget

    def observe(self, loss: float, mean_rank: float) -> None:
        """Take in a finished step: its loss and the mean of the ranks in use, which are what the
        file will hold (ν rounds up to them, so steering by ν would overshoot)."""
        old = self.loss_mean
        self.loss_mean = loss if old is None else _LOSS_MEMORY * old + (1 - _LOSS_MEMORY) * loss
        if self.gain == 0 or self.config.rank_weight == 0:
            return
        excess = max(-1.0, min(1.0, mean_rank / self.network.target_rank - 1))
        start = self.config.rank_weight
        moved = self._level * math.exp(self.gain * excess)
        self._level = max(start / _LARGEST_PUSH, min(start * _LARGEST_PUSH, moved))
        self.kappa = self._level * max(-3.0, min(3.0, 1 + _PROPORTIONAL * excess))
