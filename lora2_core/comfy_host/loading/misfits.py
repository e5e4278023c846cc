"""Whether a patch fits its weight, in shape and in the sizes of its numbers.

ComfyUI writes an error where a patch does not fit, and samples without it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.utils
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...files.shapes import Mismatch, product_of_kind, product_of_pair

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# Endings of a kind's tensors in the order in which ComfyUI keeps them; None: of no interest here.
_PLACES_OF = {
    "loha": ("hada_w1_a", "hada_w1_b", None, "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": (
        "lokr_w1", "lokr_w2", None, "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    ),
}  # fmt: skip
_DORA_SCALES = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5, "oft": 3, "boft": 3}
_USUAL = 100.0  # no weight of a model is larger
_SUSPECT = 1e3  # no number of a rotation or magnitude is, either
_MOST_GROWTH = 8  # of a weight that is made larger: the largest in use, Flux Fill's, grows by 6

# The largest number of a tensor; it is asked for at every change of a strength.
_peaks: Any = WeakTensorKeyDictionary()


def shape_misfit(patch: Any, shape: torch.Size) -> str:
    """Why ``patch`` cannot change a weight of ``shape``; empty when it can.

    Of kinds whose result ComfyUI alone can tell nothing is said.
    """
    wanted = shape[0] if shape else 1, shape[1:].numel()
    kind = getattr(patch, "name", "")
    if kind in ("oft", "boft"):
        return _rotation_misfit(patch, shape) or _magnitude_misfit(patch, shape)
    if kind == "glora":
        return _glora_misfit(patch.weights, shape) or _magnitude_misfit(patch, shape)
    try:
        theirs = _delta_shape(patch)
    except Mismatch as mismatch:
        return f"has halves that do not fit together, {mismatch}"
    if theirs is None:
        return ""
    reshaped = patch.weights[5] if kind == "lora" else None
    if reshaped is not None:
        if why := _reshape_misfit(reshaped, theirs, shape):
            return why
        shape, wanted = torch.Size(reshaped), theirs
    if theirs != wanted:
        there = "is {}×{} in the model and {}×{} in the file"
        return there.format(*wanted, *theirs)
    if isinstance(patch, tuple) and patch[1][0].shape != shape:  # ComfyUI would leave it out
        return f"is {_sizes(shape)} in the model and {_sizes(patch[1][0].shape)} in the file"
    return _magnitude_misfit(patch, shape)


def _magnitude_misfit(patch: Any, shape: torch.Size) -> str:
    """Why a DoRA's magnitudes are not those of the rows or the columns of a weight."""
    scale = _dora_scale(patch)
    if scale is None:
        return ""
    ones = [1 for _ in shape[2:]]
    matrix = len(shape) > 1
    if matrix and [*scale.shape] in ([shape[0], 1, *ones], [1, shape[1], *ones]):
        return ""
    return f"has magnitudes (dora_scale) of {_sizes(scale.shape)}, none of a weight {_of(shape)}"


def _glora_misfit(weights: Any, shape: torch.Size) -> str:
    """Why a1 · a2 cannot be multiplied with a weight of ``shape``, or b1 · b2 be added to it.

    New files multiply its input channels, old ones, transposed, its unrolled inputs.
    """
    shapes = [tensor.shape for tensor in weights[:4]]
    sizes = ", ".join(map(_sizes, shapes))
    if len(shape) > 1 and min(map(len, shapes)) > 1:
        a1, a2, b1, b2 = (tensor.flatten(1).shape for tensor in weights[:4])
        inside = shape[1:].numel()
        old = _is_old_glora(shapes, shape)
        if old:
            a1, a2, b1, b2 = a2, a1, b2, b1
        channels = inside if old else shape[1]
        chain = a1[1] == a2[0] and b1[1] == b2[0] and old is not None
        if chain and a1[0] == a2[1] == channels and (b1[0], b2[1]) == (shape[0], inside):
            return ""
    return f"has factors (GLoRA) of {sizes}, none of a weight {_of(shape)}"


def _is_old_glora(shapes: Sequence[torch.Size], shape: torch.Size) -> bool | None:
    """Which of both ComfyUI takes four factors for, by their first two sizes; None: for neither."""
    a1, a2, b1, b2 = shapes
    new, old = b2[0] == b1[1] == a1[1] == a2[0], b2[1] == b1[0] == a1[0] == a2[1]
    if new:
        return old and a2[0] == shape[0] == shape[1]
    return True if old else None


def without_core(patch: Any) -> Any:
    """``patch`` with a LoKr's core (LyCORIS: ``use_tucker``) multiplied out, its scale with it.

    ComfyUI gives PyTorch the product as it comes, which ``torch.kron`` refuses for its strides.
    """
    if getattr(patch, "name", "") != "lokr" or patch.weights[1] is not None:
        return patch
    w1, _, alpha, w1_a, w1_b, w2_a, w2_b, core, dora_scale = patch.weights
    if core is None:
        return patch
    w2 = torch.einsum("ijkl,jr,ip->prkl", core.float(), w2_b.float(), w2_a.float()).contiguous()
    if alpha is not None:
        w2 *= alpha / w2_b.shape[0]
    weights = (w1, w2, None, w1_a, w1_b, None, None, None, dora_scale)
    return type(patch)(patch.loaded_keys, weights)


