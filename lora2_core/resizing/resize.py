"""A LoRA file from others: smaller, or the sum of several; always of our format.

Two passes over the components, with one of them in memory at a time: the first learns what each
column holds, then all ranks are chosen together, and the second writes what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..config.load import Limits
from ..files.component import Component, decompose_quickly, within_bounds
from ..files.decode import factor_tensors
from ..files.header import LoRAFileError, shown_key
from ..files.metadata import VERSION, understood_metadata
from ..files.read import check_storable
from ..files.write import writing
from .choice import Part, kept_energy, part_to_cut
from .frame import Frame, all_of, frame_of_one, last_byte, titled
from .source import LoRASource, Source, check_can_be_cut
from .stream import Beside, Planned, write_stream
from .sums import Addend, Sum


@dataclass(frozen=True)
class Resized:
    """What came out, for people and scripts."""

    path: Path
    before: int  # bytes
    after: int
    ranks_before: tuple[int, ...]
    ranks_after: tuple[int, ...]  # of the same components
    kept: float  # share of Σ‖ΔW‖²; below 0 where it is further from ΔW than nothing would be
    ignored: tuple[str, ...] = ()  # keys of no known kind, which the new file has no place for
    beside: tuple[str, ...] = ()  # sentences on what there is beside the factors

    @property
    def error(self) -> float:
        """‖ΔW − what is kept of it‖ / ‖ΔW‖ over all components."""
        return math.sqrt(max(0.0, 1 - self.kept))

    def text(self) -> str:
        """For a person: sizes, mean ranks, what is kept."""
        sizes = f"{self.path.name}: {self.before / 1e6:.2f} → {self.after / 1e6:.2f} MB"
        beside = "".join(f" {one}" for one in self.beside)
        return f"{sizes}{self._about_ranks}.{beside}{self._not_written}"

    @property
    def _about_ranks(self) -> str:
        if not self.ranks_before:
            return ""  # differences alone, which have none
        before, after = (sum(ranks) / len(ranks) for ranks in (self.ranks_before, self.ranks_after))
        left_out = self.ranks_after.count(0)
        gone = f", {left_out} of {len(self.ranks_after)} components left out" if left_out else ""
        kept = f"{100 * self.kept:.2f} % of the energy is kept"
        if self.kept < 0:
            kept = "it is further from the LoRA than no LoRA would be, so choose the order svd"
        return (
            f", mean rank {before:.1f} → {after:.1f}{gone}; {kept} "
            f"(relative error {self.error:.4f})"
        )

    @property
    def _not_written(self) -> str:
        if not self.ignored:
            return ""
        return f" Left out as no part of a LoRA: {shown_key(self.ignored[0])}" + (
            f" and {len(self.ignored) - 1} more." if len(self.ignored) > 1 else "."
        )


def resize_file(source: Path, target: Path, limits: Limits, new: bool = False) -> Resized:
    """Write ``source`` within ``limits`` to ``target``.

    A LoRA² file that is within them already is copied byte by byte. ``new``: nothing is replaced.
    Raises LoRAFileError for what cannot be read, cut or written, and NameTaken where ``new`` and
    there is something at ``target`` by then; that is then as it was.
    """
    with LoRASource(source) as opened:
        check_can_be_cut(opened)
        work = _Work(opened, frame_of_one(opened.metadata, source.name, limits, {}, target.stem))
        if work.copies:
            _copy(opened, target, new)
            return work.result(target, opened.nbytes, opened.nbytes)
        after = work.write(target, new)
        return work.result(target, opened.nbytes, after, opened.ignored)


def merge_files(
    sources: Sequence[tuple[Path, float]], target: Path, limits: Limits, new: bool = False
) -> Resized:
    """Write the sum of LoRAs, each times its weight, to ``target``; then within ``limits``.

    Without limits the patch of the file is the sum of the patches to 1e-5: ranks add up, and all
    is stored in fp32. Raises LoRAFileError as :func:`resize_file` does.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(LoRASource(path)) for path, _ in sources]
        addends = [Addend(s, weight) for s, (_, weight) in zip(opened, sources, strict=True)]
        about = {
            "from": [
                {
                    "name": a.source.path.name,
                    "hash": a.source.metadata.get("sshs_model_hash", ""),
                    "weight": a.weight,
                }
                for a in addends
            ]
        }
        whole = Sum([a for a in addends if a.weight])
        said = titled(_joined(opened), target.stem)
        work = _Work(whole, Frame(said, "lora2.merge", about, limits))
        before = sum(source.nbytes for source in opened)
        ignored = [key for source in opened for key in source.ignored] + whole.ignored
        return work.result(target, before, work.write(target, new), ignored)


