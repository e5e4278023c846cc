"""Several LoRA files as one: something to take components from, one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config.checks import ConfigError
from ..files.component import Component, sum_of
from ..files.header import LoRAFileError, shown_key
from ..files.kohya_names import in_one_style
from .beside import SumBeside
from .source import LoRASource, named_twice, nothing_to_cut

_LARGEST_SIDE = 1e37  # of a factor before both sides are balanced; fp32 ends at 3e38


@dataclass(frozen=True)
class Addend:
    """One LoRA of a sum; its patches count ``weight`` times."""

    source: LoRASource
    weight: float = 1.0  # any finite number

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(
                f"The weight of {self.source.path.name} is {self.weight}, which is no finite "
                "number; choose one such as 0.5, or -1 to take the LoRA off the sum."
            )


class Sum:
    """Several files as one. Raises LoRAFileError where they cannot be added."""

    def __init__(self, addends: Sequence[Addend]):
        self._addends = addends
        for addend in addends:
            _check_can_be_added(addend.source)
        try:
            styled = in_one_style({str(a.source.path): a.source.names for a in addends})
        except ValueError as error:
            raise LoRAFileError(str(error)) from None
        self._holders: dict[str, list[tuple[Addend, str]]] = {}
        for addend in addends:
            common = styled[str(addend.source.path)]
            _check_one_each(addend.source.path, common)
            for key in addend.source.keys:
                self._holders.setdefault(common[key], []).append((addend, key))
        for key, holders in self._holders.items():
            _check_alike(key, holders)
        factors = {key: [a.source.path for a, _ in some] for key, some in self._holders.items()}
        files = [(addend.source, addend.weight) for addend in addends]
        self._beside = SumBeside(files, styled, factors)
        self.beside = self._beside.shapes
        self.ignored = self._beside.ignored

    @property
    def keys(self) -> list[str]:
        return list(self._holders)

    @property
    def nbytes(self) -> int:
        return sum(addend.source.nbytes for addend in self._addends) * 2  # fp16 may become fp32

    def rank(self, key: str) -> int:
        return sum(addend.source.rank(name) for addend, name in self._holders[key])

    def component(self, key: str) -> Component:
        holders = self._holders[key]
        parts = [(a.source.component(name), a.weight) for a, name in holders]
        for one, weight in parts:
            _check_product(key, one, weight)
        return sum_of(key, parts)

    def extra(self, key: str) -> dict[str, Tensor]:
        return {}

    def keeps_whole(self, key: str, component: Component) -> bool:
        return False

    def tensor(self, key: str) -> Tensor:
        return self._beside.tensor(key)

    def changes_beside(self) -> bool:
        return self._beside.changes()

    def told_beside(self) -> list[str]:
        return self._beside.told()

    def check_unchanged(self) -> None:
        for addend in self._addends:
            addend.source.check_unchanged()


def _check_product(key: str, component: Component, weight: float) -> None:
    """Raises LoRAFileError where a weight makes of a component what cannot be calculated with."""
    largest = float(component.lora_up.abs().max()) * abs(weight) if component.rank else 0.0
    if not largest <= _LARGEST_SIDE:
        raise LoRAFileError(
            f"{shown_key(key)} would hold values that are too large to be stored, so nothing was "
            "written; choose smaller weights."
        )


def _check_one_each(path: Path, common: Mapping[str, str]) -> None:
    """Raises LoRAFileError where a file names one layer as ComfyUI and as diffusers do.

    ``common``: its names → those of the sum.
    """
    seen: dict[str, str] = {}
    for name, new in common.items():
        if (other := seen.setdefault(new, name)) != name:
            raise named_twice(path, other, name)


def _check_can_be_added(source: LoRASource) -> None:
    dora = [key for key in source.keys if source.pair(key).dora_scale]
    if dora:
        raise LoRAFileError(
            f"{source.path} is a DoRA, whose magnitudes cannot be added to another LoRA; load it "
            "beside the others instead."
        )
    if others := source.header.parsed.others.keys() - {"difference", "norm"}:
        raise nothing_to_cut(source, sorted(others))


def _check_alike(key: str, holders: Sequence[tuple[Addend, str]]) -> None:
    shapes = []
    for addend, name in holders:
        pair, entries = addend.source.pair(name), addend.source.header.entries
        kernel = entries[pair.mid or pair.down].shape[2:]
        shapes.append((entries[pair.up].shape[0], entries[pair.down].shape[1], kernel))
    for (addend, _), shape in zip(holders, shapes, strict=True):
        if shape[:2] != shapes[0][:2]:
            raise LoRAFileError(
                f"{addend.source.path} was trained for another architecture than "
                f"{holders[0][0].source.path}: {shown_key(key)} is "
                f"{shape[0]}×{shape[1]} in one and {shapes[0][0]}×{shapes[0][1]} in the other."
            )
        if shape[2:] != shapes[0][2:]:
            raise LoRAFileError(
                f"{addend.source.path} and {holders[0][0].source.path} give "
                f"{shown_key(key)} kernels of different size."
            )
