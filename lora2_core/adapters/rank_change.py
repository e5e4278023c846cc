"""A change of ranks, told so that whatever remembers something of A and B can follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """The rows of one component in a stack: ``rank`` of them from ``start`` on, and zeros up to
    ``capacity``."""

    start: int
    rank: int
    capacity: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.rank)


def slots_of(ranks: Sequence[int], multiple: int = 1) -> tuple[Slot, ...]:
    """Slots one below the other, the capacity of each a multiple of ``multiple``."""
    slots, start = [], 0
    for rank in ranks:
        slots.append(Slot(start, rank, -(-rank // multiple) * multiple))
        start += slots[-1].capacity
    return tuple(slots)


def apart(slots: Sequence[Slot], width: int, numbers: int) -> bool:
    """Whether no block of ``numbers``, counted through rows of ``width``, belongs to two slots."""
    return all(slot.start * width % numbers == 0 for slot in slots)


_Piece = tuple[int | None, int]  # the first of so many rows that stay; None: of rows that begin


@dataclass(frozen=True)
class RowMove:
    """Where the rows of a stack go: those of a rank that is left stay, the others begin."""

    old: tuple[Slot, ...]
    new: tuple[Slot, ...]

    @cached_property
    def rows(self) -> tuple[_Piece, ...]:
        """What the new rows are, from the first to the last."""
        kept = [min(old.rank, new.rank) for old, new in zip(self.old, self.new, strict=True)]
        return self._pieces(kept)

    @cached_property
    def capacities(self) -> tuple[_Piece, ...]:
        """The same for what belongs to whole slots, zeros included."""
        kept = [
            min(old.capacity, new.capacity) for old, new in zip(self.old, self.new, strict=True)
        ]
        return self._pieces(kept)

    def _pieces(self, kept: Sequence[int]) -> tuple[_Piece, ...]:
        pieces: list[_Piece] = []
        for old, new, count in zip(self.old, self.new, kept, strict=True):
            last = pieces[-1] if pieces else (None, 0)
            if last[0] is not None and last[0] + last[1] == old.start:
                pieces[-1] = last[0], last[1] + count  # hundreds of neighbours that stay are one
            else:
                pieces.append((old.start, count))
            if new.capacity > count:
                pieces.append((None, new.capacity - count))
        return tuple(pieces)


@dataclass(frozen=True, eq=False)
class ResizedWeight:
    """The A or the B of a stack, and the parameter of other ranks that takes its place."""

    old: nn.Parameter  # (rows, width)
    new: nn.Parameter  # (rows, width)
    move: RowMove

    @classmethod
    def of(cls, old: nn.Parameter, move: RowMove) -> ResizedWeight:
        """``old`` with its rows where ``move`` puts them, new ones zero."""
        return cls(old, nn.Parameter(_moved(old.data, move.rows)), move)

    @property
    def grew(self) -> bool:
        return any(a.rank < b.rank for a, b in zip(self.move.old, self.move.new, strict=True))

    def resized(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """A tensor of the old weight's shape in that of the new one; new rows hold ``fill``."""
        return _moved(tensor, self.move.rows, fill)

    @torch.no_grad()
    def begun(self, tensor: Tensor) -> Tensor:
        """The same, but new rows begin where those of the new weight are now."""
        out, first = self.resized(tensor), 0
        for start, count in self.move.rows:
            if start is None:
                out[first : first + count] = self.new.detach()[first : first + count]
            first += count
        return out

    def blocks(self, scales: Tensor, numbers: int) -> Tensor:
        """One value for each ``numbers`` of the old weight, which no two slots share, as those of
        the new one; 0 where a block begins. (blocks,) → (blocks,)"""
        width, pieces, rows, done = self.old.shape[1], [], 0, 0
        for start, count in self.move.capacities:
            rows += count
            end = -(-rows * width // numbers)  # the last block of all may not be full
            pieces.append((None if start is None else start * width // numbers, end - done))
            done = end
        return _moved(scales, pieces)


@dataclass(frozen=True)
class RankChange:
    """Every weight that was replaced, the A of all changed stacks before the B of all.

    ``count``: how many components have another rank now.
    """

    weights: tuple[ResizedWeight, ...] = ()
    count: int = 0


def _moved(tensor: Tensor, pieces: Sequence[_Piece], fill: float = 0) -> Tensor:
    """The rows of ``tensor`` that stay, in their new order, and new ones of ``fill``."""
    shape = tensor.shape[1:]
    return torch.cat(
        [
            tensor.new_full((count, *shape), fill)
            if start is None
            else tensor[start : start + count]
            for start, count in pieces
        ]
    )
