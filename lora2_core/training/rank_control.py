"""The rank term of the loss, eq. 12, or our budget with its controller."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import adaptive_rank
from ..adapters.network import AdaptiveRankNetwork

_LOSS_MEMORY = 0.98  # of the running mean of the loss, about 50 steps
_PROPORTIONAL = 30.0  # below target by more than 1/30 the term pulls ranks up
_LARGEST_FACTOR = 3.0  # of the proportional part, either way
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

    With targets for groups each has a κ of its own, and its part of the term counts by its share
    in all components, so that the whole is as strong as without groups.
    """

    def __init__(self, network: AdaptiveRankNetwork, steps: int):
        self.network = network
        self.gain = network.config.controller_gain / steps
        self.config = network.config
        self.shares = network.budget.shares  # (G,), of all components
        self.kappas = [self.config.rank_weight] * len(self.shares)
        self._levels = list(self.kappas)
        self.loss_mean: float | None = None

    def term(self, loss: Tensor) -> Tensor:
        """The term to add to ``loss`` (a scalar that only lends its size). Scalar."""
        network, nu = self.network, self.network.nu
        if self.config.mode == "fixed":
            return loss.new_zeros(())
        if self.config.mode == "paper":
            penalty = adaptive_rank.rank_penalty(
                nu, network.budget.targets[0], self.config.quantile
            )
            return self.config.rank_weight * penalty
        budgets = adaptive_rank.rank_budget(
            nu, network.rank_weights, network.target_ranks, self.config.quantile
        )  # (G,)
        size = loss.detach() if self.loss_mean is None else self.loss_mean
        parts = zip(self.kappas, self.shares, budgets.unbind(), strict=True)
        return torch.stack([kappa * size * share * budget for kappa, share, budget in parts]).sum()

    def observe(self, loss: float, mean_ranks: Sequence[float]) -> None:
        """Take in a finished step: its loss and, by group, the mean of the ranks in use, which are
        what the file will hold (ν rounds up to them, so steering by ν would overshoot)."""
        old = self.loss_mean
        self.loss_mean = loss if old is None else _LOSS_MEMORY * old + (1 - _LOSS_MEMORY) * loss
        if self.gain == 0 or self.config.rank_weight == 0:
            return
        for group, (mean, target) in enumerate(
            zip(mean_ranks, self.network.budget.targets, strict=True)
        ):
            self._steer(group, max(-1.0, min(1.0, mean / target - 1)))

    def state(self) -> dict[str, Any]:
        """What a later ``load_state`` needs to go on exactly."""
        return {
            "kappas": list(self.kappas),
            "levels": list(self._levels),
            "loss_mean": self.loss_mean,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take the place of the control that ``state`` was taken from: same groups."""
        if len(state["kappas"]) != len(self.shares):
            raise ValueError(
                f"The saved state steers {len(state['kappas'])} groups of ranks and this run "
                f"{len(self.shares)}: use the group_targets that it was saved with."
            )
        self.kappas, self._levels = list(state["kappas"]), list(state["levels"])
        self.loss_mean = state["loss_mean"]

    def _steer(self, group: int, excess: float) -> None:
        start, factor = self.config.rank_weight, 1 + _PROPORTIONAL * excess
        level = self._levels[group]
        if factor > -_LARGEST_FACTOR:
            # Pulling up at full strength already: a level that sank on would weaken the pull.
            moved = level * math.exp(self.gain * excess)
            level = max(start / _LARGEST_PUSH, min(start * _LARGEST_PUSH, moved))
        self._levels[group] = level
        self.kappas[group] = level * max(-_LARGEST_FACTOR, min(_LARGEST_FACTOR, factor))
