"""From MODEL, CLIP, VAE and photos to what a training job needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.attention
import torch
from torch import Tensor, nn

from ..adapters.network import AdaptiveRankNetwork
from ..adapters.swapping import BlockSwap, computes_in_ram, is_swapped
from ..config.train import AS_PRECISION, TrainConfig
from ..data.cache import content_key, digest_of_each, named_weights_hash
from ..data.captions import variants
from ..data.cropping import Crop
from ..data.photos import Photo
from ..data.samples import Sample
from ..training import out_of_memory
from ..training.denoising import CachedTexts, DenoisingTask, TextSource
from ..training.estimate import Estimate, attempt
from ..training.memory import SDXL, scaled
from ..training.objective import CrossAttentionEntropy
from ..training.optimizers.make import block_of
from ..training.setup import TrainingSetup
from .checkpointing import blocks_of, checkpoint_blocks
from .class_images import class_images, class_samples, paints
from .encoding import Encoder
from .loading import bypass
from .loading.fitting import remember_base_hash
from .models import DTYPES, make_room, prediction_of, put_in_place
from .painting import Painter
from .plan import TrainingPlan, plan_training
from .running import free_memory, raise_if_cancelled

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def prepare_training(
    model: ModelPatcher,
    clip: Any,
    vae: Any,
    photos: Sequence[Photo],
    config: TrainConfig,
    class_photos: Sequence[Photo] = (),
    cache: Path | None = None,
) -> TrainingSetup:
    """Encode the photos and captions, copy the model and put adapters on the copy.

    ``class_photos``: for prior preservation; what lacks to ``config.data.class_images`` the model
    paints itself, once. ``cache``: a folder for encoded photos and texts; None keeps nothing on
    disk. May be called under inference mode, as nodes are. Raises as :func:`.plan.plan_training`
    does, before any photo is encoded, and HostError for a VAE that encodes no usable numbers.
    """
    return carry_out(plan_training(model, clip, vae, photos, config, class_photos, cache))


@torch.inference_mode(False)
def carry_out(plan: TrainingPlan) -> TrainingSetup:
    """The rest of :func:`prepare_training`. A plan is carried out once: its copies become the
    run's. Raises OutOfMemory where the device cannot hold what a run keeps there."""
    config, encoder, private = plan.config, plan.encoder, plan.private
    samples = _samples(encoder, plan.cuts, config)
    if plan.live is None:
        _read_ahead(encoder, samples, config)
    with _lack_of_memory_told(plan):
        unet, swap = private.diffusion_model, _put_in_place(plan)
    _remember_base(plan)
    prediction = prediction_of(plan.model)
    sampling = private.model_sampling.sigmas.float()
    identity = content_key(encoder.identity, prediction, sampling)  # of all beside the U-Net
    texts: TextSource = plan.live or CachedTexts(encoder.texts, next(unet.parameters()).device)
    painter = Painter(private, plan.vae, texts) if paints(config, plan.class_photos) else None
    painted_by = content_key(_painted_with(plan), identity)
    classes = class_images(plan.class_photos, painter, config, painted_by, plan.disk)
    extra = class_samples(encoder, classes, samples, config)
    network = _network(plan)
    cross = _cross_attention(unet)
    # The default on the CPU splits the attention into chunks, slow to differentiate.
    options = {"optimized_attention_override": _plain_attention}
    task = DenoisingTask(private, samples, texts, options, prediction, config, extra)
    measured = cross if config.entropy_weight > 0 else None
    free = free_memory() if plan.follows_memory or plan.may_swap else None
    blocks = blocks_of(unet)
    expected = attempt(network, task, measured, plan.roots, blocks, config, free)
    if swap is not None and expected is not None:
        with _lack_of_memory_told(plan):
            swap.keep_in_ram([blocks[number] for number in expected.swapped])
    return TrainingSetup(
        config=dataclasses.replace(config, precision=_name_of(unet.dtype)),
        network=network,
        task=task,
        entropy=cross,
        captions=tuple(photo.caption for photo in plan.photos),
        base_hash=plan.base_hash,
        data_hash=content_key(identity, _data_hash(plan.photos, classes)),
        data_parts={
            **_data_parts(plan.photos, plan.class_photos),
            "text and VAE": encoder.identity,
            "sampling": content_key(prediction, sampling),
        },
        painter=painter if config.samples.prompts else None,
        checkpointing=_checkpointed(plan, unet, cross, expected),
        enable_checkpointing=partial(checkpoint_blocks, unet, entropy=cross),
        estimate=expected,
    )


def _network(plan: TrainingPlan) -> AdaptiveRankNetwork:
    config = plan.config
    with _lack_of_memory_told(plan):
        made = AdaptiveRankNetwork(plan.roots, plan.targets, config.rank, config.seed, plan.budget)
        made.keep_apart(block_of(config.optimizer))
    return made


