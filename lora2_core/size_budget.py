"""A LoRA cut to a size in bytes by one singular value decomposition of everything.

Source: ours. Ranks learnt by gradient descent say where capacity is needed while training; once
the weights stand, the best ranks for a given number of bytes can be computed. Each ΔW is taken
apart exactly, and across all components those singular values are kept that hold most energy
(σ², the share of ‖ΔW‖²) a byte. So a run that is to fit into a size trains above it, by
``rank_budget.HEADROOM``, in every mode: a fixed rank cut so is the rival that adaptive ranks have
to beat.
"""

from __future__ import annotations

import heapq
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import lora_format
from .component import Component
from .lora_format import LoRAFileError, Shape

# Singular values below this share of a component's largest are rounding, not content.
_NOISE = 1e-12
_ROUNDS = 8  # of fitting the bytes that the exact header leaves over


@dataclass(frozen=True)
class Part:
    """One component taken apart: orthonormal columns, singular values as their importance."""

    component: Component
    energies: tuple[float, ...]  # (rank,), σ², falling
    half: tuple[bool, ...]  # (rank,), whether fp16 will do for the first 1, 2, … columns
    header_bytes: int  # at most, of the three entries in the file's header

    @property
    def rank(self) -> int:
        return len(self.energies)

    @cached_property
    def costs(self) -> list[int]:
        """Bytes at rank 0, 1, …: what is stored, and at most that much header."""
        row = self.component.in_features + self.component.out_features
        scalar = 4 + self.header_bytes  # alpha is one fp32 number
        sizes = [2 if half else 4 for half in self.half]
        return [0] + [scalar + size * row * rank for rank, size in enumerate(sizes, 1)]

    def shapes(self, rank: int) -> dict[str, Shape]:
        """What the file holds of the component at a rank."""
        kernel = tuple(self.component.lora_down.shape[1:])
        half = rank == 0 or self.half[rank - 1]
        return lora_format.component_shapes(
            self.key, rank, kernel, self.component.out_features, half
        )

    @property
    def key(self) -> str:
        return lora_format.kohya_key(self.component.name, self.component.root)


def decompose(component: Component) -> Component:
    """The same ΔW as its singular value decomposition, columns of most weight first.

    By QR of both sides and the SVD of a rank × rank matrix, in fp64; ΔW itself (out × in) is never
    formed. Convolutions are unrolled for it. Columns that add nothing are gone.
    """
    down, up = (side.flatten(1).double() for side in (component.lora_down, component.lora_up))
    up_q, up_r = torch.linalg.qr(up * component.importance.double())  # (out, rank), (rank, rank)
    down_q, down_r = torch.linalg.qr(down.t())  # (in, rank), (rank, rank)
    left, values, right = torch.linalg.svd(up_r @ down_r.t())
    rank = int((values > _NOISE * values[0]).sum())
    new_up, new_down = up_q @ left[:, :rank], right[:rank] @ down_q.t()
    return Component(
        component.name,
        new_down.float().view(rank, *component.lora_down.shape[1:]),
        new_up.float().view(component.out_features, rank, *component.lora_up.shape[2:]),
        values[:rank].float(),
        component.nu,
        component.root,
    )


