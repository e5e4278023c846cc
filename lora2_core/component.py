"""What is left of a trained layer once the network is done with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Component:
    """One trained component, on the CPU: what a file needs."""

    name: str  # dotted path in the model that ``root`` names
    lora_down: Tensor  # (rank, in, …), fp32
    lora_up: Tensor  # (out, rank, …), fp32
    importance: Tensor  # (rank,), fp32
    nu: float | None  # None where LoRA² did not learn the rank
    root: str = "unet"  # or "te1", "te2": the text encoders; "file": ``name`` is a file's own key

    @property
    def rank(self) -> int:
        return self.importance.numel()

    @property
    def in_features(self) -> int:
        """Of the unrolled weight (out, in · kernel area)."""
        return math.prod(self.lora_down.shape[1:])

    @property
    def out_features(self) -> int:
        return self.lora_up.shape[0]

    def first(self, rank: int) -> Component:
        """The component cut to its first ``rank`` columns; 0 leaves nothing of it."""
        return Component(
            self.name,
            self.lora_down[:rank],
            self.lora_up[:, :rank],
            self.importance[:rank],
            self.nu,
            self.root,
        )