@contextmanager
def _lack_of_memory_told(plan: TrainingPlan) -> Iterator[None]:
    """Inside, an allocation that fails is told as one of a step is, with what would fit."""
    try:
        yield
    except Exception as error:
        if not out_of_memory.is_out_of_memory(error):
            raise
        needed, free = out_of_memory.needed_and_free(str(error))
        leanest, in_ram = plan.leanest, computes_in_ram(plan.model.load_device)
        twice = bool(leanest.gradient_checkpointing)
        told = out_of_memory.message(leanest, 0, needed, free, twice, in_ram=in_ram)
        raise out_of_memory.OutOfMemory(told) from error


def _put_in_place(plan: TrainingPlan) -> BlockSwap | None:
    make_room(plan.model)
    waiting = blocks_of(plan.private.diffusion_model) if _swaps(plan) else ()
    if plan.live is not None:  # there is room by now, and what is free has been looked at
        plan.live.move_to(plan.live.load_device)
    return put_in_place(plan.private, plan.model.load_device, waiting)


def _swaps(plan: TrainingPlan) -> bool:
    """Whether weights of blocks are to wait in RAM: where settings say so, or the model would
    not fit with what SDXL takes with every block computed twice."""
    if plan.config.block_swap or not plan.leanest.block_swap:
        return plan.config.block_swap is True
    twice = dataclasses.replace(plan.config, gradient_checkpointing=True)
    activations = scaled(SDXL, TrainConfig(), twice).activations
    free = free_memory()
    return free is not None and plan.lasting_memory().total + activations > free


def _checkpointed(
    plan: TrainingPlan, unet: nn.Module, cross: CrossAttentionEntropy, expected: Estimate | None
) -> bool:
    """Checkpoint the blocks that settings or free memory ask for; whether these are all."""
    fetched = any(map(is_swapped, blocks_of(unet)))
    if plan.config.gradient_checkpointing or (fetched and expected is None):
        checkpoint_blocks(unet, entropy=cross)
        return True
    if expected is None or not expected.twice:
        return False
    checkpoint_blocks(unet, entropy=cross, which=expected.twice)
    return len(expected.twice) == expected.blocks


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, kind in DTYPES.items() if kind == dtype)


def _samples(
    encoder: Encoder, cuts: Sequence[tuple[Photo, Crop]], config: TrainConfig
) -> list[Sample]:
    samples = []
    for photo, found in cuts:
        raise_if_cancelled()
        texts = variants(photo.caption, config.data, config.seed)
        sample = encoder.sample(found, texts)
        samples.append(dataclasses.replace(sample, repeats=photo.repeats))
    return samples


def _read_ahead(encoder: Encoder, samples: Sequence[Sample], config: TrainConfig) -> None:
    """Encode every text that training may ask for, so that the CLIP can leave the memory."""
    wanted = {text for sample in samples for text in sample.captions}
    wanted |= {*config.samples.prompts, "", config.data.class_prompt.strip()}
    for text in sorted(wanted):
        encoder.text(text)


def _cross_attention(unet: nn.Module) -> CrossAttentionEntropy:
    layers = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    kind = comfy.ldm.modules.attention.CrossAttention
    return CrossAttentionEntropy([layer for layer in layers if isinstance(layer, kind)])


def _remember_base(plan: TrainingPlan) -> None:
    model = plan.model
    if not model.patches and not bypass.branches_of(model):  # else it is not that of the base alone
        remember_base_hash(model, plan.config.precision, plan.base_hash)


def _painted_with(plan: TrainingPlan) -> str:
    """The weights that class images are painted with."""
    kept = plan.config.frozen_weights
    return plan.base_hash if kept == AS_PRECISION else f"{plan.base_hash} in {kept}"


def _data_hash(photos: Sequence[Photo], classes: Sequence[Photo]) -> str:
    parts: list[str | int | Tensor] = [len(photos)]  # where the class images begin
    for photo in [*photos, *classes]:
        parts += [photo.pixels, photo.caption, "" if photo.mask is None else photo.mask]
        if photo.repeats != 1:  # else a run from before there were any could not go on
            parts += ["repeats", photo.repeats]
    return content_key(*parts)


def _data_parts(photos: Sequence[Photo], classes: Sequence[Photo]) -> dict[str, str]:
    """Digests by which a person is told what has changed; of pixels a sample, as reading all of
    them once, for :func:`_data_hash`, takes long enough."""

    def digest(tensor: Tensor | None) -> str:
        return "" if tensor is None else named_weights_hash([("", tensor)])

    return {
        "photos": digest_of_each(digest(photo.pixels) for photo in photos),
        "masks": digest_of_each(digest(photo.mask) for photo in photos),
        "repeats": digest_of_each(str(photo.repeats) for photo in photos),
        "class images": digest_of_each(digest(photo.pixels) for photo in classes),
    }


def _plain_attention(_chosen: object, *args: Any, **kwargs: Any) -> Tensor:
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