def fit(
    components: Sequence[Component], metadata: Mapping[str, str], limit: int, min_rank: int = 1
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that takes ``limit`` bytes at most, header included.

    What fits stays as it was trained. Else all is decomposed and cut, and the metadata says so
    under ``lora2.svd``. A component may leave the file where its bytes, those of its header
    included, keep more elsewhere. A ``min_rank`` above 1 is left to every component; where not
    all can have it, it sinks for all. Raises LoRAFileError when not even one rank of one
    component fits.
    """
    state = lora_format.to_state(components)
    ranks = [component.rank for component in components]
    full = lora_format.complete(metadata, components, ranks)
    size = lora_format.encoded_bytes(lora_format.shapes_of(state), full)
    if not state:
        return state, full
    if size <= limit:
        logging.info("LoRA²: what was learnt takes %s; nothing has to be cut.", _share(size, limit))
        return state, full
    parts = [_take_apart(component, limit) for component in components]
    allowed = limit
    while True:
        chosen = _choose_exactly(parts, metadata, allowed, limit, min_rank)
        cut = [part.component.first(rank) for part, rank in zip(parts, chosen, strict=True)]
        state = lora_format.to_state(cut)
        full = _describe(parts, chosen, metadata, limit)
        left = lora_format.encoded_bytes(lora_format.shapes_of(state), full)
        if left <= limit:
            break
        # fp16 was said to do by a hair and does not: rounding of the sums that tell.
        allowed -= left - limit
    logging.info(
        "LoRA²: what was learnt takes %s; one SVD across %d components cut it to %s and kept "
        "%.2f %% of its energy.",
        _share(size, limit),
        len(parts),
        _share(left, limit),
        100 * kept_energy(parts, chosen),
    )
    return state, full


def kept_energy(parts: Sequence[Part], ranks: Sequence[int]) -> float:
    """The share of Σ ‖ΔW‖² that the first columns hold; 1 when there is nothing to keep."""
    total = sum(sum(part.energies) for part in parts)
    kept = sum(sum(part.energies[:rank]) for part, rank in zip(parts, ranks, strict=True))
    return kept / total if total else 1.0


def choose_ranks(parts: Sequence[Part], available: int, min_rank: int = 1) -> list[int]:
    """The ranks that keep most energy in ``available`` bytes of tensors and their header entries.

    Greedy by energy a byte. A first rank also pays for the header, and a component can become
    cheaper when fp16 starts to do; so steps run along the upper hull of energy over bytes, and
    single ranks fill what is left.
    """
    ranks = _floor(parts, available, min_rank)
    left = available - sum(part.costs[rank] for part, rank in zip(parts, ranks, strict=True))
    steps = [
        (-gain / cost if cost > 0 else -float("inf"), index, stop, cost)
        for index, part in enumerate(parts)
        for stop, gain, cost in _hull(part, ranks[index])
    ]
    closed: set[int] = set()  # a later step would leave a gap
    for _, index, stop, cost in sorted(steps):
        if cost > left:
            closed.add(index)
        elif index not in closed:
            ranks[index] = stop
            left -= cost
    _fill(parts, ranks, left)
    return ranks


def _take_apart(component: Component, limit: int) -> Part:
    svd = decompose(component)
    if not svd.rank:
        return Part(svd, (), (), 0)
    _, errors = lora_format.sizes_and_errors(*lora_format.fold(svd))
    energies = svd.importance.double().square().tolist()
    key = lora_format.kohya_key(svd.name, svd.root)
    kernel = tuple(svd.lora_down.shape[1:])
    shapes = lora_format.component_shapes(key, svd.rank, kernel, svd.out_features)
    # As long as an entry can get: the largest rank, and places at the end of the file.
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [limit, limit]}
        for name, (dtype, shape) in shapes.items()
    }
    half = tuple(lora_format.fits_half(errors).tolist())
    return Part(svd, tuple(energies), half, len(json.dumps(entries)))


def _choose_exactly(
    parts: Sequence[Part], metadata: Mapping[str, str], allowed: int, limit: int, min_rank: int
) -> list[int]:
    """Ranks whose file takes at most ``allowed`` bytes, as close to it as they come."""

    def size(ranks: Sequence[int]) -> int:
        shapes: dict[str, Shape] = {}
        for part, rank in zip(parts, ranks, strict=True):
            shapes |= part.shapes(rank)
        return lora_format.encoded_bytes(shapes, _describe(parts, ranks, metadata, limit))

    # The bytes beside the components, as many as they can get.
    largest = [part.rank for part in parts]
    frame = lora_format.encoded_bytes({}, _describe(parts, largest, metadata, limit)) + 16
    available, best = allowed - frame, None
    for _ in range(_ROUNDS):
        ranks = choose_ranks(parts, available, min_rank)
        exact = size(ranks)
        if exact <= allowed and (best is None or kept_energy(parts, ranks) > best[0]):
            best = kept_energy(parts, ranks), ranks
        taken = sum(part.costs[rank] for part, rank in zip(parts, ranks, strict=True))
        # Entries are mostly shorter than they can get: what that leaves can be used as well.
        before, available = available, allowed - (exact - taken)
        if available == before:
            break
    if best is None or not any(best[1]):
        least = min((p.costs[1] for p in parts if p.rank), default=0) + frame
        raise LoRAFileError(
            f"Nothing was written: a file of {limit / 1e6:.4g} MB has no room for a single "
            f"component, whose metadata alone takes {frame / 1e6:.4g} MB. Choose a "
            f"target_megabytes of at least {(limit - allowed + least) / 1e6:.4g}."
        )
    return best[1]


def _describe(
    parts: Sequence[Part], ranks: Sequence[int], metadata: Mapping[str, str], limit: int
) -> dict[str, str]:
    """The metadata of a file with these ranks."""
    svd = {
        "target_megabytes": limit / 1e6,
        "kept_energy": f"{kept_energy(parts, ranks):.6f}",  # always as long, as the size needs it
    }
    changed = {"lora2.svd": json.dumps(svd)}
    if "lora2.mean_rank" in metadata:
        changed["lora2.mean_rank"] = f"{sum(ranks) / len(ranks):.3f}"
    components = [part.component for part in parts]
    return lora_format.complete({**metadata, **changed}, components, ranks)


def _floor(parts: Sequence[Part], available: int, min_rank: int) -> list[int]:
    """The ranks to start from: ``min_rank`` where all can have it, else less; 0 instead of 1,
    which asks for nothing."""
    for floor in range(min_rank, 1, -1):
        ranks = [min(floor, part.rank) for part in parts]
        if sum(part.costs[rank] for part, rank in zip(parts, ranks, strict=True)) <= available:
            return ranks
    return [0] * len(parts)


def _hull(part: Part, start: int) -> list[tuple[int, float, int]]:
    """Steps of falling energy a byte from ``start`` on: (rank to go to, energy, bytes)."""
    steps: list[tuple[int, float, int]] = []
    for rank in range(start + 1, part.rank + 1):
        gain, cost = part.energies[rank - 1], part.costs[rank] - part.costs[rank - 1]
        # A step that gives more a byte than the one before is taken together with it.
        while steps and (cost <= 0 or gain * steps[-1][2] > steps[-1][1] * cost):
            _, earlier_gain, earlier_cost = steps.pop()
            gain, cost = gain + earlier_gain, cost + earlier_cost
        steps.append((rank, gain, cost))
    return steps


def _fill(parts: Sequence[Part], ranks: list[int], left: int) -> None:
    """Raise ``ranks`` one by one, those of most energy a byte first, while anything fits."""

    def step(index: int) -> tuple[float, int, int] | None:
        part, rank = parts[index], ranks[index]
        if rank == part.rank:
            return None
        cost = part.costs[rank + 1] - part.costs[rank]
        return -part.energies[rank] / max(cost, 1), index, cost

    waiting = [found for index in range(len(parts)) if (found := step(index))]
    heapq.heapify(waiting)
    while waiting:
        _, index, cost = heapq.heappop(waiting)
        if cost > left:
            continue
        left -= cost
        ranks[index] += 1
        if following := step(index):
            heapq.heappush(waiting, following)


def _share(size: int, limit: int) -> str:
    return f"{size / 1e6:.3f} MB of {limit / 1e6:.3f}"
