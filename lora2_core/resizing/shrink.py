"""A LoRA in memory made smaller: fewer columns a component, nothing else changed.

What :mod:`.resize` writes to a file, :func:`shrink` does to tensors that are to be applied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..config.load import Limits
from ..files.component import decompose_quickly, within_bounds
from ..files.decode import component_of, put_component
from ..files.header import LoRAFileError
from ..files.keys import Pair, counted
from ..files.read import LoRAFile
from .choice import Part, choose_ranks, part_of, ranks_for_energy


def shrink(file: LoRAFile, limits: Limits) -> LoRAFile:
    """``file`` within ``limits``, under the same keys.

    Of LoRAs of two factors a component, by any trainer; what else the file holds stays as it is.
    A component may go altogether. Sizes are those of all tensors and their entries in a header.
    Raises LoRAFileError where the size has no room for anything.
    """
    if limits.nothing:
        return file
    state, pairs = file.state, file.parsed.pairs
    components = [within_bounds(component_of(state, pair)) for pair in pairs]
    svd = limits.order == "svd"
    if svd:
        components = [decompose_quickly(component) for component in components]
    file_end = sum(tensor.nbytes for tensor in state.values())
    parts = [part_of(component, file_end, decomposed=svd) for component in components]
    ranks = ranks_within(parts, limits)
    kept = [part.first(rank) for part, rank in zip(parts, ranks, strict=True)]
    if limits.megabytes is not None:
        ranks = _within_bytes(kept, limits.megabytes, _bytes_beside(state, pairs))
    out = dict(state)
    for pair, component, rank in zip(pairs, components, ranks, strict=True):
        if pair.dora_scale and not state[pair.up].any():
            continue  # its magnitudes change the weight all the same
        if rank < state[pair.down].shape[0] or svd or limits.megabytes is not None:
            put_component(out, pair, component.first(rank))
    if pairs and not file.parsed.others and not any(pair.down in out for pair in pairs):
        one = pairs[0]  # of rank 0: whoever loads it knows why there is nothing to patch
        out |= {one.down: state[one.down][:0], one.up: state[one.up][:, :0]}
    return file.with_state(out)


def left_whole(file: LoRAFile, limits: Limits) -> str:
    """For a person: what ``limits`` do not reach in ``file``, by kind and number; empty where
    there is nothing of that kind, or nothing is limited."""
    options = {
        "max_rank": limits.max_rank,
        "keep_energy": None if limits.energy == 1 else limits.energy,
        "megabytes": limits.megabytes,
    }
    asked = [name for name, value in options.items() if value is not None]
    kinds = {kind: len(some) for kind, some in file.parsed.others.items() if kind != "ia3"}
    if limits.nothing or not kinds:
        return ""
    told = " and ".join(counted(count, kind) for kind, count in kinds.items())
    verb = "is" if sum(kinds.values()) == 1 else "are"
    cut = "cuts" if len(asked) == 1 else "cut"
    return f"{told} {verb} loaded whole: {' and '.join(asked)} {cut} pairs of factors alone."


def ranks_within(parts: Sequence[Part], limits: Limits) -> list[int]:
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


def _within_bytes(parts: Sequence[Part], megabytes: float, beside: int) -> list[int]:
    """The ranks of ``parts``, or fewer where they and the bytes beside them take more."""
    available = int(megabytes * 1e6) - beside
    whole = [part.rank for part in parts]
    if not any(whole) or sum(part.costs[-1] for part in parts) <= available:
        return whole
    ranks = choose_ranks(parts, available)
    if not any(ranks):
        least = beside + min(part.costs[1] for part in parts if part.rank)
        uncut = f" beside the {beside / 1e6:.4g} MB that have no ranks to cut" if beside else ""
        raise LoRAFileError(
            f"megabytes is {megabytes:g}, which has no room for a single component of this LoRA"
            f"{uncut}; choose at least {math.ceil(least / 1e2) / 1e4:g}."
        )
    return ranks


def _bytes_beside(state: Mapping[str, Tensor], pairs: Sequence[Pair]) -> int:
    """Of all that stays as it is, with its entries in a header."""
    factors_of = {key for p in pairs for key in (p.down, p.up, p.mid, p.alpha)}
    file_end = sum(tensor.nbytes for tensor in state.values())
    return sum(
        tensor.nbytes + len(json.dumps({key: _entry(tensor, file_end)}))
        for key, tensor in state.items()
        if key not in factors_of
    )


def _entry(tensor: Tensor, file_end: int) -> dict[str, object]:
    """Of a header, as long as it can get."""
    return {"dtype": "F8_E4M3", "shape": list(tensor.shape), "data_offsets": [file_end, file_end]}
