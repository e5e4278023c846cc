"""LoRAs as model patches, as the stock loader makes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..lora_file import component_keys
from .errors import HostError


def apply_state(
    model: ModelPatcher,
    clip: Any | None,
    state: Mapping[str, Tensor],
    strength_model: float,
    strength_clip: float,
    source: str,
) -> tuple[ModelPatcher, Any | None]:
    """Clones of ``model`` and ``clip`` with a LoRA as patches, as the stock loader makes them.

    Every layer may have its own rank. Raises HostError, naming ``source``, when the LoRA fits no
    layer of the model or was made for layers of another shape.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(state)), keys, False)
    if not patches:
        raise HostError(
            f"{source} fits no layer of the connected model ({type(model.model).__name__}); it "
            "was trained for another architecture. Choose a LoRA for this model."
        )
    shapes = {key: weight.shape for key, weight in model.model.state_dict().items()}
    for key, patch in patches.items():
        _check_shape(key, patch, shapes.get(key), source)
    new_model = model.clone()
    applied = set(new_model.add_patches(patches, strength_model))
    new_clip = None if clip is None else clip.clone()
    if new_clip is not None:
        applied |= set(new_clip.add_patches(patches, strength_clip))
    unused = len(component_keys(state)) - len(applied)
    if unused > 0:
        hint = "" if clip is not None else " (those of the text encoders need clip connected)"
        logging.warning("LoRA²: %s: %d components fit no layer%s.", source, unused, hint)
    return new_model, new_clip


def _check_shape(key: str, patch: Any, shape: torch.Size | None, source: str) -> None:
    weights = getattr(patch, "weights", None)
    if shape is None or weights is None or getattr(patch, "name", "") != "lora":
        return  # text encoders, and other kinds of patch, are ComfyUI's business
    up, down, _, middle, _, reshape = weights
    if middle is not None or reshape is not None:
        return
    if (up.shape[0], down[0].numel()) != (shape[0], shape[1:].numel()):
        raise HostError(
            f"{source} was trained for another architecture: {key} is "
            f"{shape[0]}×{shape[1:].numel()} in the model and {up.shape[0]}×{down[0].numel()} in "
            "the file. Choose a LoRA for this model."
        )
