"""Ranks that are given before a training and held: those of a finished run, or from gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....lora2_core.adapters.budget import file_bytes
from ....lora2_core.adapters.network import AdaptiveRankNetwork
from ....lora2_core.adapters.targets import Target, find_targets
from ....lora2_core.adaptive_rank import denoising_loss, nu_for_rank
from ....lora2_core.config.ranks import RankConfig
from ....lora2_core.config.train import TrainConfig
from ....lora2_core.files.encode import kohya_key
from ....tools.tiny_sdxl.evaluation.parts import Parts
from ....tools.tiny_sdxl.world.subjects import View
from .rivals import clean_task

DRAWS = 64  # passes whose mean gradient is looked at


def holding(config: TrainConfig, ranks: Mapping[str, int]) -> TrainConfig:
    """``config`` for a plain LoRA that has room for the largest of ``ranks``."""
    most = max(ranks.values())
    room = RankConfig.fixed(target_rank=float(most), max_rank=most, hysteresis=False)
    return replace(config, rank=room)


@torch.no_grad()
def give(network: AdaptiveRankNetwork, ranks: Sequence[int]) -> None:
    """Cut every component of a network that has learnt nothing yet to its rank."""
    nu = torch.tensor([nu_for_rank(rank, network.config.quantile) for rank in ranks])
    network.resize(nu)
    network.log_nu.copy_(nu.log())
    if network.ranks != list(ranks):
        raise ValueError("Some component cannot have the rank that it was given.")


def by_gradient(
    parts: Parts,
    photos: Sequence[View],
    config: TrainConfig,
    megabytes: float,
) -> dict[str, int]:
    """A rank for each component from the spectrum of the loss's gradient on the base.

    The largest squared singular values, each over the bytes that its rank costs, as many as fit
    into ``megabytes``; at least one of each.
    """
    task, unet = clean_task(parts, photos, config)
    targets = find_targets(unet)
    weights: list[Any] = [unet.get_submodule(one.name).weight for one in targets]
    for weight in weights:
        weight.requires_grad_(True)
    for batch in task.spread(torch.Generator().manual_seed(config.seed), DRAWS, config.batch_size):
        said = task.predict(batch)
        (denoising_loss(said.value, said.target) / DRAWS).backward()
    worth = [
        torch.linalg.svdvals(weight.grad.float()).square() / one.parameters_per_rank
        for weight, one in zip(weights, targets, strict=True)
    ]
    ranks = _fitting(worth, targets, megabytes)
    return {kohya_key(one.name): rank for one, rank in zip(targets, ranks, strict=True)}


def _fitting(worth: Sequence[Tensor], targets: Sequence[Target], megabytes: float) -> list[int]:
    """How many of each layer's are among the most valuable, of as many as the file has room for."""
    every = torch.cat(list(worth)).sort(descending=True).values

    def ranks(count: int) -> list[int]:
        return [max(1, int((one >= every[count - 1]).sum())) for one in worth]

    low, high = 1, len(every)
    while low < high:
        middle = (low + high + 1) // 2
        if file_bytes(targets, ranks(middle)) <= megabytes * 1e6:
            low = middle
        else:
            high = middle - 1
    return ranks(low)
