"""The demo model in this process, and what the host tests ask of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.data.photos import Photo
from lora2_pack.lora2_core.tiny_sdxl.model import (
    UNET_CONFIG,
    autoencoder_weights,
    fill_trained,
    fill_untrained,
    text_configs,
)
from torch import Tensor

CPU = torch.device("cpu")


def build(seed: int | None = 0) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE in the demo's shape: untrained from a seed, or as people get them."""
    untrained = partial(fill_untrained, seed=seed or 0)
    fill = fill_trained if seed is None else untrained
    with torch.inference_mode():
        model, clip = comfy_host.build_sdxl(UNET_CONFIG, text_configs(), fill)
        # As ComfyUI's loaders hold it, which is not always as the demo model's node does.
        held = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        again: Any = model.cached_patcher_init
        model = held(model.model, model.load_device, model.offload_device)
        model.cached_patcher_init = again
        return model, clip, comfy_host.build_autoencoder(autoencoder_weights())


def lora_key_map(base: Any) -> dict[str, str]:
    """ComfyUI's own map from LoRA keys to weights that exist in a model."""
    keys = comfy.lora.model_lora_keys_unet(base, {})
    present = base.state_dict().keys()
    return {key: weight for key, weight in keys.items() if weight in present}


def weights(model: Any) -> dict[str, Tensor]:
    """Every weight of a MODEL as it would sample now, cloned: as the classic patcher merges it."""
    if getattr(model, "is_dynamic", bool)():
        comfy.model_management.free_memory(1e30, model.load_device)
        model, patched = comfy.model_patcher.ModelPatcher(model.model, CPU, CPU), model
        model.patches = {key: list(found) for key, found in patched.patches.items()}
        model.patches_uuid = patched.patches_uuid
        try:
            return weights(model)
        finally:
            comfy.model_management.free_memory(1e30, CPU)
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def in_scaled_fp8(layer: torch.nn.Linear) -> Any:
    """The layer, without its bias, in fp8 with a scale beside it, as this ComfyUI's loaders do."""
    scale = layer.weight.detach().abs().max() / 400
    weight = (layer.weight.detach() / scale).to(torch.float8_e4m3fn)
    if hasattr(comfy.ops, "scaled_fp8_ops"):  # until 0.4.0
        kind = comfy.ops.scaled_fp8_ops(override_dtype=weight.dtype).Linear
        new = kind(layer.in_features, layer.out_features, bias=False, dtype=torch.float32)
        new.weight = torch.nn.Parameter(weight, False)
        new.scale_weight = torch.nn.Parameter(scale, False)
        return new
    kind = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32).Linear
    new = kind(layer.in_features, layer.out_features, bias=False)
    told = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    new.load_state_dict({"weight": weight, "weight_scale": scale, "comfy_quant": told})
    return new


def photos(count: int = 3) -> list[Photo]:
    """Photos of nothing, always the same."""
    generator = torch.Generator().manual_seed(7)
    return [
        Photo(torch.rand(80 + 8 * n, 96, 3, generator=generator), f"a photo of sks cat {n}")
        for n in range(count)
    ]


def settings(**changes: Any) -> TrainConfig:
    """A training of a second or two."""
    rank = RankConfig.balanced(target_rank=2.0, max_rank=8)
    small = {"steps": 3, "resolution": 64, "learning_rate": 1e-2, "probes": 1, "rank": rank}
    return TrainConfig(**{**small, **changes})


def sample(base: comfy.model_base.BaseModel) -> Tensor:
    """One pass of the model on a fixed input."""
    generator = torch.Generator().manual_seed(3)
    config = base.model_config.unet_config
    with torch.no_grad():
        return base.apply_model(
            torch.randn(1, 4, 8, 8, generator=generator),
            torch.tensor([2.0]),
            c_crossattn=torch.randn(1, 77, config["context_dim"], generator=generator),
            y=torch.randn(1, config["adm_in_channels"], generator=generator),
        )


def weights_of(model: Any, through: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of the U-Net in fp32, rounded to another type on the way."""
    weights = model.model.diffusion_model.state_dict()
    return {n: w.to(through).float() if through else w.float().clone() for n, w in weights.items()}


def stored(
    model: Any, dtype: torch.dtype, computes: torch.dtype
) -> comfy.model_patcher.ModelPatcher:
    """The MODEL with its weights stored in ``dtype``, as ComfyUI loads a checkpoint that way."""
    config = comfy.supported_models.SDXL(dict(UNET_CONFIG))
    config.set_inference_dtype(dtype, computes)
    with torch.inference_mode():
        base = config.get_model({}, "", CPU)
        rounded = {name: value.to(dtype) for name, value in weights_of(model).items()}
        base.diffusion_model.load_state_dict(rounded)
    assert {p.dtype for p in base.diffusion_model.parameters()} == {dtype}
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)
