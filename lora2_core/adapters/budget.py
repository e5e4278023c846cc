"""How much rank the components of a network may take: limits, targets, weights and bytes.

No tensor of the model is touched here: what is asked for is checked against the shapes of the
layers before anything changes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import adaptive_rank
from ..config.ranks import RankConfig
from ..files.encode import component_shapes, encoded_bytes, kohya_key
from ..files.header import TensorShape
from ..files.metadata import COMPONENTS, listing_entry
from .targets import Target

# A run that is to fit into a number of bytes trains with this many times the room, and the SVD at
# its end cuts the surplus (resizing/fit.py). This much makes sure that the file gets full. More
# lowers the loss, and costs what a higher learning rate costs: on photographs pictures lose the
# place that the prompt asks for, with no gain in likeness (docs/method.md, "Room").
HEADROOM = 1.25
# What the metadata of a run takes beside its list of components: settings, captions, hashes.
METADATA_BYTES = 6_000
_USUAL_NU = 0.14391157031059265  # as many digits as most


@dataclass(frozen=True)
class RankBudget:
    """The budget of a network of L components in G groups. Made by :func:`plan_budget`."""

    min_ranks: Tensor  # (L,) int64
    max_ranks: Tensor  # (L,) int64
    weights: Tensor  # (G, L) fp32, what a rank counts in a group's budget; 0 outside the group
    targets: tuple[float, ...]  # (G,), mean rank, weighted so

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each group in the whole: 1 when there is one."""
        total = float(self.weights.double().sum())
        return tuple((self.weights.double().sum(-1) / total).tolist())

    def mean_ranks(self, ranks: Sequence[int]) -> tuple[float, ...]:
        """The mean rank of every group, (G,), weighted as its target is."""
        means = []
        for row in self.weights.tolist():
            means.append(sum(w * r for w, r in zip(row, ranks, strict=True)) / sum(row))
        return tuple(means)

    def per_component(self) -> Tensor:
        """The target of the group that each component is in, (L,) fp32."""
        group = self.weights.argmax(0)
        return torch.tensor(self.targets)[group]

    def start_nu(self, config: RankConfig) -> Tensor:
        """ν to start with, (L,)."""
        start = self.per_component() if config.start == "target" else self.max_ranks.float()
        # A small layer starts at its own limit, not beyond.
        start = torch.minimum(start, self.max_ranks.float())
        if config.mode == "fixed":
            start = start.floor()  # ranks round up; this one must not pass a budget
        start = torch.maximum(start, self.min_ranks.float())
        return adaptive_rank.nu_for_rank(1.0, config.quantile) / start

    def ranks_for(self, nu: Tensor, quantile: float) -> Tensor:
        """The rank that each ν, (L,), asks for, within its component's limits; (L,) int64."""
        return adaptive_rank.effective_rank(nu, quantile, self.max_ranks, self.min_ranks)

    def log_nu_bounds(self, quantile: float) -> tuple[Tensor, Tensor]:
        """Lowest and highest log ν that still decide a rank, (L,) each.

        Half a rank below the smallest Λ only fades; ν need not go further.
        """
        one = adaptive_rank.nu_for_rank(1.0, quantile)
        low = (one / self.max_ranks.float()).log()
        return low, (one / (self.min_ranks.double() - 0.5)).log().float()


def plan_budget(targets: Sequence[Target], config: RankConfig) -> RankBudget:
    """What ``config`` means for these layers. Raises ValueError for what they cannot take."""
    largest = max(target.largest_rank for target in targets)
    if config.max_rank is not None and config.max_rank > largest:
        raise ValueError(
            f"max_rank is {config.max_rank}; the largest layer of this model takes rank {largest}: "
            "lower it."
        )
    limits = [min(config.rank_limit, target.largest_rank) for target in targets]
    max_ranks = torch.tensor(limits)
    min_ranks = torch.tensor([min(config.min_rank, limit) for limit in limits])
    if config.target_megabytes is not None:
        weight, target = _in_bytes(targets, config, min_ranks, max_ranks)
        return RankBudget(min_ranks, max_ranks, weight[None], (target,))
    members = _groups(targets, config)
    aims = [(f"group_targets {group}", rank) for group, rank in config.group_targets]
    aims.append(("target_rank", config.target_rank))
    if not members[-1].any():  # every component is in a group
        members, aims = members[:-1], aims[:-1]
    for row, (name, rank) in zip(members, aims, strict=True):
        _check_reachable(name, rank, config, min_ranks[row], max_ranks[row])
    ranks = tuple(float(rank) for _, rank in aims)
    return RankBudget(min_ranks, max_ranks, members.float(), ranks)


