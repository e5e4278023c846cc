"""Whether a file fits a model: its family, names that ComfyUI knows, shapes, sizes of numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import comfy.lora
import comfy.utils
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

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
_USUAL = 100.0  # no weight of a model is larger
_SUSPECT = 1e3  # no number of a rotation or magnitude is, either

# Names only depend on the model, which is asked for them at every change of a strength.
_names: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
_base_hashes: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()
_peaks: Any = WeakTensorKeyDictionary()  # the largest number of a tensor, for the same reason


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
    state = file.state
    empty = {
        key
        for _, keys in file.parsed.components()
        if any(not state[key].numel() for key in keys)
        for key in keys
    }
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
    if getattr(patch, "name", "") in ("oft", "boft"):
        return _rotation_misfit(patch, shape)
    try:
        theirs = _delta_shape(patch)
    except Mismatch as mismatch:
        return f"has halves that do not fit together, {mismatch}"
    if theirs is None:
        return ""
    reshaped = patch.weights[5] if getattr(patch, "name", "") == "lora" else None
    if reshaped is not None:
        if why := _reshape_misfit(reshaped, theirs, shape):
            return why
        shape, wanted = torch.Size(reshaped), theirs
    if theirs != wanted:
        there = "is {}×{} in the model and {}×{} in the file"
        return there.format(*wanted, *theirs)
    if isinstance(patch, tuple) and patch[1][0].shape != shape:  # ComfyUI would leave it out
        return f"is {_sizes(shape)} in the model and {_sizes(patch[1][0].shape)} in the file"
    scale = _dora_scale(patch)
    ones = [1 for _ in shape[2:]]
    if scale is None or [*scale.shape] in ([*shape[:1], 1, *ones], [1, *shape[1:2], *ones]):
        return ""
    sizes = _sizes(scale.shape)
    return f"has magnitudes (dora_scale) of {sizes}, which are none of a {wanted[0]}×{wanted[1]}"


def _reshape_misfit(reshaped: Any, theirs: tuple[int, int], shape: torch.Size) -> str:
    """Why a weight of ``shape`` cannot become what a LoRA wants it to be."""
    sound = isinstance(reshaped, list) and all(type(size) is int for size in reshaped)
    if not sound or len(reshaped) != len(shape) or any(map(operator.lt, reshaped, shape)):
        return f"would be reshaped from {_sizes(shape)} to {str(reshaped)[:60]}, which is no larger"
    if (reshaped[0], math.prod(reshaped[1:])) != theirs:
        return f"would be reshaped to {_sizes(reshaped)} and is {_sizes(theirs)} in the file"
    return ""


def _rotation_misfit(patch: Any, shape: torch.Size) -> str:
    """Why blocks of rotations (count, size, size), BOFT's with a step before, turn no weight."""
    blocks, rescale, alpha = patch.weights[:3]
    if not shape or blocks.shape[-3] * blocks.shape[-2] != shape[0]:
        return f"is {_sizes(shape)} in the model and is turned in blocks of {_sizes(blocks.shape)}"
    if patch.name == "oft":
        return ""
    steps, size = len(blocks), blocks.shape[-1]
    if alpha is None or size % 2 or steps > 30 or shape[0] % ((size // 2) << steps):
        return "has rotations (BOFT) without a constraint, or in blocks that do not divide it"
    if rescale is not None and torch.Size((shape[0], *(1 for _ in shape[1:]))) != rescale.shape:
        return f"has scales (rescale) of {_sizes(rescale.shape)} for a weight of {_sizes(shape)}"
    return ""


def _sizes(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a single number"


def too_large(patch: Any, strength: float, root: nn.Module, key: Any) -> bool:
    """Whether ``patch`` would turn the weight ``key`` of ``root`` into what is no number.

    What the sizes of its numbers rule out costs nothing; else the weight is calculated once, as
    ComfyUI will do it.
    """
    if not isinstance(key, str):
        return False
    path, _, name = key.rpartition(".")
    weight: Any = getattr(comfy.utils.get_attr(root, path) if path else root, name)
    shape, dtype = weight_of(root, key)
    if shape is None:
        return False
    stored = _stored_as(dtype)
    if _bound(patch, shape) * abs(strength) < torch.finfo(stored).max / 4 - _USUAL:
        return False
    known = torch.is_tensor(weight) and not weight.is_meta and weight.shape == shape
    start = weight.detach().float().cpu() if known else torch.zeros(shape)
    with torch.inference_mode():
        found = comfy.lora.calculate_weight(
            [(strength, patch, 1.0, None, None)], start.clone(), key
        )
    return not bool(found.to(stored).isfinite().all())


def _stored_as(dtype: torch.dtype | None) -> torch.dtype:
    """Whose range a weight must keep to: 8-bit types are scaled into theirs."""
    simple = dtype is not None and dtype.is_floating_point and dtype.itemsize > 1
    return dtype if dtype is not None and simple else torch.float32


def _bound(patch: Any, shape: torch.Size) -> float:
    """What no number that ``patch`` adds to a weight is above; infinite where that is not told."""
    if isinstance(patch, tuple):
        return _peak(patch[1][0])
    found, weights = math.inf, patch.weights
    match patch.name:
        case "lora":
            up, down, alpha, mid, *_ = weights
            rank = down.shape[0]
            found = rank * _peak(up) * _peak(down) * (1 if mid is None else rank * _peak(mid))
            found *= 1.0 if alpha is None else abs(alpha) / rank
        case "loha":
            first, second, third, fourth, one, two = (weights[n] for n in (0, 1, 3, 4, 5, 6))
            found = _product(first, second, one) * _product(third, fourth, two)
            found *= 1.0 if weights[2] is None else abs(weights[2]) / second.shape[0]
        case "lokr":
            w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, _ = weights
            found = _peak(w1) if w1 is not None else _product(w1_a, w1_b, None)
            found *= _peak(w2) if w2 is not None else _product(w2_a, w2_b, t2)
            ranks = [b.shape[0] for w, b in ((w1, w1_b), (w2, w2_b)) if w is None]
            found *= abs(alpha) / ranks[-1] if alpha is not None and ranks else 1.0
        case "glora":
            rank = max(weights[0].shape)
            found = rank * _peak(weights[2]) * _peak(weights[3])
            found += rank * shape.numel() * _USUAL * _peak(weights[0]) * _peak(weights[1])
            found *= 1.0 if weights[4] is None else abs(weights[4])
        case "oft" | "boft":
            blocks, rescale = weights[:2]
            scale = 1.0 if rescale is None else _peak(rescale)
            found = 2 * _USUAL * scale if _peak(blocks) < _SUSPECT else math.inf
    scale = _dora_scale(patch)
    if scale is not None and (_peak(scale) > _SUSPECT or found > _SUSPECT):
        return math.inf
    return found


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> float:
    return b.shape[0] * _peak(a) * _peak(b) * (1 if core is None else a.shape[0] * _peak(core))


def _peak(tensor: Tensor) -> float:
    """The largest number of a tensor, whatever its sign."""
    if not tensor.numel():
        return 0.0
    found = _peaks.get(tensor)
    if found is None:
        simple = tensor.is_floating_point() and tensor.itemsize > 1
        wide = tensor if simple else tensor.float()
        low, high = torch.aminmax(wide)
        found = _peaks[tensor] = max(abs(float(low)), abs(float(high)))
    return found


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
        up, down, _, mid, *_ = patch.weights
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
