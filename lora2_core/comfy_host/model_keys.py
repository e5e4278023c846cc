"""What a model calls its layers in every trainer's naming, and which family it is of."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import comfy.lora
from comfy.model_patcher import ModelPatcher

from ..made_for import Architecture

_FAMILIES = {  # ComfyUI's classes → the names of made_for
    "SDXL": "SDXL", "SDXLRefiner": "the SDXL refiner", "SD3": "SD3", "AuraFlow": "AuraFlow",
    "StableCascade_C": "Stable Cascade", "StableCascade_B": "Stable Cascade",
    "Flux": "Flux", "Flux2": "Flux 2", "Chroma": "Chroma", "ChromaRadiance": "Chroma",
    "HunyuanVideo": "Hunyuan Video", "HunyuanVideoI2V": "Hunyuan Video",
    "HunyuanVideo15": "Hunyuan Video", "HunyuanDiT": "Hunyuan DiT", "QwenImage": "Qwen-Image",
    "WAN21": "Wan", "WAN22": "Wan", "WAN21_Vace": "Wan", "WAN22_Animate": "Wan",
    "PixArt": "PixArt", "LTXV": "LTX-Video", "GenmoMochi": "Mochi", "HiDream": "HiDream",
}  # fmt: skip
_LUMINA = {2304: "Lumina 2", 3840: "Z-Image"}  # by the width that their blocks have
_BY_CONTEXT = {768: "SD 1.5", 1024: "SD 2", 2048: "SDXL"}

# Names only depend on the model, which is asked for them at every change of a strength.
_names: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
_base_hashes: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()


def layer_names(model: ModelPatcher, clip: Any | None) -> dict[str, Any]:
    """Every name that a LoRA may have for a layer → the key of the layer's weight."""
    names = _of(model.model, comfy.lora.model_lora_keys_unet)
    if clip is None:
        return names
    return names | _of(clip.cond_stage_model, comfy.lora.model_lora_keys_clip)


def _of(module: Any, find: Any) -> dict[str, Any]:
    if module not in _names:
        _names[module] = find(module, {})
    return _names[module]


def family_of(model: ModelPatcher) -> Architecture:
    """The family of a model, as people call it."""
    base = model.model
    config = base.model_config.unet_config
    context = config.get("context_dim")
    name = _FAMILIES.get(type(base).__name__)
    if type(base).__name__ == "Lumina2":
        name = _LUMINA.get(config.get("dim", 0), "Lumina 2 or Z-Image")
    if name is None:
        name = _BY_CONTEXT.get(context or 0) or type(base).__name__
    return Architecture(name, context if isinstance(context, int) else None)


def remember_base_hash(model: ModelPatcher, precision: str, base_hash: str) -> None:
    """Note what a training has found, for LoRAs that are loaded on the same model."""
    _base_hashes.setdefault(model.model, {})[precision] = base_hash


def known_base_hash(model: ModelPatcher, precision: str) -> str:
    """The hash of the weights without any LoRA; empty where no training has asked for it."""
    return _base_hashes.get(model.model, {}).get(precision, "")
