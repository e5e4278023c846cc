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

from .frozen import is_in_eight_bits
from .layers import AdaptiveLoRA
from .projections import project
from .stacks import WeightStack
from .swapping import stays_in_ram

# By the names that diffusion U-Nets and CLIP text towers give them. The query of a cross-attention
# reads the image, its key and value read the text.
_SELF = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"))
_CROSS = (("to_k", "to_v"),)
ATTENDED = {*_SELF[0], *_SELF[1]}  # what attention reads
_CROSS_ATTENTION = "attn2"
_MOST_RANKS = 192  # of a group
_ROOM = 32  # rows by which what lies below frozen weights grows
_NOTHING = torch.empty(0, dtype=torch.bool)  # of a type in which nobody asks


class ProjectionGroup:
    """Adapters with one input, or one adapter alone, and what they compute with in this step.

    ``places``: theirs in ``stack``, side by side; ``attended``: whether attention reads, and so
    keeps, what they give. Holds outputs only between the calls of one forward pass.
    """

    def __init__(
        self,
        layers: Sequence[AdaptiveLoRA],
        stack: WeightStack,
        places: range,
        attended: bool = False,
    ):
        self.layers, self.stack, self.places = list(layers), stack, places
        self._plain = all(_is_plain(layer.base) for layer in layers)
        # Looked up once: hundreds of lookups a step through modules would show on small models.
        self._weight, self._bias = _in_one(layers)  # (Σ out, in), (Σ out,)
        joins = all(_can_join(layer.base) for layer in layers)
        self._beside = attended and joins and self._bias is None and _calls_cost(self._weight)
        self._wide = self._with_down = self._weight  # with room for ΛA below, and with ΛA
        self._asked: tuple[object, ...] = ()  # what the outputs at hand were computed for
        self._ready: dict[int, Tensor] = {}
        self._down = self._up = _NOTHING  # (Σ rank, in); (Σ rank, Σ out)

    @property
    def rows(self) -> int:
        """How many rows of the stack are theirs."""
        return sum(self.stack.slots[place].capacity for place in self.places)

    @torch.no_grad()
    def room_for(self, down: Tensor) -> Tensor | None:
        """Where a copy of ΛA belongs, below the frozen weights, if this group computes so."""
        if not self._beside or down.dtype != self._weight.dtype:
            return None
        out, rank = len(self._weight), len(down)
        if len(self._wide) < out + rank:
            room = -(-rank // _ROOM) * _ROOM
            self._wide = self._weight.new_empty(out + room, self._weight.shape[1])
            self._wide[:out] = self._weight
            self._weight = self._wide[:out]
            _hold_in(self.layers, self._weight)
        self._with_down = self._wide[: out + rank]
        return self._wide[out : out + rank]

    def compute_with(self, down: Tensor = _NOTHING, up: Tensor = _NOTHING) -> None:
        """Take ΛA, (Σ rank, in), and B among zeros, (Σ rank, Σ out), of a step to come; nothing
        lets go of them."""
        self._down, self._up = down, up

    @property
    def computes_with(self) -> tuple[Tensor, Tensor]:
        return self._down, self._up

    def takes(self, x: Tensor) -> bool:
        """Whether the layers can be computed from their frozen weights and what is folded."""
        weight, dtype = self._weight, x.dtype
        fits = weight.dtype == dtype and self._down.dtype == dtype and weight.device == x.device
        return self._plain and fits

    def folded(self, place: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """ΛA and B transposed of the layer at ``place``, for what ``takes`` refuses."""
        if self._down.dtype != dtype:
            return self.stack.folded_alone(self.places[place], dtype)
        if len(self.layers) == 1:
            return self._down, self._up
        first, own = (self.stack.slots[self.places[n]] for n in (0, place))
        rows = slice(own.start - first.start, own.start - first.start + own.rank)
        return self._down[rows], self._up.chunk(len(self.layers), 1)[place][rows]

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of the layer at ``place`` for ``x``: (…, in) → (…, out)."""
        # What is folded is new each step: what an interrupted pass left is void by then.
        asked = (x, self._down, torch.is_grad_enabled())
        if place in self._ready and all(map(operator.is_, asked, self._asked)):
            found = self._ready.pop(place)
            if not self._ready:
                self._asked = ()  # nothing may be kept alive until the next pass
            return found
        weight = self._with_down if self._beside else self._weight
        outputs = project(x, weight, self._bias, self._down, self._up, len(self.layers))
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


def joined(
    names: Sequence[str], layers: Sequence[AdaptiveLoRA], ranks: Sequence[int]
) -> list[list[int]]:
    """The places of layers that compute together, in their order.

    Convolutions, layers of unequal width or type, such whose weights are fetched from RAM and such
    of large ``ranks`` stay alone: zeros beside their B would cost more than what calls cost.
    """
    groups = []
    for places in groups_of(names):
        members = [layers[place] for place in places]
        alike = len({_kind(layer) for layer in members}) == 1
        small = sum(ranks[place] for place in places) <= _MOST_RANKS
        if alike and small and all(_can_join(layer.base) for layer in members):
            groups.append(places)
        else:
            groups += [[place] for place in places]
    return sorted(groups)


def _calls_cost(weight: Tensor) -> bool:
    """Whether a call saved is worth that outputs lie apart in memory: not on a CPU, where the
    attention of SDXL's width takes 4 % longer to read them (bench/step.py)."""
    return weight.device.type != "cpu"


def _kind(layer: AdaptiveLoRA) -> tuple[object, ...]:
    """What layers must have in common, so that their weights can lie in one tensor."""
    weight = layer.base.weight
    alike = (weight.dtype, weight.device) if torch.is_tensor(weight) else ()
    return layer.in_features, layer.out_features, *alike


@torch.no_grad()
def _in_one(layers: Sequence[AdaptiveLoRA]) -> tuple[Tensor, Tensor | None]:
    """The frozen weights one below the other, so that one product computes them all; the layers
    go on with views, and nothing is there twice."""
    bases: list[Any] = [layer.base for layer in layers]
    if len(bases) == 1:
        return bases[0].weight, bases[0].bias
    weight = torch.cat([base.weight.detach() for base in bases])
    _hold_in(layers, weight)
    if all(base.bias is None for base in bases):
        return weight, None
    zeros = weight.new_zeros(len(weight) // len(bases))
    return weight, torch.cat([zeros if base.bias is None else base.bias for base in bases])


def _hold_in(layers: Sequence[AdaptiveLoRA], weight: Tensor) -> None:
    """Let the frozen weights of the layers be views of ``weight``."""
    for layer, view in zip(layers, weight.chunk(len(layers)), strict=True):
        layer.base.weight.data = view  # type: ignore[union-attr]


def _can_join(base: nn.Module) -> bool:
    return _is_plain(base) and not stays_in_ram(base)


def _is_plain(base: nn.Module) -> bool:
    """Whether a layer is W x + b and no more, so that it can be computed from its weight.

    ComfyUI's layers may hold their weight elsewhere, or patch it on the way; ours may keep it in
    eight bits.
    """
    if is_in_eight_bits(base):
        return False
    patches = getattr(base, "weight_function", None) or getattr(base, "bias_function", None)
    return isinstance(base, nn.Linear) and torch.is_tensor(base.weight) and not patches
