"""How a LoRA is applied: how strongly where, and by which way."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .checks import choice, number, whole

WAYS = ("auto", "merge", "bypass")
_SIGNS = re.compile(r"^diffusion_model\.(input_blocks|middle_block|output_blocks)\.")
_HALVES = {"input_blocks": "down", "middle_block": "mid", "output_blocks": "up"}
_ATTENTION = re.compile(r"\.attn([12])\.")
# B-LoRA, arXiv 2403.14572: in SDXL the first attention of the way up holds the content of a picture
# and the second its style. Diffusers calls them up_blocks.0.attentions.0 and .1.
B_LORA = {"content": "output_blocks.0.1.", "style": "output_blocks.1.1."}
BLOCKS = ("all", *B_LORA)
_LIMIT = 100.0


@dataclass(frozen=True)
class Strengths:
    """Factors of ``strength_model`` by the place of a layer; text encoders have none.

    ``blocks``: "all", or the transformer of SDXL that holds content or style, after B-LoRA.
    """

    down: float = 1.0
    mid: float = 1.0
    up: float = 1.0
    self_attention: float = 1.0
    cross_attention: float = 1.0
    blocks: str = "all"

    def __post_init__(self) -> None:
        for name in ("down", "mid", "up", "self_attention", "cross_attention"):
            value = getattr(self, name)
            number(f"strength of {name}", value, -_LIMIT, _LIMIT, "1 leaves it as trained")
        choice("blocks", self.blocks, BLOCKS)

    def of(self, key: str) -> float:
        """The factor of a layer by its weight's key in the model,
        ``diffusion_model.input_blocks.4.1.….attn1.to_q.weight``."""
        if not key.startswith("diffusion_model."):
            return 1.0
        if self.blocks != "all" and not key.startswith(f"diffusion_model.{B_LORA[self.blocks]}"):
            return 0.0
        half, attention = _SIGNS.match(key), _ATTENTION.search(key)
        factor = getattr(self, _HALVES[half[1]]) if half else 1.0
        if attention:
            factor *= self.self_attention if attention[1] == "1" else self.cross_attention
        return factor


ORDERS = ("svd", "learnt")


@dataclass(frozen=True)
class Limits:
    """What a LoRA may take; None is no limit. All of them hold at once.

    ``order``: "svd" keeps, by a singular value decomposition of every component, the best there is
    at any rank; "learnt" keeps the first columns of the file, in the order the training gave them.
    """

    max_rank: int | None = None  # of every component, 1 to 4096
    energy: float | None = None  # share of Σ‖ΔW‖² to keep at least, above 0 to 1
    megabytes: float | None = None  # of the whole, 10⁶ bytes
    order: str = "svd"

    def __post_init__(self) -> None:
        if self.max_rank is not None:
            whole("max_rank", self.max_rank, 1, 4096, "leave it out to keep all columns")
        if self.energy is not None:
            number("energy", self.energy, 1e-6, 1, "0.99 keeps 99 % of what the LoRA changes")
        if self.megabytes is not None:
            number("megabytes", self.megabytes, 1e-3, 1e6, "leave it out for any size")
        choice("order", self.order, ORDERS)

    @property
    def nothing(self) -> bool:
        """Whether nothing is limited."""
        all_of_it = self.energy is None or self.energy == 1
        return self.max_rank is None and self.megabytes is None and all_of_it
