"""A training as far as it is known before a photo is encoded: whatever refuses it does so here.

Encoding takes minutes on a slow machine. So settings, packages, the device, MODEL, CLIP, VAE, the
cuts of the photos and the layers to adapt come first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters import budget
from ..adapters.budget import RankBudget, plan_budget
from ..adapters.swapping import computes_in_ram
from ..adapters.targets import Target, find_targets
from ..config.presets import AUTO
from ..config.train import TrainConfig
from ..data.cache import TensorCache, weights_hash
from ..data.cropping import Crop, crops
from ..data.photos import Photo
from ..training.memory import Memory, lasting
from ..training.optimizers.make import check_optimizer
from . import surface
from .checkpointing import blocks_of
from .class_images import paints
from .copies.text_encoders import TextEncoders
from .encoding import Encoder
from .models import (
    check_frozen_weights,
    check_model,
    check_precision,
    copy_in_ram,
    keep_in_eight_bits,
    keep_less,
)
from .running import raise_if_cancelled
from .surface import Part

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class TrainingPlan:
    """Made by :func:`plan_training`. The copies are in RAM; nothing of the card is taken yet."""

    model: ModelPatcher
    vae: Any
    photos: tuple[Photo, ...]
    class_photos: tuple[Photo, ...]
    config: TrainConfig
    disk: TensorCache
    encoder: Encoder
    cuts: tuple[tuple[Photo, Crop], ...]
    private: BaseModel
    base_hash: str
    live: TextEncoders | None  # text encoders to be trained
    targets: tuple[Target, ...]
    budget: RankBudget
    follows_memory: bool = False  # gradient checkpointing of as many blocks as memory asks for
    may_swap: bool = False  # weights of as many blocks wait in RAM as memory asks for

    @property
    def roots(self) -> dict[str, nn.Module]:
        """The networks that get adapters."""
        return _roots(self.private, self.live)

    @property
    def ranks(self) -> list[int]:
        """Of every component in the first step."""
        rank = self.config.rank
        return self.budget.ranks_for(self.budget.start_nu(rank), rank.quantile).tolist()

    @property
    def expected_bytes(self) -> int:
        """Size of the file to expect."""
        return budget.expected_bytes(self.targets, self.budget, self.config.rank, self.ranks)

    @property
    def least_memory(self) -> Memory:
        """What the run takes on its device before anything is computed, at the least."""
        swaps = self.leanest.block_swap and not computes_in_ram(self.model.load_device)
        return self.lasting_memory(blocks_of(self.private.diffusion_model) if swaps else ())

    @property
    def leanest(self) -> TrainConfig:
        """The settings, with all that a lack of memory can make of what is left to it."""
        swaps = self.may_swap and not computes_in_ram(self.model.load_device)
        twice = self.follows_memory or swaps
        return dataclasses.replace(
            self.config,
            gradient_checkpointing=self.config.gradient_checkpointing or twice,
            block_swap=self.config.block_swap or swaps,
        )

    def lasting_memory(self, swapped: Sequence[nn.Module] = ()) -> Memory:
        """The same where the weights of blocks ``swapped`` stay in RAM."""
        pairs = zip(self.targets, self.ranks, strict=True)
        parameters = sum(rank * target.parameters_per_rank for target, rank in pairs)
        return lasting(self.roots, parameters, self.config, swapped)


def check_settings(model: ModelPatcher, config: TrainConfig) -> None:
    """What settings alone decide on this machine, in a few milliseconds.

    Raises HostError for a model of another family, a part of ComfyUI that is not there, and a
    precision or a kind of frozen weights that the device does not know; OptimizerError for an
    optimizer that cannot work.
    """
    surface.need(Part.TRAINING)
    if config.text.learning_rate:
        surface.need(Part.TEXT)
    if config.samples.prompts:
        surface.need(Part.PAINTING)
    check_model(model)
    check_precision(model, config.precision)
    check_frozen_weights(model, config)
    check_optimizer(config, model.load_device)


def plan_training(
    model: ModelPatcher,
    clip: Any,
    vae: Any,
    photos: Sequence[Photo],
    config: TrainConfig,
    class_photos: Sequence[Photo] = (),
    cache: Path | None = None,
) -> TrainingPlan:
    """Check all of it and copy what is trained; no photo is encoded, and of texts the empty one.

    Arguments as :func:`.prepare.prepare_training` takes them. Raises as :func:`check_settings`
    does; HostError for a CLIP or VAE that does not fit or a model that cannot be copied,
    DatasetError for a mask that its photo's cut leaves out, and ValueError for targets and ranks
    that the model does not have.
    """
    asked, config = config, _settled(config)
    check_settings(model, config)
    if paints(config, class_photos):
        surface.need(Part.PAINTING)
    with torch.inference_mode(False):
        disk = TensorCache(cache)
        encoder = Encoder(model.model, clip, vae, disk)
        cuts = tuple(crops(photos, config))
        raise_if_cancelled()
        private = copy_in_ram(model, config.precision)
        base_hash = weights_hash(private.diffusion_model)  # the same in eight bits and in more
        if config.frozen_weights == "fp8":
            keep_in_eight_bits(private)
        if model.load_device.type != "cpu":  # which would take longer, and has RAM enough
            keep_less(private)
        trains_text = config.text.learning_rate > 0
        live = TextEncoders(clip, torch.device("cpu")) if trains_text else None
        targets = _targets(_roots(private, live), config)
        planned = plan_budget(targets, config.rank)
        raise_if_cancelled()
        encoder.text("")  # says when the CLIP is of another family; every run needs it
    follows_memory = asked.gradient_checkpointing == AUTO
    # Blocks whose weights wait are computed twice: not where a person has said no to that.
    may_swap = asked.block_swap == AUTO and asked.gradient_checkpointing is not False
    return TrainingPlan(
        model, vae, tuple(photos), tuple(class_photos), config, disk,
        encoder, cuts, private, base_hash, live, targets, planned, follows_memory, may_swap,
    )  # fmt: skip


def _settled(config: TrainConfig) -> TrainConfig:
    """``config`` without what is left to memory: how a run is computed decides nothing of it."""
    left = ("gradient_checkpointing", "block_swap")
    return dataclasses.replace(
        config, **{name: False for name in left if getattr(config, name) == AUTO}
    )


def _roots(private: BaseModel, live: TextEncoders | None) -> dict[str, nn.Module]:
    return {"unet": private.diffusion_model, **(live.roots if live else {})}


def _targets(roots: dict[str, nn.Module], config: TrainConfig) -> tuple[Target, ...]:
    selections = {root: config.text.targets for root in roots} | {"unet": config.targets}
    return tuple(
        target
        for root, module in roots.items()
        for target in find_targets(module, selections[root], root)
    )
