"""Whether a file fits a model: the model's family, names that ComfyUI knows, shapes of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import comfy.lora
import comfy.utils
import torch
from torch import Tensor, nn

from ..files.keys import DORA_SCALE, MAGNITUDES, plain_name
from ..files.kohya_names import kohya_name
from ..files.model_family import FAMILY_OF_CONTEXT, Family
from ..files.read import LoRAFile
from ..files.shapes import Mismatch, product_of_kind, product_of_pair

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
# Endings of a kind's tensors in the order in which ComfyUI keeps them; None: of no interest here.
_PLACES_OF = {
    "loha": ("hada_w1_a", "hada_w1_b", None, "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": (
        "lokr_w1", "lokr_w2", None, "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    ),
    "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
}  # fmt: skip
_DORA_SCALES = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5}

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
    """``file`` with the names of PEFT, which ComfyUI does not know, among ``names``."""
    new_names: dict[str, str] = {}
    new_keys: dict[str, str] = {}
    for name, keys in file.parsed.components():
        new = new_names[name] = _known_name(name, names)
        new_keys |= {key: new + key.removeprefix(name) for key in keys}
    state: dict[str, Tensor] = {}
    for key, tensor in file.state.items():
        end = next((end for end in MAGNITUDES if key.endswith(end)), None)
        if end is None:
            state[new_keys.get(key, key)] = tensor
        else:
            name = key.removesuffix(end)
            state[new_names.get(name, name) + DORA_SCALE] = _as_dora_scale(tensor)
    return file.with_state(state)


def without_empty(file: LoRAFile) -> dict[str, Tensor]:
    """The tensors without components of rank 0: they change nothing, and ComfyUI divides by it."""
    state, pairs = file.state, file.parsed.pairs
    empty = {key for pair in pairs if state[pair.down].shape[:1] == (0,) for key in pair.keys}
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


def shape_misfit(patch: Any, shape: torch.Size) -> str:
    """Why ``patch`` cannot change a weight of ``shape``; empty when it can.

    Of kinds whose result ComfyUI alone can tell nothing is said.
    """
    wanted = shape[0] if shape else 1, shape[1:].numel()
    try:
        theirs = _delta_shape(patch)
    except Mismatch as mismatch:
        return f"has halves that do not fit together, {mismatch}"
    if theirs is None:
        return ""
    if theirs != wanted:
        there = "is {}×{} in the model and {}×{} in the file"
        return there.format(*wanted, *theirs)
    scale = _dora_scale(patch)
    if scale is None or (scale.dim() == len(shape) and scale.numel() in shape[:2]):
        return ""
    sizes = "×".join(map(str, scale.shape)) or "a single number"
    return f"has magnitudes (dora_scale) of {sizes}, which are none of a {wanted[0]}×{wanted[1]}"


def weight_of(root: nn.Module, key: str) -> tuple[torch.Size | None, torch.dtype | None]:
    """Shape and type of a weight as it is stored; None for what cannot be told.

    Newer versions of ComfyUI keep a layer's weight elsewhere until it is used.
    """
    path, _, name = key.rpartition(".")
    layer: Any = comfy.utils.get_attr(root, path) if path else root
    weight: Any = getattr(layer, name)
    if weight is not None:
        return weight.shape, getattr(weight, "_qdata", weight).dtype
    if name == "weight" and isinstance(layer, nn.Conv2d):
        inner = layer.in_channels // layer.groups
        return torch.Size((layer.out_channels, inner, *layer.kernel_size)), None
    if name == "weight" and isinstance(layer, nn.Linear):
        return torch.Size((layer.out_features, layer.in_features)), None
    return None, None


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
    plain = plain_name(name)
    if name == plain or name in names:
        return name
    kohya = kohya_name(plain)
    return next((one for one in (kohya, *(f + plain for f in _PREFIXES)) if one in names), kohya)


def _as_dora_scale(magnitudes: Tensor) -> Tensor:
    """(out,) of a linear layer, (1, out, 1, 1) of a convolution → (out, 1, …)."""
    return magnitudes.reshape(-1, *(1 for _ in range(max(1, magnitudes.dim() - 1))))


def _delta_shape(patch: Any) -> tuple[int, int] | None:
    """(out, in · kernel) of what a patch adds; None where it does not say. Raises Mismatch."""
    if isinstance(patch, tuple):
        kind, values = patch
        if kind not in ("diff", "set") or len(values) != 1:
            return None
        shape = values[0].shape
        return shape[0] if shape else 1, shape[1:].numel()
    if patch.name == "lora":
        up, down, _, mid, _, reshape = patch.weights
        if reshape is not None:
            return None
        product = product_of_pair(down.shape, up.shape, None if mid is None else mid.shape)
    elif patch.name in _PLACES_OF:
        tensors = zip(_PLACES_OF[patch.name], patch.weights, strict=False)
        shapes = {f".{end}": tuple(t.shape) for end, t in tensors if end and t is not None}
        product = product_of_kind(patch.name, shapes)
    else:
        return None
    return product.out_features, product.in_features


def _dora_scale(patch: Any) -> Tensor | None:
    place = _DORA_SCALES.get(getattr(patch, "name", ""))
    return None if place is None else patch.weights[place]
