"""A change of ranks, told so that whatever remembers something of A and B can follow it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ResizedWeight:
    """One A or B, and the parameter of another rank that takes its place."""

    old: nn.Parameter
    new: nn.Parameter
    dim: int  # that counts ranks: 0 in A, (rank, in); 1 in B, (out, rank)

    @classmethod
    def of(cls, old: nn.Parameter, dim: int, rank: int) -> ResizedWeight:
        """``old`` cut to ``rank``, or padded with zeros."""
        return cls(old, nn.Parameter(_resized(old.data, dim, rank)), dim)

    @property
    def grew(self) -> bool:
        return self.new.shape[self.dim] > self.old.shape[self.dim]

    def resized(self, tensor: Tensor) -> Tensor:
        """A tensor of the old weight's shape in that of the new one; its new rows are zero."""
        return _resized(tensor, self.dim, self.new.shape[self.dim])

    @torch.no_grad()
    def begun(self, tensor: Tensor) -> Tensor:
        """The same, but its new rows begin where those of the new weight are now."""
        out = self.resized(tensor)
        old, new = self.old.shape[self.dim], self.new.shape[self.dim]
        if self.grew:
            values = self.new.detach().narrow(self.dim, old, new - old)
            out.narrow(self.dim, old, new - old).copy_(values)
        return out


@dataclass(frozen=True)
class RankChange:
    """Every weight that was replaced, the A of all changed components before the B of all."""

    weights: tuple[ResizedWeight, ...] = ()

    @property
    def count(self) -> int:
        """How many components have another rank now."""
        return len(self.weights) // 2


def _resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """``tensor`` cut along ``dim``, or padded with zeros, to ``size`` entries."""
    keep = min(size, tensor.shape[dim])
    shape = list(tensor.shape)
    shape[dim] = size
    out = tensor.new_zeros(shape)
    out.narrow(dim, 0, keep).copy_(tensor.narrow(dim, 0, keep))
    return out
