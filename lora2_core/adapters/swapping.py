"""Blocks whose frozen weights stay in RAM, for cards that cannot hold a model.

A block's weights lie in one piece of RAM (see :mod:`.pinning`), and one copy brings them. Two
places on the device take turns: a block computes in one while the other is filled with the block
that comes next, which is the one before in a backward pass. Where gradients are wanted, such a
block must be computed twice (gradient checkpointing), so that no pass keeps a weight for another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .pinning import give_back, ram_for

PLACES = 2  # on the device, of the size of the largest block
_FEWEST = 4096  # numbers of a weight that is worth it
_ALIGNED = 256  # bytes; kernels want their matrices to begin so
_MARK = "_lora2_computes_on"  # of a layer: its device
_SWAP = "_lora2_swap"  # of a block: who fetches for it


Weights = dict[nn.Module, nn.Parameter]  # by the layer that they belong to


def weights_to_swap(blocks: Sequence[nn.Module]) -> list[Weights]:
    """For each of ``blocks`` the layers whose weight can stay in RAM: Linear and Conv2d, frozen,
    of 4096 numbers and more, that no other layer shares."""
    weights: list[dict[nn.Module, Any]] = [
        {m: m.weight for m in block.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        for block in blocks
    ]
    users = Counter(id(weight) for found in weights for weight in found.values())
    return [
        {layer: weight for layer, weight in found.items() if _is_worth_it(weight, users)}
        for found in weights
    ]


def _is_worth_it(weight: Any, users: Counter[int]) -> bool:
    plain = type(weight) is nn.Parameter and not weight.requires_grad
    return plain and users[id(weight)] == 1 and weight.numel() >= _FEWEST


def bytes_of_weights(blocks: Sequence[nn.Module]) -> list[int]:
    """What each of ``blocks`` needs no place for on the device while it is in RAM."""
    return [
        sum(weight.numel() * weight.element_size() for weight in found.values())
        for found in weights_to_swap(blocks)
    ]


def computes_on(layer: nn.Module) -> torch.device:
    """The device of what ``layer`` computes, wherever its weight is now."""
    found: torch.device | None = vars(layer).get(_MARK)
    return next(layer.parameters()).device if found is None else found


def computes_in_ram(device: torch.device) -> bool:
    """Whether the memory of ``device`` is RAM, so that nothing is saved by what waits there: a CPU,
    and the GPU of a Mac."""
    return device.type in ("cpu", "mps")


def stays_in_ram(layer: nn.Module) -> bool:
    """Whether the weight of ``layer`` is fetched when its block computes."""
    return _MARK in vars(layer)


def is_swapped(block: nn.Module) -> bool:
    """Whether the weights of ``block`` are fetched when it computes."""
    return _SWAP in vars(block)


def places_of(model: nn.Module) -> Iterator[Tensor]:
    """The memory of the device that fetched weights of ``model`` take turns in."""
    swaps: set[BlockSwap] = {vars(m)[_SWAP] for m in model.modules() if is_swapped(m)}
    for swap in swaps:
        yield from swap.places


class BlockSwap:
    """Keeps the weights of ``blocks`` in RAM while the rest of a model is on ``device``.

    ``blocks``: in the order in which they compute. The weights have to be in RAM already; call
    :meth:`move` for the rest, then put adapters on. Names, classes and Parameters stay as they are.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        self.device = device
        found = [(b, w) for b, w in zip(blocks, weights_to_swap(blocks), strict=True) if w]
        self._pinned = device.type == "cuda"
        memory = ram_for([_laid_out(w)[-1] for _, w in found], self._pinned)
        # One by one, so that what weights were in before is free for the next.
        self._pieces = [_Piece(*of, ram) for of, ram in zip(found, memory, strict=True)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for piece in self._pieces:
            for layer in piece.weights:
                setattr(layer, _MARK, device)
        self._begin()

    def _begin(self) -> None:
        largest = max((piece.nbytes for piece in self._pieces), default=0)
        count = min(PLACES, len(self._pieces))
        with torch.inference_mode(False):
            self.places = [
                torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(count)
            ]
        if self._stream is not None:
            for place in self.places:  # may go while one is still being filled
                place.record_stream(self._stream)
        self._tenants: list[int | None] = [None] * count  # the piece that is in each place
        self._ready: list[Any] = [None] * count  # an event of the stream that fills it
        self._last, self._step = -1, 1  # the piece that has computed, and where to go from there
        for number, piece in enumerate(self._pieces):
            piece.block.forward = _Fetching(piece.forward, self, number)
            setattr(piece.block, _SWAP, self)

    @contextmanager
    def _without(self) -> Iterator[None]:
        """Inside, the layers have no weight that a move could take along."""
        for piece in self._pieces:
            for layer in piece.weights:
                layer._parameters["weight"] = None
        try:
            yield
        finally:
            for piece in self._pieces:
                for layer, weight in piece.weights.items():
                    layer._parameters["weight"] = weight

    def move(self, model: nn.Module) -> None:
        """Bring all of ``model`` to the device but the weights that stay in RAM."""
        with self._without():
            model.to(self.device)

    def keep_in_ram(self, blocks: Collection[nn.Module]) -> None:
        """Of the blocks so far only these; the weights of the others come to stay. Before the
        blocks are checkpointed."""
        for place in range(len(self.places)):
            self._clear(place)
        self.places = []  # before others need their memory
        for piece in self._pieces:
            piece.block.forward = piece.forward
            delattr(piece.block, _SWAP)
            if piece.block not in blocks:
                piece.stay_on(self.device)
        stay = [piece for piece in self._pieces if piece.block in blocks]
        if len(stay) < len(self._pieces):  # what they lie in is shared with those that have left
            for piece, ram in zip(
                stay, ram_for([p.nbytes for p in stay], self._pinned), strict=True
            ):
                piece.lie_in(ram)
        self._pieces = stay
        give_back()
        self._begin()

    def fetch(self, number: int) -> None:
        """Have the weights of piece ``number`` on the device, and those of the next on the way."""
        coming = self._coming(number, torch.is_grad_enabled())
        with torch.inference_mode(False), torch.no_grad():
            place = self._place_of(number)
            if place is None:
                place = self._fill(number)
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_event(self._ready[place])
            if self._place_of(coming) is None:
                self._fill(coming, avoid=place)
        self._last = number

    def _place_of(self, number: int) -> int | None:
        return self._tenants.index(number) if number in self._tenants else None

    def _coming(self, number: int, learns: bool) -> int:
        """The piece that will be asked for after ``number``: up in a forward pass, and down in a
        backward pass, which begins with the last one again."""
        if number != self._last:
            self._step = 1 if number > self._last or number == 0 else -1
        end = len(self._pieces) - 1
        if number == end:
            return max(0, end - 1) if learns else 0
        return number + self._step if number else min(1, end)

    def _fill(self, number: int, avoid: int | None = None) -> int:
        """Begin to copy piece ``number`` into a place, another one than ``avoid``."""
        place = next((n for n in range(len(self.places)) if n != avoid), 0)
        self._clear(place)
        piece, target = self._pieces[number], self.places[place]
        if self._stream is None:
            piece.copy_to(target)
        else:
            # What has been asked of the device so far may still read the weights before.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                piece.copy_to(target)
                self._ready[place] = self._stream.record_event()
        piece.show(target)
        self._tenants[place] = number
        return place

    def _clear(self, place: int) -> None:
        tenant, self._tenants[place] = self._tenants[place], None
        if tenant is not None:
            self._pieces[tenant].show(self._pieces[tenant].ram)


class _Piece:
    """The weights of one block, one after the other in one piece of RAM."""

    def __init__(
        self,
        block: nn.Module,
        weights: Weights,
        ram: Tensor,
    ):
        self.block, self.weights, self.ram = block, weights, ram
        self.forward: Callable[..., Any] = block.forward
        *self._begins, self.nbytes = _laid_out(weights)
        views = self._views(ram)
        for weight, view in zip(weights.values(), views, strict=True):
            view.copy_(weight.data)
            weight.data = view

    def _views(self, memory: Tensor) -> list[Tensor]:
        """The weights in ``memory``, bytes."""
        views = []
        for begin, weight in zip(self._begins, self.weights.values(), strict=True):
            size = weight.numel() * weight.element_size()
            views.append(memory[begin : begin + size].view(weight.dtype).view(weight.shape))
        return views

    def copy_to(self, memory: Tensor) -> None:
        memory[: self.nbytes].copy_(self.ram, non_blocking=True)

    def show(self, memory: Tensor) -> None:
        """Let the layers compute with what is in ``memory``."""
        # By .data: what a pass has saved of a Parameter keeps the memory that it was computed in.
        for weight, view in zip(self.weights.values(), self._views(memory), strict=True):
            weight.data = view

    @torch.no_grad()
    def lie_in(self, ram: Tensor) -> None:
        """Wait in other RAM of the same size from now on."""
        ram.copy_(self.ram)
        self.ram = ram
        self.show(ram)

    @torch.no_grad()
    def stay_on(self, device: torch.device) -> None:
        """Be on ``device`` for good."""
        with torch.inference_mode(False):
            self.show(self.ram.to(device, copy=True))
        for layer in self.weights:
            delattr(layer, _MARK)


class _Fetching:
    """Takes the place of a block's ``forward``."""

    def __init__(self, once: Callable[..., Any], swap: BlockSwap, number: int):
        self.once, self.swap, self.number = once, swap, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.swap.fetch(self.number)
        return self.once(*args, **kwargs)


def _laid_out(weights: Weights) -> list[int]:
    """Where each of ``weights`` begins in one piece, in bytes, and where the last one ends."""
    sizes = [_rounded_up(w.numel() * w.element_size()) for w in weights.values()]
    return list(accumulate(sizes, initial=0))


def _rounded_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
