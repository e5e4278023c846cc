"""What the tensors of a LoRA say: how strong each component is, and how much of it is needed.

One component is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.load import Limits
from ..files.component import within_bounds
from ..files.header import LoRAFileError
from ..files.keys import counted
from ..files.metadata import VERSION
from .choice import Part, kept_energy, part_to_cut
from .frame import all_of, frame_of_one, last_byte
from .source import LoRASource

_MOST = 0.9  # of a component's energy: its effective rank
_DAMAGED = "damaged (not finite, or beyond all measure)"
_ALMOST_ALL = 0.99  # of the file's energy: what it could be cut to


@dataclass(frozen=True)
class Strength:
    """One component."""

    key: str
    norm: float  # of ΔW, Frobenius
    share: float  # of the file's energy, Σ‖ΔW‖²
    rank: int  # stored
    effective_rank: int  # columns of a decomposition that hold 90 % of the component's energy


@dataclass(frozen=True)
class Measured:
    """One file."""

    components: tuple[Strength, ...]
    norm: float  # √Σ‖ΔW‖²
    cut_bytes: int  # of the file that keeps 99 % of the energy
    cut_rank: float  # its mean rank
    left: tuple[tuple[str, int], ...] = ()  # what was not measured: kinds, and how many of each

    @property
    def not_measured(self) -> str:
        """For a person; empty where all was."""
        kinds = ", ".join(counted(count, kind) for kind, count in self.left)
        return f"Not measured: {kinds}." if kinds else ""

    @property
    def could_be_cut(self) -> str:
        """For a person."""
        return (
            f"could be cut to {self.cut_bytes / 1e6:.2f} MB (mean rank {self.cut_rank:.1f}) at "
            f"{100 * _ALMOST_ALL:.0f} % of its energy"
        )


def measure_file(path: Path) -> Measured:
    """Read and decompose every component of two factors; the others are counted.

    Raises LoRAFileError where the file is no LoRA, or is changed meanwhile.
    """
    with LoRASource(path, partly=True) as source:
        parts: list[Part] = []
        stored: list[int] = []
        left = dict(source.left)
        for key in source.keys:
            try:
                component = source.component(key)
            except LoRAFileError:
                source.check_unchanged()
                left[_DAMAGED] = left.get(_DAMAGED, 0) + 1
                continue
            stored.append(component.rank)
            beside = source.extra(key)  # a DoRA's magnitudes stay
            bounded = within_bounds(component)
            parts.append(part_to_cut(bounded, True, last_byte(source.nbytes), beside))
        source.check_unchanged()
        own = source.nbytes if VERSION in source.metadata else None
        limits = Limits(energy=_ALMOST_ALL)
        frame = frame_of_one(source.metadata, path.name, limits, source.beside)
    total = sum(sum(part.energies) for part in parts)
    ranks = frame.choose(parts) if total else [0] * len(parts)
    stays = own is not None and all_of(parts, ranks)
    return Measured(
        tuple(_strength(part, rank, total) for part, rank in zip(parts, stored, strict=True)),
        math.sqrt(total),
        own if own is not None and stays else frame.nbytes(parts, ranks),
        sum(ranks) / max(len(ranks), 1),
        tuple(left.items()),
    )


def strongest(components: Sequence[Strength], count: int = 10) -> list[Strength]:
    """Those that change most."""
    return sorted(components, key=lambda one: -one.norm)[:count]


def _strength(part: Part, stored: int, total: float) -> Strength:
    energy = sum(part.energies)
    return Strength(
        part.outline.key,
        math.sqrt(energy),
        energy / total if total else 0.0,
        stored,
        _columns_for(part, _MOST),
    )


def _columns_for(part: Part, share: float) -> int:
    for rank in range(1, part.rank + 1):
        if kept_energy([part], [rank]) >= share:
            return rank
    return part.rank
