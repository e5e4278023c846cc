"""Which layers of a model get adapters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from .layers import layer_shape

# The paper adapts q, k, v and out of every self- and cross-attention (560 in SDXL).
_ATTENTION = r"\.attn{}\.(to_q|to_k|to_v|to_out\.0)$"
PRESETS = {
    "attention": _ATTENTION.format("[12]"),
    "self-attention": _ATTENTION.format("1"),
    "cross-attention": _ATTENTION.format("2"),
}


@dataclass(frozen=True)
class Target:
    """One layer to adapt. ``name`` is its path in the model, dotted."""

    name: str
    out_features: int
    in_features: int

    @property
    def parameters_per_rank(self) -> int:
        return self.in_features + self.out_features

    @property
    def largest_rank(self) -> int:
        """Rank above which ΔW gains nothing: min(in, out)."""
        return min(self.in_features, self.out_features)


def find_targets(model: nn.Module, selection: str = "attention") -> tuple[Target, ...]:
    """The Linear and Conv2d layers of ``model`` that ``selection`` names, in forward order.

    ``selection``: a key of :data:`PRESETS` or a regular expression searched in the dotted path.
    Works on meta tensors. Raises ValueError when nothing matches or the pattern is broken.
    """
    try:
        pattern = re.compile(PRESETS.get(selection, selection))
    except re.error as error:
        raise ValueError(f"targets {selection!r} is not a regular expression: {error}.") from error
    targets = tuple(
        Target(name, *layer_shape(module))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and pattern.search(name)
    )
    if not targets:
        presets = ", ".join(PRESETS)
        raise ValueError(
            f"targets {selection!r} matches no layer of this model; use a preset ({presets}) "
            "or a pattern such as 'attn1.*to_q'."
        )
    return targets