def file_bytes(targets: Sequence[Target], ranks: Sequence[int]) -> int:
    """Size of an fp16 file of these ranks, header and METADATA_BYTES included."""
    shapes: dict[str, TensorShape] = {}
    listing: dict[str, dict[str, float | None]] = {}
    for target, rank in zip(targets, ranks, strict=True):
        key = kohya_key(target.name, target.root)
        kernel = (target.in_features,)  # as long in the header as a convolution's, to a few bytes
        shapes |= component_shapes(key, rank, kernel, target.out_features)
        listing[key] = listing_entry(_USUAL_NU, rank, target.in_features, target.out_features)
    text = {COMPONENTS: json.dumps(listing)}
    return encoded_bytes(shapes, text) + METADATA_BYTES


def expected_bytes(
    targets: Sequence[Target], budget: RankBudget, config: RankConfig, ranks: Sequence[int]
) -> int:
    """Size of the file to expect of a run that has ``ranks`` now, header included: what a budget
    in bytes allows, else at the target or, where the target is a pull and not a budget, as now."""
    if config.target_megabytes is not None:
        return int(config.target_megabytes * 1e6)
    if config.mode == "balanced":
        wanted = torch.minimum(budget.per_component().ceil().long(), budget.max_ranks)
        ranks = wanted.tolist()
    return file_bytes(targets, ranks)


def _in_bytes(
    targets: Sequence[Target], config: RankConfig, min_ranks: Tensor, max_ranks: Tensor
) -> tuple[Tensor, float]:
    """Weight of each component, (L,), and the mean rank to aim at for a size in megabytes."""
    megabytes = config.target_megabytes or 0.0
    low = file_bytes(targets, min_ranks.tolist())
    high = file_bytes(targets, max_ranks.tolist())
    if not low <= megabytes * 1e6 <= high:
        raise ValueError(
            f"target_megabytes is {megabytes:g}; {len(targets)} components of this model at ranks "
            f"{config.min_rank} to {config.rank_limit} give files of {_up(low)} to "
            f"{high / 1e6:.4g} MB: choose a size in between, or another max_rank."
        )
    # Components may differ in size: a budget in bytes weighs them by what a rank costs.
    cost = torch.tensor([float(target.parameters_per_rank) for target in targets])
    frame = file_bytes(targets, [1] * len(targets)) - 2 * float(cost.sum())
    within = (megabytes * 1e6 - frame) / (2 * float(cost.sum()))
    reachable = float((cost * max_ranks).sum() / cost.sum())
    aim = min(HEADROOM * within, reachable)
    logging.info(
        "LoRA²: a file of %.4g MB has room for a mean rank of %.2f; training aims at %.2f, and one "
        "SVD at the end cuts what is too much.",
        megabytes,
        within,
        aim,
    )
    return cost / cost.mean(), aim


def _groups(targets: Sequence[Target], config: RankConfig) -> Tensor:
    """Which components each of ``group_targets``, and last the rest, rules; (G + 1, L) bool."""
    free = torch.ones(len(targets), dtype=torch.bool)
    rows = []
    for group, _ in config.group_targets:
        row = torch.tensor([target.is_in(group) for target in targets]) & free
        if not row.any():
            raise ValueError(
                f"group_targets names {group!r}, but no adapted layer is in it that an earlier "
                "group does not hold already: leave it out, or change its place or the targets."
            )
        free = free & ~row
        rows.append(row)
    return torch.stack([*rows, free])


def _check_reachable(
    name: str, target: float, config: RankConfig, min_ranks: Tensor, max_ranks: Tensor
) -> None:
    high = float(max_ranks.double().mean())
    low = float(min_ranks.double().mean())
    if config.mode != "fixed" and target > high:
        raise ValueError(
            f"{name} is {target:g}; this model can reach a mean rank of {high:.4g} at most: "
            "lower it."
        )
    if config.mode != "paper" and target < low:
        raise ValueError(
            f"{name} is {target:g}; with min_rank {config.min_rank} the mean rank is {low:.4g} at "
            "least: raise it, or lower min_rank."
        )


def _up(nbytes: int) -> str:
    """Megabytes with three digits, rounded up: what is named as enough must be enough."""
    size = nbytes / 1e6
    unit = 10 ** (math.floor(math.log10(size)) - 2)
    return f"{math.ceil(size / unit) * unit:.3g}"
