"""Adapters that read the same input compute together: q, k and v of an attention.

The layers stay where the model expects them. The first of a group that is asked computes for all;
the others hand out what lies ready, as long as they are asked with the very same input.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import AdaptiveLoRA
from .projections import project
from .stacks import WeightStack

# By the names that diffusion U-Nets and CLIP text towers give them. The query of a cross-attention
# reads the image, its key and value read the text.
_SELF = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"))
_CROSS = (("to_k", "to_v"),)
_CROSS_ATTENTION = "attn2"


class ProjectionGroup:
    """Adapters with one input, or one adapter alone, and what they compute with in this step.

    ``places``: theirs in ``stack``, side by side. Holds outputs only between the calls of one
    forward pass.
    """

    def __init__(self, layers: Sequence[AdaptiveLoRA], stack: WeightStack, places: range):
        self.layers, self.stack, self.places = list(layers), stack, places
        self._plain = all(_is_plain(layer.base) for layer in layers)
        # Looked up once: hundreds of lookups a step through modules would show on small models.
        self._weight, self._bias = _in_one(layers)  # (Σ out, in), (Σ out,)
        self._asked: tuple[object, ...] = ()  # what the outputs at hand were computed for
        self._ready: dict[int, Tensor] = {}
        self._down = torch.empty(0)  # (Σ rank, in)
        self._ups: Sequence[Tensor] = ()  # (rank, out) each

    @property
    def capacities(self) -> list[int]:
        """How many rows of the stack each layer takes."""
        return [self.stack.slots[place].capacity for place in self.places]

    def compute_with(self, down: Tensor, ups: Sequence[Tensor]) -> None:
        """Take ΛA, (Σ rank, in), and every B transposed, (rank, out), of a step to come."""
        self._down, self._ups = down, ups

    def takes(self, x: Tensor) -> bool:
        """Whether the layers can be computed from their frozen weights and what is folded."""
        weight, dtype = self._weight, x.dtype
        fits = weight.dtype == dtype and self._down.dtype == dtype and weight.device == x.device
        return self._plain and fits

    def folded(self, place: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """ΛA and B transposed of the layer at ``place``, for what ``takes`` refuses."""
        if self._down.dtype != dtype:
            return self.stack.folded_alone(self.places[place], dtype)
        down = self._down.split(self.capacities)[place]
        return down, self._ups[place]

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of the layer at ``place`` for ``x``: (…, in) → (…, out)."""
        # What is folded is new each step: what an interrupted pass left is void by then.
        asked = (x, self._down, torch.is_grad_enabled())
        if place in self._ready and all(map(operator.is_, asked, self._asked)):
            found = self._ready.pop(place)
            if not self._ready:
                self._asked = ()  # nothing may be kept alive until the next pass
            return found
        outputs = project(x, self._weight, self._bias, self._down, self._ups)
        if len(outputs) > 1:
            self._ready = {n: out for n, out in enumerate(outputs) if n != place}
            self._asked = asked
        return outputs[place]


def groups_of(names: Sequence[str]) -> list[list[int]]:
    """Places in ``names`` (dotted paths with their root) of layers that share their input.

    Every place is in exactly one group, most alone.
    """
    siblings: dict[str, dict[str, int]] = {}
    for place, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        siblings.setdefault(parent, {})[child] = place
    return [group for parent, places in siblings.items() for group in _split(parent, places)]


def _split(parent: str, places: Mapping[str, int]) -> list[list[int]]:
    """The places of one parent's children, those with a common input together."""
    rules = _CROSS if parent.endswith(_CROSS_ATTENTION) else _SELF
    left = dict(places)
    groups = []
    for rule in rules:
        if group := [left.pop(child) for child in rule if child in left]:
            groups.append(group)
    return groups + [[place] for place in left.values()]


def joined(names: Sequence[str], layers: Sequence[AdaptiveLoRA]) -> list[list[int]]:
    """The places of layers that can compute together, in their order; convolutions and layers of
    unequal width or type stay alone."""
    groups = []
    for places in groups_of(names):
        members = [layers[place] for place in places]
        alike = len({(layer.in_features, layer.out_features) for layer in members}) == 1
        if alike and all(_is_plain(layer.base) for layer in members) and _is_one_kind(members):
            groups.append(places)
        else:
            groups += [[place] for place in places]
    return sorted(groups)


def _is_one_kind(layers: Sequence[AdaptiveLoRA]) -> bool:
    """Whether weights, and biases, can lie in one tensor and stay what they are."""
    bases: list[Any] = [layer.base for layer in layers]
    kinds = {(base.weight.dtype, base.weight.device, base.bias is None) for base in bases}
    return len(kinds) == 1


@torch.no_grad()
def _in_one(layers: Sequence[AdaptiveLoRA]) -> tuple[Tensor, Tensor | None]:
    """The frozen weights one below the other, so that one product computes them all; the layers
    go on with views, and nothing is there twice."""
    bases: list[Any] = [layer.base for layer in layers]
    if len(bases) == 1:
        return bases[0].weight, bases[0].bias
    found = []
    for name in ("weight", "bias"):
        own = [getattr(base, name) for base in bases]
        if all(part is None for part in own):
            found.append(None)
            continue
        whole = torch.cat([part.detach() for part in own])
        for part, view in zip(own, whole.split([len(part) for part in own]), strict=True):
            part.data = view
        found.append(whole)
    return found[0], found[1]


def _is_plain(base: nn.Module) -> bool:
    """Whether a layer is W x + b and no more, so that it can be computed from its weight.

    ComfyUI's layers may hold their weight elsewhere, or patch it on the way.
    """
    patches = getattr(base, "weight_function", None) or getattr(base, "bias_function", None)
    return isinstance(base, nn.Linear) and torch.is_tensor(base.weight) and not patches
