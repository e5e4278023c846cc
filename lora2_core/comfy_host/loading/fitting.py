"""Whether a file fits a model: its family, and names that ComfyUI knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import comfy.lora
from torch import Tensor

from ...files.decode import as_dora_scale
from ...files.header import shown_key
from ...files.keys import ALPHA, DORA_SCALE, plain_name
from ...files.kohya_names import kohya_name
from ...files.model_family import FAMILY_OF_CONTEXT, Family
from ...files.read import LoRAFile

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_FAMILIES = {  # ComfyUI's classes → names of families, as in files/model_family.py
    "SDXL": "SDXL", "SDXLRefiner": "the SDXL refiner", "SD3": "SD3", "AuraFlow": "AuraFlow",
    "StableCascade_C": "Stable Cascade", "StableCascade_B": "Stable Cascade",
    "Flux": "Flux", "Flux2": "Flux 2", "Chroma": "Chroma", "ChromaRadiance": "Chroma",
    "HunyuanVideo": "Hunyuan Video", "HunyuanVideoI2V": "Hunyuan Video",
    "HunyuanVideo15": "Hunyuan Video", "HunyuanDiT": "Hunyuan DiT", "QwenImage": "Qwen-Image",
    "WAN21": "Wan", "WAN22": "Wan", "WAN21_Vace": "Wan", "WAN22_Animate": "Wan",
    "PixArt": "PixArt", "LTXV": "LTX-Video", "GenmoMochi": "Mochi", "HiDream": "HiDream",
}  # fmt: skip
_LUMINA = {2304: "Lumina 2", 3840: "Z-Image"}  # by the width that their blocks have
# What ComfyUI may want before a name that PEFT wrote.
_PREFIXES = ("", "diffusion_model.", "transformer.", "unet.", "text_encoders.")

# Names only depend on the model, which is asked for them at every change of a strength.
_names: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
_base_hashes: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()


def layer_names(model: ModelPatcher, clip: Any | None) -> dict[str, Any]:
    """Every name that a LoRA may have for a layer → the key of the layer's weight."""
    names = _names_of(model.model, comfy.lora.model_lora_keys_unet)
    if clip is None:
        return names
    return names | _names_of(clip.cond_stage_model, comfy.lora.model_lora_keys_clip)


def in_known_names(file: LoRAFile, names: Mapping[str, Any]) -> LoRAFile:
    """``file`` with the names of PEFT, which ComfyUI does not know, among ``names``.

    Raises ValueError where two tensors would have the same.
    """
    new_keys: dict[str, str] = {}
    for name, keys in file.parsed.components():
        new = _known_name(name, names)
        new_keys |= {key: new + key.removeprefix(name) for key in keys}
    magnitudes = {
        pair.dora_scale: _known_name(pair.name, names) + DORA_SCALE
        for pair in file.parsed.pairs
        if pair.dora_scale and not pair.dora_scale.endswith(DORA_SCALE)
    }
    new_keys |= magnitudes
    old: dict[str, str] = {}
    for key in file.state:
        if (first := old.setdefault(new_keys.get(key, key), key)) != key:
            raise ValueError(f"a layer twice ({shown_key(first)} and {shown_key(key)})")
    state = {
        new: as_dora_scale(file.state[key]) if key in magnitudes else file.state[key]
        for new, key in old.items()
    }
    return file.with_state(state)


def without_empty(file: LoRAFile) -> dict[str, Tensor]:
    """The tensors without components of rank 0: they change nothing, and ComfyUI divides by it.

    Nor an alpha of nothing that is no single number: ComfyUI reads it all the same.
    """
    state = file.state
    empty = {
        key
        for _, keys in file.parsed.components()
        if any(not state[key].numel() for key in keys)
        for key in keys
    }
    empty |= {k for k in file.parsed.unknown if k.endswith(ALPHA) and state[k].numel() != 1}
    return {key: tensor for key, tensor in state.items() if key not in empty} if empty else state


def family_of(model: ModelPatcher) -> Family:
    """The family of a model, as people call it."""
    base = model.model
    config = base.model_config.unet_config
    context = config.get("context_dim")
    name = _FAMILIES.get(type(base).__name__)
    if type(base).__name__ == "Lumina2":
        name = _LUMINA.get(config.get("dim", 0), "Lumina 2 or Z-Image")
    if name is None:
        name = FAMILY_OF_CONTEXT.get(context or 0) or type(base).__name__
    return Family(name, context if isinstance(context, int) else None)


def remember_base_hash(model: ModelPatcher, precision: str, base_hash: str) -> None:
    """Note what a training has found, for LoRAs that are loaded on the same model."""
    _base_hashes.setdefault(model.model, {})[precision] = base_hash


def known_base_hash(model: ModelPatcher, precision: str) -> str:
    """The hash of the weights without any LoRA; empty where no training has asked for it."""
    return _base_hashes.get(model.model, {}).get(precision, "")


def _names_of(module: Any, find: Any) -> dict[str, Any]:
    if module not in _names:
        _names[module] = find(module, {})
    return _names[module]


def _known_name(name: str, names: Mapping[str, Any]) -> str:
    """The name that ComfyUI has for the layer; its own where it has none."""
    if name in names:
        return name
    plain = plain_name(name)
    kohya = kohya_name(plain)
    found = next((one for one in (kohya, *(f + plain for f in _PREFIXES)) if one in names), None)
    return found or (name if name == plain else kohya)