class _Work:
    """The first pass, the choice, and the second pass."""

    def __init__(self, source: Source, frame: Frame):
        self._source, limits = source, frame.limits
        # Taken apart only where something may be cut: what stays whole keeps its own numbers.
        self._svd = limits.order == "svd" and not limits.nothing
        self._exact = limits.nothing and isinstance(source, Sum)
        self._parts: list[Part] = []
        self._stored: list[int] = []
        for key in source.keys:
            component = source.component(key)
            if source.keeps_whole(key, component):
                continue
            self._stored.append(source.rank(key))
            self._parts.append(self._part(within_bounds(component)))
        self._frame = replace(frame, beside=source.beside)  # known by now
        ours = isinstance(source, LoRASource) and VERSION in source.metadata
        own = source.nbytes if ours else None
        self.ranks = self._frame.choose(self._parts, own)
        megabytes = limits.megabytes
        fits = own is not None and (megabytes is None or own <= int(megabytes * 1e6))
        # Whether the file is ours, is within the limits, and loses no column that holds anything:
        # then it stays as it is.
        self.copies = fits and all_of(self._parts, self.ranks)

    def result(self, target: Path, before: int, after: int, ignored: Sequence[str] = ()) -> Resized:
        kept, ranks = kept_energy(self._parts, self.ranks), tuple(self.ranks)
        told = tuple(self._source.told_beside())
        stored = tuple(self._stored)
        return Resized(target, before, after, stored, ranks, kept, tuple(ignored), told)

    def write(self, target: Path, new: bool) -> int:
        some = any(sum(part.energies) for part in self._parts)
        if not some and not self._source.changes_beside():
            raise LoRAFileError(
                f"{target.name} was not written: it would change nothing. Choose another LoRA, or "
                "weights that do not cancel."
            )
        if some and not any(self.ranks):
            raise LoRAFileError(
                f"{target.name} was not written: nothing is left of the LoRA; keep more of it."
            )
        planned = [
            Planned(part.outline, rank, part.half[rank - 1], self._source.extra(part.outline.key))
            for part, rank in zip(self._parts, self.ranks, strict=True)
            if rank
        ]
        metadata = self._frame.metadata_at(self._parts, self.ranks)
        unchanged = self._source.check_unchanged
        beside = Beside(self._source.beside, self._source.tensor)
        return write_stream(target, planned, metadata, self._tensors, new, unchanged, beside)

    def _part(self, component: Component) -> Part:
        file_end, beside = last_byte(self._source.nbytes), self._source.extra(component.name)
        part = part_to_cut(component, self._svd, file_end, beside)
        return replace(part, half=(False,) * part.rank) if self._exact else part

    def _tensors(self, planned: Planned) -> tuple[Tensor, Tensor]:
        component = within_bounds(self._source.component(planned.outline.key))
        if self._svd:
            component = decompose_quickly(component)
        factors = factor_tensors(component.first(planned.rank), planned.half)
        if factors is None or factors[0].shape[0] != planned.rank:
            self._source.check_unchanged()
            raise RuntimeError(f"{planned.outline.key} is not what it was a moment ago")
        for factor in factors:
            check_storable(planned.outline.key, factor)
        return factors


def _copy(source: LoRASource, target: Path, new: bool) -> None:
    with writing(target, source.nbytes, new) as file:
        source.copy_to(file)


def _joined(sources: Sequence[LoRASource]) -> dict[str, str]:
    """The metadata of a sum: what all say alike, and every trigger."""
    first, *others = (understood_metadata(source.metadata) for source in sources)
    alike = {
        name: text
        for name, text in first.items()
        if all(other.get(name) == text for other in others)
    }
    name = "modelspec.trigger_phrase"
    triggers = dict.fromkeys(s.metadata[name] for s in sources if s.metadata.get(name))
    if triggers:
        alike[name] = ", ".join(triggers)
    for title in ("ss_output_name", "modelspec.title"):
        if any(title in source.metadata for source in sources):
            alike[title] = ""
    return alike
