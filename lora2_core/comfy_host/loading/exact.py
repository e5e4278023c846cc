"""Patches as whoever trained them calculates them, where ComfyUI does it in another way.

- DoRA by rows: m · (W + ΔW) / ‖W + ΔW‖. ComfyUI divides by ‖W‖ (its pull request 15458); magnitudes
  of columns, which older writers have, it takes as they are meant.
- OFT and BOFT: ComfyUI leaves out OFT's ``rescale``, multiplies with the strength twice, and takes
  the constraint of LyCORIS (``alpha``) as it stands there, which counts times the outputs.

The classes are ComfyUI's with this one method replaced, so that whatever holds patches takes them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

_MAGNITUDES = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5}  # places among a patch's tensors
_RESCALE, _CONSTRAINT, _OF_ROTATIONS = 1, 2, 3
_OWN = ("diffusion_model.", "text_encoders.")  # names that ComfyUI's own trainer gives


def as_trained(patch: Any, shape: torch.Size | None, lycoris: bool) -> Any:
    """``patch`` for a weight of ``shape`` as its writer means it.

    ``lycoris``: the constraint of a rotation counts times the outputs.
    """
    name = getattr(patch, "name", "")
    if name in ("oft", "boft") and patch.weights[_OF_ROTATIONS] is None:
        weights = list(patch.weights)
        if lycoris and shape and weights[_CONSTRAINT]:
            weights[_CONSTRAINT] *= shape[0]
        return _turning(type(patch))(patch.loaded_keys, tuple(weights))
    if _by_rows(patch, shape):
        return _scaling(type(patch))(patch.loaded_keys, patch.weights)
    return patch


def of_lycoris(rotated: Collection[str], names: Mapping[str, Any]) -> set[Any]:
    """Keys of weights that rotations of LyCORIS change; ``rotated``: components' names."""
    return {names[name] for name in rotated if name in names and not name.startswith(_OWN)}


def _by_rows(patch: Any, shape: torch.Size | None) -> bool:
    place = _MAGNITUDES.get(getattr(patch, "name", ""))
    if place is None or not shape or patch.weights[place] is None:
        return False
    if patch.name == "lora" and patch.weights[5] is not None:  # of another shape
        return False
    return patch.weights[place].shape[0] == shape[0]


@cache
def _scaling(kind: Any) -> Any:
    """``kind`` that scales each row of what it has changed to its magnitude."""

    def calculate_weight(
        self: Any, weight: Tensor, key: str, strength: float, *rest: Any, **named: Any
    ) -> Tensor:
        place = _MAGNITUDES[self.name]
        plain = kind(self.loaded_keys, _without(self.weights, place))
        changed = plain.calculate_weight(weight.clone(), key, 1.0, *rest, **named)
        norm = changed.flatten(1).norm(dim=1) + torch.finfo(changed.dtype).eps
        norm = norm.reshape(-1, *(1 for _ in changed.shape[1:]))
        magnitudes = self.weights[place].to(changed.device, changed.dtype)
        return _towards(weight, changed * (magnitudes / norm), strength)

    return type(kind.__name__, (kind,), {"calculate_weight": calculate_weight})


@cache
def _turning(kind: Any) -> Any:
    """``kind`` that goes all the way to what it turns a weight into, and then as far as asked."""

    def calculate_weight(
        self: Any, weight: Tensor, key: str, strength: float, *rest: Any, **named: Any
    ) -> Tensor:
        turned = kind.calculate_weight(self, weight.clone(), key, 1.0, *rest, **named)
        rescale = self.weights[_RESCALE]
        if rescale is not None and self.name == "oft":
            turned = turned * rescale.to(turned.device, turned.dtype)
        return _towards(weight, turned, strength)

    return type(kind.__name__, (kind,), {"calculate_weight": calculate_weight})


def _without(weights: Any, place: int) -> tuple[Any, ...]:
    return tuple(None if n == place else one for n, one in enumerate(weights))


def _towards(weight: Tensor, new: Tensor, strength: float) -> Tensor:
    if strength == 1:
        weight.copy_(new)
    else:
        weight += strength * (new - weight)
    return weight
