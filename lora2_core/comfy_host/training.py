"""From MODEL, CLIP, VAE and photos to what a training job needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import torch
from comfy.ldm.modules.attention import CrossAttention, attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..config import TrainConfig
from ..dataset import Photo, Sample, crop
from ..denoising import DenoisingTask
from ..network import AdaptiveRankNetwork, fingerprint
from ..objective import CrossAttentionEntropy
from ..targets import find_targets
from .errors import HostError
from .models import DTYPES, check_model, prediction_of, private_copy


@dataclass(frozen=True)
class TrainingSetup:
    """Everything a training job needs, none of it shared with the user's own model."""

    config: TrainConfig  # as asked, with the precision that ``auto`` came to
    network: AdaptiveRankNetwork
    task: DenoisingTask
    entropy: CrossAttentionEntropy
    base_hash: str


def prepare_training(
    model: ModelPatcher, clip: Any, vae: Any, photos: Sequence[Photo], config: TrainConfig
) -> TrainingSetup:
    """Encode the photos and captions, copy the model and put adapters on the copy.

    May be called under inference mode, as nodes are. Raises HostError for a model, CLIP or VAE
    that does not fit, and ValueError for settings that do not fit the model.
    """
    check_model(model)
    with torch.inference_mode():
        encoded = encode_samples(model, clip, vae, photos, config.resolution)
    with torch.inference_mode(False):
        # A tensor made in inference mode cannot take part in a backward pass; its clone can.
        samples = [Sample(s.latent.clone(), s.context.clone(), s.vector.clone()) for s in encoded]
        private = private_copy(model, config.precision)
        base_hash = fingerprint(private.diffusion_model)
        targets = find_targets(private.diffusion_model, config.targets)
        network = AdaptiveRankNetwork(private.diffusion_model, targets, config.rank, config.seed)
        layers = [m for n, m in private.diffusion_model.named_modules() if n.endswith(".attn2")]
        cross = CrossAttentionEntropy([m for m in layers if isinstance(m, CrossAttention)])
        # The default on the CPU splits the attention into chunks, slow to differentiate.
        options = {"optimized_attention_override": _plain_attention}
        task = DenoisingTask(private, samples, options, prediction_of(model))
        used = {dtype: name for name, dtype in DTYPES.items()}[private.diffusion_model.dtype]
        resolved = dataclasses.replace(config, precision=used)
        return TrainingSetup(resolved, network, task, cross, base_hash)


def encode_samples(
    model: ModelPatcher, clip: Any, vae: Any, photos: Sequence[Photo], resolution: int
) -> list[Sample]:
    """Latents, text embeddings and size conditioning of all photos, on the CPU.

    Each caption is encoded once. Raises HostError when ``clip`` or ``vae`` is of another family.
    """
    base = model.model
    texts = {text: _encode_text(base, clip, text) for text in {p.caption for p in photos}}
    samples = []
    for photo in photos:
        cut = crop(photo, resolution)
        context, pooled = texts[photo.caption]
        vector: Any = base.encode_adm(
            pooled_output=pooled,
            width=cut.original_size[0],
            height=cut.original_size[1],
            crop_w=cut.offset[0],
            crop_h=cut.offset[1],
            target_width=resolution,
            target_height=resolution,
        )
        samples.append(Sample(_encode_image(base, vae, cut.pixels), context, _plain(vector)[0]))
    return samples


def _plain_attention(_chosen: object, *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)


def _encode_text(base: comfy.model_base.BaseModel, clip: Any, text: str) -> tuple[Tensor, Tensor]:
    context, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    config = base.model_config.unet_config
    widths = context.shape[-1], 0 if pooled is None else pooled.shape[-1]
    wanted = config["context_dim"], config["adm_in_channels"] - 1536
    if pooled is None or widths != wanted:
        raise HostError(
            f"clip gives text embeddings of width {widths[0]} and {widths[1]} where the model "
            f"takes {wanted[0]} and {wanted[1]}; connect the CLIP of the same checkpoint."
        )
    return _plain(context)[0], _plain(pooled)


def _encode_image(base: comfy.model_base.BaseModel, vae: Any, pixels: Tensor) -> Tensor:
    latent = vae.encode(pixels[None])
    if latent.ndim != 4 or latent.shape[1] != 4:
        raise HostError(
            f"vae gives latents of shape {tuple(latent.shape)} where SDXL takes 4 channels; "
            "connect the VAE of the same checkpoint."
        )
    scaled = base.process_latent_in(_plain(latent))[0]
    if not scaled.isfinite().all():
        raise HostError(
            "vae gave latents that are not finite; SDXL's own VAE overflows in fp16: start ComfyUI "
            "with --fp32-vae or load the fp16-fix VAE."
        )
    return scaled


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().cpu()
