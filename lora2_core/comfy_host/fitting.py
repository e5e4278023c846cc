"""Whether what a file holds fits a model: names that ComfyUI knows, and shapes of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import comfy.utils
import torch
from torch import Tensor, nn

from .. import lora_keys, lora_names, lora_shapes

# What ComfyUI may want before a name that PEFT wrote.
_PLACES = ("", "diffusion_model.", "transformer.", "unet.", "text_encoders.")


def in_known_names(state: Mapping[str, Tensor], names: Mapping[str, Any]) -> dict[str, Tensor]:
    """``state`` with the names of PEFT, which ComfyUI does not know, among ``names``."""
    out = dict(_with_scales(state))
    if not any(key != lora_keys.plain_name(key) for key in out):
        return out
    new: dict[str, str] = {}
    for name, keys in _components(lora_keys.split(out)):
        plain = lora_keys.plain_name(name)
        if name == plain or name in names:
            continue
        kohya = lora_names.kohya_name(plain)
        found = next((p for p in (kohya, *(f + plain for f in _PLACES)) if p in names), kohya)
        new |= {key: found + key.removeprefix(name) for key in keys}
    return {new.get(key, key): tensor for key, tensor in out.items()}


def _with_scales(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in state.items():
        end = next((end for end in lora_keys.MAGNITUDES if key.endswith(end)), None)
        if end is None:
            yield key, tensor
        else:  # (out,) of a linear layer, (1, out, 1, 1) of a convolution → (out, 1, …)
            scale = tensor.reshape(-1, *(1 for _ in range(max(1, tensor.dim() - 1))))
            yield key.removesuffix(end) + lora_keys.DORA_SCALE, scale


def _components(parts: lora_keys.Parts) -> Iterator[tuple[str, tuple[str, ...]]]:
    for pair in parts.pairs:
        yield pair.name, pair.keys
    for components in parts.others.values():
        yield from components.items()


def without_empty(state: dict[str, Tensor], parts: lora_keys.Parts) -> dict[str, Tensor]:
    """``state`` without components of rank 0: they change nothing, and ComfyUI divides by it."""
    empty = {key for pair in parts.pairs if state[pair.down].shape[:1] == (0,) for key in pair.keys}
    return {key: tensor for key, tensor in state.items() if key not in empty} if empty else state


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


def misfit(patch: Any, shape: torch.Size) -> str:
    """Why ``patch`` cannot change a weight of ``shape``; empty when it can.

    Of kinds whose result ComfyUI alone can tell nothing is said.
    """
    wanted = shape[0] if shape else 1, shape[1:].numel()
    try:
        found = _delta_shape(patch)
    except lora_shapes.Mismatch as mismatch:
        return f"has halves that do not fit together, {mismatch}"
    if found is None:
        return ""
    if found != wanted:
        there = "is {}×{} in the model and {}×{} in the file"
        return there.format(*wanted, *found)
    scale = _dora_scale(patch)
    if scale is None or (scale.dim() == len(shape) and scale.numel() in shape[:2]):
        return ""
    sizes = "×".join(map(str, scale.shape)) or "a single number"
    return f"has magnitudes (dora_scale) of {sizes}, which are none of a {wanted[0]}×{wanted[1]}"


# Endings of a kind's tensors in the order in which ComfyUI keeps them; None: of no interest here.
_PLACES_OF = {
    "loha": ("hada_w1_a", "hada_w1_b", None, "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": (
        "lokr_w1", "lokr_w2", None, "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    ),
    "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
}  # fmt: skip
_DORA_SCALES = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5}


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
        found = lora_shapes.of_pair(down.shape, up.shape, None if mid is None else mid.shape)
    elif patch.name in _PLACES_OF:
        tensors = zip(_PLACES_OF[patch.name], patch.weights, strict=False)
        shapes = {f".{end}": tuple(t.shape) for end, t in tensors if end and t is not None}
        found = lora_shapes.of_other(patch.name, shapes)
    else:
        return None
    return found.out_features, found.in_features


def _dora_scale(patch: Any) -> Tensor | None:
    place = _DORA_SCALES.get(getattr(patch, "name", ""))
    return None if place is None else patch.weights[place]
