"""Which ranks to keep of components whose columns are known by what they hold and what they cost.

Source: ours. Ranks learnt by gradient descent say where capacity is needed while training; once
the weights stand, the best ranks for a number of bytes or a share of the energy can be computed:
across all components those columns are kept that hold most energy (their share of ‖ΔW‖²) a byte.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..files.component import Component, column_energies, singular_values
from ..files.encode import (
    STORED_ALPHA,
    component_shapes,
    encoded_bytes,
    fits_half,
    fold,
    kohya_key,
    norms_and_half_errors,
    shapes_of,
)
from ..files.header import LoRAFileError, TensorShape, tensor_bytes

# Of fp16: half a step between neighbours of 1, and of the smallest numbers; the largest number.
_HALF_STEP, _SMALLEST_STEP, _LARGEST_HALF = 2.0**-11, 2.0**-25, 6e4
_ROUNDS = 8  # of fitting the bytes that the exact header leaves over


@dataclass(frozen=True)
class Outline:
    """A component without its tensors."""

    key: str  # in the file, without suffix
    kernel: tuple[int, ...]  # (in,) of a linear layer, (in, height, width) of a convolution
    out_features: int
    nu: float | None = None
    # What goes with the factors, by ending: (".dora_scale", …)
    beside: tuple[tuple[str, TensorShape], ...] = ()

    @classmethod
    def of(cls, component: Component, beside: Mapping[str, Tensor] | None = None) -> Outline:
        key = kohya_key(component.name, component.root)
        kernel = tuple(component.lora_down.shape[1:])
        others = tuple(shapes_of(beside or {}).items())
        return cls(key, kernel, component.out_features, component.nu, others)

    @property
    def in_features(self) -> int:
        """Of the unrolled weight (out, in · kernel area)."""
        return math.prod(self.kernel)

    def shapes(self, rank: int, half: bool = True) -> dict[str, TensorShape]:
        """What a file holds of the component at a rank; nothing at rank 0."""
        if not rank:
            return {}
        factors = component_shapes(self.key, rank, self.kernel, self.out_features, half)
        return factors | {self.key + end: shape for end, shape in self.beside}


@dataclass(frozen=True)
class Part:
    """What each column of one component holds and costs."""

    outline: Outline
    energies: tuple[float, ...]  # (rank,), see :func:`..files.component.column_energies`
    half: tuple[bool, ...]  # (rank,), whether fp16 will do for the first 1, 2, … columns
    header_bytes: int  # at most, of its entries in the file's header

    @property
    def rank(self) -> int:
        return len(self.energies)

    @cached_property
    def costs(self) -> list[int]:
        """Bytes at rank 0, 1, …: what is stored, and at most that much header."""
        row = self.outline.in_features + self.outline.out_features
        beside = sum(tensor_bytes(shape) for _, shape in self.outline.beside)
        scalar = 4 + beside + self.header_bytes  # alpha is one fp32 number
        sizes = [2 if half else 4 for half in self.half]
        return [0] + [scalar + size * row * rank for rank, size in enumerate(sizes, 1)]

    def shapes(self, rank: int) -> dict[str, TensorShape]:
        """What the file holds of the component at a rank."""
        return self.outline.shapes(rank, rank == 0 or self.half[rank - 1])

    def first(self, rank: int) -> Part:
        """As if there were no more than ``rank`` columns; what the others hold is forgotten."""
        return replace(self, energies=self.energies[:rank], half=self.half[:rank])


def part_to_cut(
    component: Component, svd: bool, file_end: int, beside: Mapping[str, Tensor] | None = None
) -> Part:
    """What is known of a component whose ranks are to be chosen: of its decomposition with ``svd``,
    else of its own columns. ``beside``: what goes with its factors."""
    if not svd:
        return part_of(component, file_end, beside=beside)
    return part_of_values(Outline.of(component, beside), singular_values(component), file_end)


def part_of_values(outline: Outline, values: Tensor, file_end: int) -> Part:
    """:func:`part_of` a decomposition whose vectors nobody has computed; ``values``: (rank,).

    Whether fp16 will do is said from the size of the numbers: their rounding is relative, but of
    those below fp16's normal range absolute. On the safe side, so that what is said to fit does.
    """
    if not values.numel():
        return Part(outline, (), (), 0)
    columns = (values * values.numel() / STORED_ALPHA).sqrt()  # norm on either side
    off = torch.zeros_like(values)
    for features in (outline.in_features, outline.out_features):
        typical = columns / math.sqrt(features)
        off += (_HALF_STEP**2 + (_SMALLEST_STEP / typical) ** 2) / 3  # uniform rounding
    energies = values.square()
    errors = ((energies * off).cumsum(0) / energies.cumsum(0)).sqrt()
    fits = fits_half(errors) & (columns[0] < _LARGEST_HALF)
    header = _header_bytes(outline, values.numel(), file_end)
    return Part(outline, tuple(energies.tolist()), tuple(fits.tolist()), header)


def part_of(
    component: Component,
    file_end: int,
    decomposed: bool = False,
    beside: Mapping[str, Tensor] | None = None,
) -> Part:
    """What the columns of ``component`` hold and cost, in the order they have.

    ``file_end``: no tensor of the file lies beyond this byte; it decides how long an entry of the
    header can get. ``decomposed``: its importance is its singular values. ``beside``: what goes
    with the factors, by ending.
    """
    outline = Outline.of(component, beside)
    if not component.rank:
        return Part(outline, (), (), 0)
    _, errors = norms_and_half_errors(*fold(component))
    half = tuple(fits_half(errors).tolist())
    squares = component.importance.double().square()
    energies = squares if decomposed else column_energies(component)
    header = _header_bytes(outline, component.rank, file_end)
    return Part(outline, tuple(energies.tolist()), half, header)


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
    for worth, index, stop, cost in sorted(steps):
        if cost > left or worth > 0:  # too large, or it leads away from ΔW
            closed.add(index)
        elif index not in closed:
            ranks[index] = stop
            left -= cost
    _fill(parts, ranks, left)
    return ranks


def ranks_for_energy(parts: Sequence[Part], share: float) -> list[int]:
    """Ranks that keep at least ``share`` of the energy in few bytes: steps of most energy a byte
    first, until it is reached."""
    needed = share * sum(sum(part.energies) for part in parts)
    steps = sorted(
        (-gain / cost if cost > 0 else -float("inf"), index, stop, gain)
        for index, part in enumerate(parts)
        for stop, gain, cost in _hull(part, 0)
    )
    ranks, kept = [0] * len(parts), 0.0
    for worth, index, stop, gain in steps:
        if kept >= needed or worth > 0:  # from here on, columns lead away
            break
        ranks[index] = stop
        kept += gain
    return ranks


def choose_exactly(
    parts: Sequence[Part],
    metadata_at: Callable[[Sequence[int]], Mapping[str, str]],
    allowed: int,
    limit: int,
    min_rank: int = 1,
    option: str = "target_megabytes",
    beside: Mapping[str, TensorShape] | None = None,
) -> list[int]:
    """Ranks whose file takes at most ``allowed`` bytes, as close to it as they come.

    ``metadata_at``: the metadata of a file of given ranks; ``limit``: what a person asked for, and
    ``option`` what that is called; ``beside``: tensors that the file holds whatever the ranks.
    Raises NoRoom when not even one rank of one component fits.
    """
    others = dict(beside or {})

    def size(ranks: Sequence[int]) -> int:
        shapes = dict(others)
        for part, rank in zip(parts, ranks, strict=True):
            shapes |= part.shapes(rank)
        return encoded_bytes(shapes, metadata_at(ranks))

    # The bytes beside the components, as many as they can get.
    largest = [part.rank for part in parts]
    frame = encoded_bytes(others, metadata_at(largest)) + 16
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
        least += limit - allowed
        raise NoRoom(limit, least, frame, sum(map(tensor_bytes, others.values())), option)
    return best[1]


class NoRoom(LoRAFileError):
    """Not even one rank of one component fits. All in bytes, but ``least``, the megabytes that
    would do; ``frame``: of all but the components, of which ``held`` are tensors."""

    def __init__(self, limit: int, least: int, frame: int, held: int, option: str):
        self.limit, self.held, self.least = limit, held, _rounded_up(least)
        alone = f"whose metadata alone takes {frame / 1e6:.4g} MB"
        if held:
            alone = (
                f"since what has no ranks to cut takes {held / 1e6:.4g} MB and the metadata "
                f"{(frame - held) / 1e6:.4g} MB"
            )
        super().__init__(
            f"Nothing was written: a file of {limit / 1e6:.4g} MB has no room for a single "
            f"component, {alone}. Choose {option} of at least {self.least:.4g}."
        )


def _rounded_up(nbytes: int) -> float:
    """Megabytes with the four digits that are shown, so that what is asked for suffices."""
    digits = 10.0 ** (math.floor(math.log10(nbytes)) - 3)
    return math.ceil(nbytes / digits) * digits / 1e6


def _header_bytes(outline: Outline, rank: int, file_end: int) -> int:
    """As long as a component's entries can get."""
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [file_end, file_end]}
        for name, (dtype, shape) in outline.shapes(rank).items()
    }
    return len(json.dumps(entries))


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
        if rank == part.rank or part.energies[rank] < 0:
            return None
        cost = part.costs[rank + 1] - part.costs[rank]
        return -part.energies[rank] / max(cost, 1), index, cost

    waiting = [first for index in range(len(parts)) if (first := step(index))]
    heapq.heapify(waiting)
    while waiting:
        _, index, cost = heapq.heappop(waiting)
        if cost > left:
            continue
        left -= cost
        ranks[index] += 1
        if following := step(index):
            heapq.heappush(waiting, following)
