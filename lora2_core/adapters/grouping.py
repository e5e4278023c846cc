"""Adapters that read the same input compute together: q, k and v of an attention.

The layers stay where the model expects them. The first of a group that is asked computes for all;
the others hand out what lies ready, as long as they are asked with the very same input.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .layers import AdaptiveLoRA
from .projections import project

# By the names that diffusion U-Nets and CLIP text towers give them. The query of a cross-attention
# reads the image, its key and value read the text.
_SELF = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"))
_CROSS = (("to_k", "to_v"),)
_CROSS_ATTENTION = "attn2"


class ProjectionGroup:
    """Linear adapters with one input. Holds outputs only between the calls of one forward pass."""

    def __init__(self, layers: Sequence[AdaptiveLoRA]):
        self.layers = list(layers)
        # Looked up once: hundreds of lookups a step through modules would show on small models.
        self._weights: list[Tensor] = [layer.base.weight for layer in layers]  # type: ignore[misc]
        self._biases: list[Tensor | None] = [layer.base.bias for layer in layers]  # type: ignore[misc]
        self._asked: tuple[object, ...] = ()  # what the outputs at hand were computed for
        self._ready: dict[int, Tensor] = {}

    def takes(self, x: Tensor) -> bool:
        """Whether the frozen layers would compute in the dtype and on the device of ``x``."""
        weight = self._weights[0]
        return weight.dtype == x.dtype and weight.device == x.device

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of the layer at ``place`` for ``x``: (…, in) → (…, out)."""
        layers = self.layers
        # The importance is a new tensor each step: what an interrupted pass left is void by then.
        asked = (x, layers[0].importance, torch.is_grad_enabled())
        if place in self._ready and all(map(operator.is_, asked, self._asked)):
            found = self._ready.pop(place)
            if not self._ready:
                self._asked = ()  # nothing may be kept alive until the next pass
            return found
        outputs = project(
            x,
            self._weights,
            self._biases,
            [layer.lora_down for layer in layers],
            [layer.importance for layer in layers],
            [layer.lora_up for layer in layers],
        )
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


def join_projections(names: Sequence[str], layers: Sequence[AdaptiveLoRA]) -> None:
    """Let linear adapters with a common input compute together; convolutions stay alone."""
    for places in groups_of(names):
        members = [layers[place] for place in places]
        if all(_is_plain(layer.base) for layer in members):
            group = ProjectionGroup(members)
            for place, layer in enumerate(members):
                layer.group = (group, place)


def _is_plain(base: nn.Module) -> bool:
    """Whether a layer is W x + b and no more, so that it can be computed from its weight.

    ComfyUI's layers may hold their weight elsewhere, or patch it on the way.
    """
    patches = getattr(base, "weight_function", None) or getattr(base, "bias_function", None)
    return isinstance(base, nn.Linear) and torch.is_tensor(base.weight) and not patches
