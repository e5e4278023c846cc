"""Which layers of a model get adapters, and where in the model they lie."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from ..config.load import B_LORA
from ..config.patterns import MOST_CHARACTERS, Pattern, PatternError
from .layers import layer_shape

# The paper adapts q, k, v and out of every self- and cross-attention (560 in SDXL).
_ATTENTION = r"\.attn{}\.(to_q|to_k|to_v|to_out\.0)$"
_BOTH = _ATTENTION.format("[12]")
# The two linear layers of a transformer block's feed-forward network.
_FEED_FORWARD = r"\.ff\.net\.(0\.proj|2)$"
# What trainers in the manner of kohya's call a LoRA with convolutions: all that residual blocks,
# samplers and the ends of transformers hold, the projection of the timestep included, but neither
# the first and the last convolution of the model nor its embeddings.
_CONVOLUTIONS = (
    r"\.(in_layers\.2|out_layers\.3|emb_layers\.1|skip_connection|op|proj_in|proj_out)$"
    r"|^output_blocks\.\d+\.\d+\.conv$"
)
_CONTENT, _STYLE = (f"^{re.escape(B_LORA[part])}.*{_BOTH}" for part in ("content", "style"))
PRESETS = {
    "attention": _BOTH,
    "self-attention": _ATTENTION.format("1"),
    "cross-attention": _ATTENTION.format("2"),
    "attention+ff": f"{_BOTH}|{_FEED_FORWARD}",
    "attention+ff+conv": f"{_BOTH}|{_FEED_FORWARD}|{_CONVOLUTIONS}",
    "b-lora content": _CONTENT,
    "b-lora style": _STYLE,
    "b-lora": f"{_CONTENT}|{_STYLE}",
}

# config.ranks.GROUPS, by what a name holds.
_GROUPS = {
    "self": re.compile(r"\.attn1\."),
    "cross": re.compile(r"\.attn2\."),
    "down": re.compile(r"^input_blocks\."),
    "mid": re.compile(r"^middle_block\."),
    "up": re.compile(r"^output_blocks\."),
}


@dataclass(frozen=True)
class Target:
    """One layer to adapt. ``name`` is its dotted path in the model that ``root`` names."""

    name: str
    out_features: int
    in_features: int
    root: str = "unet"  # or "te1", "te2": the text encoders

    @property
    def parameters_per_rank(self) -> int:
        return self.in_features + self.out_features

    @property
    def largest_rank(self) -> int:
        """Rank above which ΔW gains nothing: min(in, out)."""
        return min(self.in_features, self.out_features)

    def is_in(self, group: str) -> bool:
        """Whether the layer lies in one of ``config.ranks.GROUPS``.

        "self" and "cross": part of such an attention; "down", "mid" and "up": the half of the
        U-Net. The text encoders are in none of them.
        """
        return self.root == "unet" and _GROUPS[group].search(self.name) is not None


def find_targets(
    model: nn.Module, selection: str = "attention", root: str = "unet"
) -> tuple[Target, ...]:
    """The Linear and Conv2d layers of ``model`` that ``selection`` names, in forward order.

    ``selection``: a key of :data:`PRESETS` or a regular expression searched in the dotted path, as
    far as :mod:`.patterns` allows it. Works on meta tensors. Raises ValueError when nothing matches
    or the pattern is broken or refused.
    """
    try:
        pattern = Pattern(PRESETS.get(selection, selection))
        targets = tuple(
            Target(name, *layer_shape(module), root)
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and pattern.search(name)
        )
    except PatternError as error:
        raise ValueError(f"targets {selection[:MOST_CHARACTERS]!r} {error}.") from error
    if not targets:
        presets = ", ".join(PRESETS)
        raise ValueError(
            f"targets {selection!r} matches no layer of this model; use a preset ({presets}) "
            "or a pattern such as 'attn1.*to_q'."
        )
    return targets
