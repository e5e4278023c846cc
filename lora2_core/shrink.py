"""A LoRA in memory made smaller: fewer columns a component, nothing else changed.

What :mod:`.resize` writes to a file, :func:`shrink` does to the tensors that are to be applied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import factors, foreign_lora2, lora_format, lora_keys
from .checks import choice, number, whole
from .component import Component
from .lora_header import LoRAFileError
from .lora_keys import Pair
from .rank_choice import Part, choose_ranks, part_of, ranks_for_energy

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


def choose(parts: Sequence[Part], limits: Limits) -> list[int]:
    """Ranks within all limits but the size, which depends on what the file says of itself."""
    top = limits.max_rank or max((part.rank for part in parts), default=0)
    capped = [part.first(min(top, part.rank)) for part in parts]
    if limits.energy is None or limits.energy == 1:
        return [part.rank for part in capped]
    # Of the whole energy, not of what the cap leaves: where that is less, all of it stays.
    total = sum(sum(part.energies) for part in parts)
    left = sum(sum(part.energies) for part in capped)
    share = min(1.0, limits.energy * total / left) if left else 1.0
    return ranks_for_energy(capped, share)


def shrink(state: Mapping[str, Tensor], limits: Limits) -> dict[str, Tensor]:
    """``state`` within ``limits``, under the same keys.

    Of LoRAs of two factors a component, by any trainer; what else the state holds stays as it is.
    A component may go altogether. Sizes are those of all tensors and their entries in a header.
    Raises LoRAFileError where the size has no room for anything.
    """
    if limits.nothing:
        return dict(state)
    pairs = lora_keys.split(state).pairs
    found = [component_of(state, pair) for pair in pairs]
    svd = limits.order == "svd"
    if svd:
        found = [factors.decompose_quickly(component) for component in found]
    place = sum(tensor.nbytes for tensor in state.values())
    parts = [part_of(component, place, decomposed=svd) for component in found]
    ranks = choose(parts, limits)
    kept = [part.first(rank) for part, rank in zip(parts, ranks, strict=True)]
    if limits.megabytes is not None:
        ranks = _within_bytes(kept, limits.megabytes, _bytes_beside(state, pairs))
    out = dict(state)
    for pair, component, rank in zip(pairs, found, ranks, strict=True):
        if rank < component.rank or svd or limits.megabytes is not None:
            _put(out, pair, component.first(rank))
    return out


def _within_bytes(parts: Sequence[Part], megabytes: float, beside: int) -> list[int]:
    """The ranks of ``parts``, or fewer where they and the bytes beside them take more."""
    available = int(megabytes * 1e6) - beside
    whole = [part.rank for part in parts]
    if not any(whole) or sum(part.costs[-1] for part in parts) <= available:
        return whole
    ranks = choose_ranks(parts, available)
    if not any(ranks):
        least = beside + min(part.costs[1] for part in parts if part.rank)
        raise LoRAFileError(
            f"megabytes is {megabytes:g}, which has no room for a single component of this LoRA; "
            f"choose at least {math.ceil(least / 1e2) / 1e4:g}."
        )
    return ranks


def _bytes_beside(state: Mapping[str, Tensor], pairs: Sequence[Pair]) -> int:
    """Of all that stays as it is, with its entries in a header."""
    factors_of = {key for p in pairs for key in (p.down, p.up, p.mid, p.alpha)}
    place = sum(tensor.nbytes for tensor in state.values())
    return sum(
        tensor.nbytes + len(json.dumps({key: _entry(tensor, place)}))
        for key, tensor in state.items()
        if key not in factors_of
    )


def _entry(tensor: Tensor, place: int) -> dict[str, object]:
    """Of a header, as long as it can get."""
    return {"dtype": "F8_E4M3", "shape": list(tensor.shape), "data_offsets": [place, place]}


def in_our_layout(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """A state of the other layout of LoRA² (see :mod:`.foreign_lora2`) as any loader reads it."""
    out = dict(state)
    for pair in lora_keys.split(state).pairs:
        if pair.nu is not None:
            _put(out, pair, component_of(state, pair, metadata=metadata))
            out.pop(pair.nu, None)
    return out


def component_of(
    state: Mapping[str, Tensor],
    pair: Pair,
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Component:
    """One component of a state, its scale in ``lora_up``; ``name``: another than the file's."""
    alpha = None if pair.alpha is None else float(state[pair.alpha])
    if pair.nu is not None:
        parts = state[pair.down], state[pair.up], state[pair.nu]
        return foreign_lora2.component(name or pair.name, *parts, alpha, metadata or {})
    mid = None if pair.mid is None else state[pair.mid]
    down, up = state[pair.down], state[pair.up]
    return factors.from_tensors(name or pair.name, down, up, alpha, mid)


def tensors(component: Component, half: bool | None = None) -> tuple[Tensor, Tensor] | None:
    """(down, up) as a file holds them; None when there is nothing to hold.

    In fp16 where ``half`` says so; None: where it does not show, as in :func:`.fits_half`.
    """
    if not component.rank or not bool(component.lora_up.any()):
        return None
    down, up = lora_format.fold(component)
    if half is None:
        half = bool(lora_format.fits_half(lora_format.sizes_and_errors(down, up)[1][-1]))
    if half:
        down, up = down.half(), up.half()
    return down.contiguous(), up.contiguous()


def _put(out: dict[str, Tensor], pair: Pair, component: Component) -> None:
    found = tensors(component)
    if found is None:
        for key in pair.keys:
            out.pop(key, None)
        return
    out[pair.down], out[pair.up] = found
    out.pop(pair.mid or "", None)
    out[pair.alpha or pair.name + lora_keys.ALPHA] = torch.tensor(lora_format.STORED_ALPHA)
