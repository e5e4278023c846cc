"""What a model calls its layers in every trainer's naming, and which family it is of."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import comfy.lora
from comfy.model_patcher import ModelPatcher

from ..made_for import Architecture

_FAMILIES = {"SDXL": "SDXL", "SDXLRefiner": "the SDXL refiner", "Flux": "Flux", "SD3": "SD3"}
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
    context = base.model_config.unet_config.get("context_dim")
    name = _FAMILIES.get(type(base).__name__)
    if name is None:
        name = _BY_CONTEXT.get(context or 0) or type(base).__name__
    return Architecture(name, context if isinstance(context, int) else None)


def remember_base_hash(model: ModelPatcher, precision: str, base_hash: str) -> None:
    """Note what a training has found, for LoRAs that are loaded on the same model."""
    _base_hashes.setdefault(model.model, {})[precision] = base_hash


def known_base_hash(model: ModelPatcher, precision: str) -> str:
    """The hash of the weights without any LoRA; empty where no training has asked for it."""
    return _base_hashes.get(model.model, {}).get(precision, "")