def _reshape_misfit(reshaped: Any, theirs: tuple[int, int], shape: torch.Size) -> str:
    """Why a weight of ``shape`` cannot become what a LoRA wants it to be."""
    sound = isinstance(reshaped, list) and all(type(size) is int for size in reshaped)
    if not sound or len(reshaped) != len(shape) or any(map(operator.lt, reshaped, shape)):
        return f"would be reshaped from {_sizes(shape)} to {str(reshaped)[:60]}, which is no larger"
    if (reshaped[0], math.prod(reshaped[1:])) != theirs:
        return f"would be reshaped to {_sizes(reshaped)} and is {_sizes(theirs)} in the file"
    if math.prod(reshaped) > _MOST_GROWTH * shape.numel():
        return f"would be reshaped to {_sizes(reshaped)}, over {_MOST_GROWTH} times its size"
    return ""


def _rotation_misfit(patch: Any, shape: torch.Size) -> str:
    """Why blocks of rotations (count, size, size), BOFT's with a step before, turn no weight."""
    blocks, rescale, alpha = patch.weights[:3]
    if not shape or blocks.shape[-3] * blocks.shape[-2] != shape[0]:
        return f"is {_sizes(shape)} in the model and is turned in blocks of {_sizes(blocks.shape)}"
    if rescale is not None and torch.Size((shape[0], *(1 for _ in shape[1:]))) != rescale.shape:
        return f"has scales (rescale) of {_sizes(rescale.shape)} for a weight of {_sizes(shape)}"
    if patch.name == "oft":
        return ""
    steps, size = len(blocks), blocks.shape[-1]
    if alpha is None or size % 2 or steps > 30 or shape[0] % ((size // 2) << steps):
        return "has rotations (BOFT) without a constraint, or in blocks that do not divide it"
    return ""


def _of(shape: torch.Size) -> str:
    return f"of {_sizes(shape)}" if len(shape) > 1 else f"of {_sizes(shape)} numbers in a row"


def _sizes(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a single number"


def too_large(patch: Any, strength: float, patcher: ModelPatcher, key: Any) -> bool:
    """Whether ``patch`` would turn the weight ``key`` of a model into what is no number, on top of
    the patches that are there.

    What the sizes of its numbers rule out costs nothing; else the weight is calculated once, as
    ComfyUI will do it.
    """
    if not isinstance(key, str):
        return False
    shape, dtype = weight_of(patcher.model, key)
    if shape is None:
        return False
    stored = _stored_as(dtype)
    earlier = [one for one in patcher.patches.get(key, ()) if _is_known(one[1])]
    every = [(factor, one) for factor, one, *_ in earlier] + [(strength, patch)]
    most = sum(_bound(one, shape) * abs(factor) for factor, one in every if factor)
    if most < torch.finfo(stored).max / 4 - _USUAL:
        return False
    start = _weight_before(patcher, key, shape)
    with torch.inference_mode():
        found = comfy.lora.calculate_weight(
            [*earlier, (strength, patch, 1.0, None, None)], start, key
        )
    return not bool(found.to(stored).isfinite().all())


def _is_known(patch: Any) -> bool:
    """Whether this is a patch as LoRAs make them, not a merge of models."""
    if isinstance(patch, tuple):
        return len(patch) == 2 and patch[0] in ("diff", "set") and torch.is_tensor(patch[1][0])
    return getattr(patch, "name", None) is not None and hasattr(patch, "weights")


def _weight_before(patcher: ModelPatcher, key: str, shape: torch.Size) -> Tensor:
    """A copy of a weight without patches, fp32; zeros where ComfyUI keeps it elsewhere."""
    path, _, name = key.rpartition(".")
    root: Any = patcher.model
    weight: Any = getattr(comfy.utils.get_attr(root, path) if path else root, name)
    if (kept := patcher.backup.get(key)) is not None:
        weight = kept.weight
    known = torch.is_tensor(weight) and not weight.is_meta and weight.shape == shape
    return weight.detach().float().cpu().clone() if known else torch.zeros(shape)


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
    if hasattr(weight, "tensor_type"):
        return weight.shape, None  # GGUF: patched after it has been made wide
    if weight is not None:
        return weight.shape, getattr(weight, "_qdata", weight).dtype
    if name == "weight" and isinstance(layer, nn.Conv2d):
        inner = layer.in_channels // layer.groups
        return torch.Size((layer.out_channels, inner, *layer.kernel_size)), None
    if name == "weight" and isinstance(layer, nn.Linear):
        return torch.Size((layer.out_features, layer.in_features)), None
    return None, None


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
