"""A and B of many components in one tensor each: what a step does, it does to all of them at once.

Components of equal widths lie one below the other, ranks as rows. A step casts a stack to the
type in which the model computes, folds Λ into it, and hands out views; autograd brings the
gradients back in one piece. So optimizer, norm, clipping and averages touch a few large tensors,
however many components there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .rank_change import ResizedWeight, RowMove, slots_of

# Rows of a slot on a GPU: its matrix units read 16 bytes at a time, eight numbers in 16 bits.
_GPU_ROWS = 8


class WeightStack(nn.Module):
    """A and B of components whose layers all take ``in_features`` and give ``out_features``.

    ``components``: their numbers in the network, in the order of their rows; every ``together`` of
    them read one input. ``down``: (rows, in) and ``up``: (rows, out), which is B transposed, so
    that a row of both is one rank. ``dtype``: what the model computes in.
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self,
        components: Sequence[int],
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        together: int = 1,
    ):
        super().__init__()
        self.components, self.dtype, self.together = tuple(components), dtype, together
        self._multiple = _GPU_ROWS if device.type == "cuda" else 1  # of the rows of a slot
        self.slots = slots_of(ranks, self._multiple)
        self.down = nn.Parameter(torch.zeros(self.rows, in_features, device=device))
        self.up = nn.Parameter(torch.zeros(self.rows, out_features, device=device))
        self.importance = torch.ones(self.rows, device=device)  # (rows,), replaced every step
        self._owners: tuple[Tensor, Tensor] | None = None  # of these slots

    @property
    def rows(self) -> int:
        return self.slots[-1].start + self.slots[-1].capacity

    @property
    def ranks(self) -> list[int]:
        return [slot.rank for slot in self.slots]

    def lora_down(self, place: int) -> Tensor:
        """A of one component, a view: (rank, in)."""
        return self.down[self.slots[place].rows]

    def lora_up(self, place: int) -> Tensor:
        """B of one component, a view: (out, rank)."""
        return self.up[self.slots[place].rows].t()

    def move_to(self, ranks: Sequence[int]) -> tuple[ResizedWeight, ResizedWeight]:
        """A and B as they would be with other ranks; nothing changes before :meth:`take`."""
        move = RowMove(self.slots, slots_of(ranks, self._multiple))
        return ResizedWeight.of(self.down, move), ResizedWeight.of(self.up, move)

    def take(self, down: ResizedWeight, up: ResizedWeight) -> None:
        """Hold what :meth:`move_to` has made."""
        self.slots, self._owners = down.move.new, None
        self.down, self.up = down.new, up.new

    @torch.no_grad()
    def become(self, downs: Sequence[Tensor], ups: Sequence[Tensor]) -> None:
        """New parameters that hold these A, (rank, in), and B, (out, rank)."""
        device = self.down.device
        self.slots = slots_of([len(down) for down in downs], self._multiple)
        self._owners = None
        self.down = nn.Parameter(torch.zeros(self.rows, self.down.shape[1], device=device))
        self.up = nn.Parameter(torch.zeros(self.rows, self.up.shape[1], device=device))
        for place, (down, up) in enumerate(zip(downs, ups, strict=True)):
            self.lora_down(place).copy_(down)
            self.lora_up(place).copy_(up)

    def keep_apart(self, numbers: int) -> bool:
        """Lay rows out so that no block of so many numbers belongs to two components; whether
        they had to move."""
        multiple = self._multiple
        for weight in (self.down, self.up):
            multiple = math.lcm(multiple, numbers // math.gcd(numbers, weight.shape[1]))
        if multiple == self._multiple:
            return False
        self._multiple = multiple
        self.take(*self.move_to(self.ranks))
        return True

    @property
    def padded(self) -> bool:
        """Whether any slot has rows of zeros."""
        return any(slot.rank < slot.capacity for slot in self.slots)

    def in_use(self, weight: Tensor) -> Tensor:
        """The rows of A or B, or of what is as large, that belong to a rank."""
        if not self.padded:
            return weight
        return torch.cat([weight[slot.rows] for slot in self.slots])

    def folded(self, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """ΛA, (rows, in), and B in ``dtype``; ``importance`` None stands for 1.

        B is (rows, together · out): beside the numbers of a row's own layer are zeros for those
        that it is computed with.
        """
        down = _scaled(self.down, importance, self.dtype)
        if self.together == 1:
            return down, self.up.to(self.dtype)
        if self._owners is None:
            self._owners = self._find_owners()
        return down, _Spread.apply(self.up, *self._owners, self.dtype)  # type: ignore[return-value]

    def _find_owners(self) -> tuple[Tensor, Tensor]:
        """Which layer of its group each row belongs to, as 0 and 1, (rows, together), and as the
        number of that 1, (rows,)."""
        counts = torch.tensor([slot.capacity for slot in self.slots])
        layers = torch.arange(len(counts)).remainder(self.together)
        owner = torch.repeat_interleave(layers, counts)  # (rows,)
        own = torch.nn.functional.one_hot(owner, self.together).float()
        places = torch.arange(len(owner)) * self.together + owner
        return own.to(self.down.device), places.to(self.down.device)

    def folded_alone(self, place: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same of one component, (rank, in) and (rank, out), for a layer that was asked in
        another ``dtype`` than expected; the next step expects it."""
        self.dtype = dtype
        rows = self.slots[place].rows
        return _scaled(self.down[rows], self.importance[rows], dtype), self.up[rows].to(dtype)


def _scaled(down: Tensor, importance: Tensor | None, dtype: torch.dtype) -> Tensor:
    if importance is None:
        return down.to(dtype)
    return _Scaled.apply(down, importance, dtype)  # type: ignore[return-value]


class _Scaled(torch.autograd.Function):
    """ΛA in another type, in one pass over A there and in two back."""

    @staticmethod
    def forward(ctx, down: Tensor, importance: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(down, importance)
        out = torch.empty_like(down, dtype=dtype)
        return torch.mul(down, importance[:, None], out=out)  # (rows, in)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        down, importance = ctx.saved_tensors
        grad_importance = None
        if ctx.needs_input_grad[1]:
            grad_importance = (grad * down).sum(1)  # (rows,), in fp32
        return grad * importance[:, None], grad_importance, None


class _Spread(torch.autograd.Function):
    """B among zeros, in another type: (rows, out) → (rows, together · out), in one pass."""

    @staticmethod
    def forward(ctx, up: Tensor, own: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(own, places)
        out = up.new_empty(len(up), own.shape[1], up.shape[1], dtype=dtype)
        return torch.mul(up[:, None], own[:, :, None], out=out).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        own, places = ctx.saved_tensors
        return grad.view(own.numel(), -1).index_select(0, places), None, None, None
