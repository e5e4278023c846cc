"""The file that ranks are chosen for: what it says of itself, what it holds beside its components,
and so what it takes.

Whoever writes a smaller file, applies one from memory or only tells its size asks here, so that all
three have the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..config.load import Limits
from ..files.encode import STORED_ALPHA, encoded_bytes
from ..files.header import TensorShape
from ..files.metadata import (
    listing_entry,
    understood_metadata,
    with_listing,
    without_old_ranks,
)
from .choice import Part, choose_exactly, kept_energy, ranks_for_energy

_RESIZE = "lora2.resize"  # what a smaller file says of the one that it was made of
_DATE = "modelspec.date"  # of the old file, and nothing is dated here
_ROOM = 10**6  # bytes that a new header may take above the old one's


@dataclass(frozen=True)
class Frame:
    """``metadata``: of the file to be, but for its ranks; ``name`` and ``about``: what it says of
    how it was made; ``beside``: tensors that are of no component."""

    metadata: Mapping[str, str]
    name: str
    about: Mapping[str, object]
    limits: Limits
    beside: Mapping[str, TensorShape] = field(default_factory=dict)

    def metadata_at(self, parts: Sequence[Part], ranks: Sequence[int]) -> dict[str, str]:
        """The metadata of a file of these ranks; its length does not depend on what is kept."""
        limits = self.limits
        about = dict(self.about)
        if not limits.nothing:
            about |= {
                "order": limits.order,
                "max_rank": limits.max_rank,
                "energy": limits.energy,
                "megabytes": limits.megabytes,
                "kept_energy": f"{kept_energy(parts, ranks):.6f}",
            }
        changed = {self.name: json.dumps(about)}
        if "lora2.mean_rank" in self.metadata:
            changed["lora2.mean_rank"] = f"{sum(ranks) / max(len(ranks), 1):.3f}"
        changed |= {"ss_network_dim": "Dynamic", "ss_network_alpha": str(STORED_ALPHA)}
        entries = {
            o.key: listing_entry(o.nu, rank, o.in_features, o.out_features)
            for o, rank in zip((part.outline for part in parts), ranks, strict=True)
        }
        return with_listing({**self.metadata, **changed}, entries)

    def nbytes(self, parts: Sequence[Part], ranks: Sequence[int]) -> int:
        """Of the whole file."""
        shapes = dict(self.beside)
        for part, rank in zip(parts, ranks, strict=True):
            shapes |= part.shapes(rank)
        return encoded_bytes(shapes, self.metadata_at(parts, ranks))

    def choose(self, parts: Sequence[Part], own: int | None = None) -> list[int]:
        """Ranks within all limits. ``own``: bytes of the file that the parts are of, where that may
        stay as it is. Raises NoRoom where the size has none for anything."""
        ranks = [
            rank if any(part.energies[:rank]) else 0
            for part, rank in zip(parts, ranks_within(parts, self.limits), strict=True)
        ]
        if self.limits.megabytes is None:
            return ranks
        limit = int(self.limits.megabytes * 1e6)
        if own is not None and own <= limit and all_of(parts, ranks):
            return ranks
        if self.nbytes(parts, ranks) <= limit:
            return ranks
        kept = [part.first(rank) for part, rank in zip(parts, ranks, strict=True)]

        def metadata_at(some: Sequence[int]) -> dict[str, str]:
            return self.metadata_at(parts, some)

        return choose_exactly(kept, metadata_at, limit, limit, 1, "megabytes", self.beside)


def frame_of_one(
    metadata: Mapping[str, str],
    source: str,
    limits: Limits,
    beside: Mapping[str, TensorShape],
    title: str | None = None,
) -> Frame:
    """Of a smaller file of one. ``metadata``: of that, as it is; ``source``: its name; ``title``:
    of the new one."""
    about = {"from": source, "hash": metadata.get("sshs_model_hash", "")}
    return Frame(titled(understood_metadata(metadata), title), _RESIZE, about, limits, beside)


def titled(metadata: Mapping[str, str], title: str | None) -> dict[str, str]:
    """``metadata`` without its date, and under the name of the new file, where it has one."""
    metadata = {name: text for name, text in metadata.items() if name != _DATE}
    names = () if title is None else ("ss_output_name", "modelspec.title")
    return without_old_ranks({**metadata, **{n: title or "" for n in names if n in metadata}})


def all_of(parts: Sequence[Part], ranks: Sequence[int]) -> bool:
    """Whether no column is lost."""
    return all(part.rank == rank for part, rank in zip(parts, ranks, strict=True))


def last_byte(nbytes: int) -> int:
    """No tensor of a file made of one of ``nbytes`` lies beyond it."""
    return nbytes + _ROOM


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
