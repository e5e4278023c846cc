"""Adaptive-rank adapters around one frozen layer: state and forward, no policy.

An adapter holds A = ``lora_down`` and B = ``lora_up`` at its current rank and nothing more: a
component at rank 4 keeps 4 rows. Λ comes from outside once a step (see :mod:`.network`), so
that the importances of a whole network are one vectorised call.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SharedInput(Protocol):
    """Layers that read one input and compute together, see :mod:`.grouping`."""

    def takes(self, x: Tensor) -> bool: ...

    def output(self, place: int, x: Tensor) -> Tensor: ...


class AdaptiveLoRA(nn.Module, ABC):
    """What the two kinds of adapter share: the parameters, and how they are drawn.

    ``base``: the frozen layer. ``in_features`` and ``out_features`` are those of the unrolled
    weight (out, in · kernel area).
    """

    lora_down: nn.Parameter
    lora_up: nn.Parameter
    importance: Tensor

    def __init__(self, base: nn.Module, in_features: int, out_features: int, rank: int):
        super().__init__()
        largest = min(in_features, out_features)
        if not 1 <= rank <= largest:
            raise ValueError(
                f"rank is {rank}; a layer of {out_features}×{in_features} takes 1 to {largest}."
            )
        self.base = base
        self.in_features = in_features
        self.out_features = out_features
        self.group: tuple[SharedInput, int] | None = None  # with the place in it
        device = next(base.parameters()).device
        self.lora_down = nn.Parameter(torch.zeros(rank, in_features, device=device))
        self.lora_up = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self.importance = torch.ones(rank, device=device)  # (rank,), replaced every step

    @property
    def rank(self) -> int:
        return self.lora_down.shape[0]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.group is not None and self.group[0].takes(x):
            group, place = self.group
            return group.output(place, x)
        return self.base(x, *args, **kwargs) + self.delta(x)

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """B Λ A x, in the dtype and on the device of ``x``."""

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
    """y = W x + B Λ A x for a linear layer; eq. 1 and eq. 10."""

    def __init__(self, base: nn.Module, rank: int):
        out_features, in_features = _weight_shape(base)
        super().__init__(base, in_features, out_features, rank)

    def delta(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.lora_down.to(x.dtype))  # (…, rank)
        hidden = hidden * self.importance.to(x.dtype)
        return F.linear(hidden, self.lora_up.to(x.dtype))  # (…, out)


class AdaptiveLoRAConv2d(AdaptiveLoRA):
    """The same for a convolution: A is a k×k convolution to ``rank`` channels, B a 1×1 one."""

    base: nn.Conv2d

    def __init__(self, base: nn.Conv2d, rank: int):
        if base.groups != 1:
            raise ValueError(
                f"the convolution has {base.groups} groups; only ungrouped ones can be adapted."
            )
        out_channels, in_channels, height, width = _weight_shape(base)
        super().__init__(base, in_channels * height * width, out_channels, rank)
        self.kernel = (in_channels, height, width)

    def delta(self, x: Tensor) -> Tensor:
        down = self.lora_down.to(x.dtype).view(-1, *self.kernel)  # (rank, in, kh, kw)
        # The layer's own way to convolve: its stride and padding, circular padding included.
        hidden = self.base._conv_forward(x, down, None)  # (batch, rank, h, w)
        hidden = hidden * self.importance.to(x.dtype).view(-1, 1, 1)
        return F.conv2d(hidden, self.lora_up.to(x.dtype)[:, :, None, None])


def wrap(base: nn.Module, rank: int) -> AdaptiveLoRA:
    """The adapter that fits ``base``. Raises TypeError for anything but Linear and Conv2d."""
    if isinstance(base, nn.Linear):
        return AdaptiveLoRALinear(base, rank)
    if isinstance(base, nn.Conv2d):
        return AdaptiveLoRAConv2d(base, rank)
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
