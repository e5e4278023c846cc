"""Adaptive-rank adapters around one frozen layer: forward, no policy and no weights of their own.

A = ``lora_down`` and B = ``lora_up`` lie in a stack with those of other components (see
:mod:`.stacks`), at their current rank and no more: a component at rank 4 keeps 4 rows. What a step
computes with, Λ folded in, comes from outside once a step (see :mod:`.network`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stacks import WeightStack


class SharedInput(Protocol):
    """Layers that read one input and compute together, see :mod:`.grouping`."""

    def takes(self, x: Tensor) -> bool: ...

    def output(self, place: int, x: Tensor) -> Tensor: ...

    def folded(self, place: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...


class AdaptiveLoRA(nn.Module, ABC):
    """What the two kinds of adapter share: where their weights are, and how they are drawn.

    ``base``: the frozen layer. ``in_features`` and ``out_features`` are those of the unrolled
    weight (out, in · kernel area). ``stack`` and ``place``: where A and B lie; ``group``: the
    layers that compute together, with the place among them. The network sets these.
    """

    def __init__(self, base: nn.Module, in_features: int, out_features: int):
        super().__init__()
        self.base = base
        self.in_features = in_features
        self.out_features = out_features
        self.group: tuple[SharedInput, int]
        self._held: tuple[WeightStack, int]  # in a tuple, so that no module owns it twice

    def hold(self, stack: WeightStack, place: int) -> None:
        """Have A and B in ``stack``. Raises ValueError for a rank that the layer cannot take."""
        rank, largest = stack.slots[place].rank, min(self.in_features, self.out_features)
        if not 1 <= rank <= largest:
            raise ValueError(
                f"rank is {rank}; a layer of {self.out_features}×{self.in_features} takes 1 to "
                f"{largest}."
            )
        self._held = stack, place

    @property
    def rank(self) -> int:
        stack, place = self._held
        return stack.slots[place].rank

    @property
    def lora_down(self) -> Tensor:
        """A, a view: (rank, in)."""
        stack, place = self._held
        return stack.lora_down(place)

    @property
    def lora_up(self) -> Tensor:
        """B, a view: (out, rank)."""
        stack, place = self._held
        return stack.lora_up(place)

    @property
    def importance(self) -> Tensor:
        """The diagonal of Λ as of this step, a view: (rank,)."""
        stack, place = self._held
        return stack.importance[stack.slots[place].rows]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        group, place = self.group
        if group.takes(x):
            return group.output(place, x)
        return self.base(x, *args, **kwargs) + self.delta(x, *group.folded(place, x.dtype))

    @abstractmethod
    def delta(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """B ΛA x; ``down``: ΛA, (rank, in), and ``up``: B transposed, (rank, out), both in the
        dtype and on the device of ``x``."""

    @torch.no_grad()
    def init_down(self, std: float | None, rows: slice, generator: torch.Generator) -> None:
        """Draw rows of A: Gaussian with ``std``, or Kaiming-uniform like a plain LoRA if None.

        Drawn on the CPU from ``generator``, so a seed means the same on every device.
        """
        shape = (len(range(*rows.indices(self.rank))), self.in_features)
        if std is None:
            bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform_(a=√5)
            values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        else:
            values = torch.empty(shape).normal_(0, std, generator=generator)
        self.lora_down[rows] = values.to(self.lora_down.device)

    @torch.no_grad()
    def init_up(self, std: float, rows: slice, generator: torch.Generator) -> None:
        """Draw columns of B from a Gaussian with ``std``."""
        shape = (self.out_features, len(range(*rows.indices(self.rank))))
        values = torch.empty(shape).normal_(0, std, generator=generator)
        self.lora_up[:, rows] = values.to(self.lora_up.device)


class AdaptiveLoRALinear(AdaptiveLoRA):
    """y = W x + B Λ A x around a linear layer (eq. 1 with ΔW of eq. 10)."""

    base: nn.Linear

    def __init__(self, base: nn.Linear):
        super().__init__(base, *reversed(layer_shape(base)))

    def delta(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(x, down) @ up  # (…, out)


class AdaptiveLoRAConv2d(AdaptiveLoRA):
    """The same for a convolution: A is a k×k convolution to ``rank`` channels, B a 1×1 one."""

    base: nn.Conv2d

    def __init__(self, base: nn.Conv2d):
        if base.groups != 1:
            raise ValueError(
                f"the convolution has {base.groups} groups; only ungrouped ones can be adapted."
            )
        out_channels, in_channels, height, width = _weight_shape(base)
        super().__init__(base, in_channels * height * width, out_channels)
        self.kernel = (in_channels, height, width)

    def delta(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        # The layer's own way to convolve: its stride and padding, circular padding included.
        hidden = self.base._conv_forward(
            x, down.view(-1, *self.kernel), None
        )  # (batch, rank, h, w)
        return F.conv2d(hidden, up.t()[:, :, None, None])


def wrap(base: nn.Module) -> AdaptiveLoRA:
    """The adapter that fits ``base``, without weights yet. Raises TypeError for anything but
    Linear and Conv2d."""
    if isinstance(base, nn.Linear):
        return AdaptiveLoRALinear(base)
    if isinstance(base, nn.Conv2d):
        return AdaptiveLoRAConv2d(base)
    raise TypeError(f"{type(base).__name__} cannot carry a LoRA; choose linear or 2-d convolution.")


def layer_shape(base: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of the unrolled weight of a Linear or Conv2d."""
    shape = _weight_shape(base)
    return shape[0], math.prod(shape[1:])


def _weight_shape(base: nn.Module) -> tuple[int, ...]:
    # From the layer's own numbers, not from .weight: newer ComfyUI versions hold the weight as
    # None until the layer is used.
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    if isinstance(base, nn.Conv2d):
        return base.out_channels, base.in_channels // base.groups, *base.kernel_size
    raise TypeError(f"{type(base).__name__} has no weight that a LoRA could adapt.")
