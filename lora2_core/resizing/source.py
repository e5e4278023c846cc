"""LoRA files as something to take components from, one at a time: one file, or a sum of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from torch import Tensor

from ..files.component import Component, sum_of
from ..files.decode import as_dora_scale, component_of
from ..files.header import Header, LoRAFileError, read_header, shown_key
from ..files.keys import DORA_SCALE, Pair
from ..files.kohya_names import in_one_style, kohya_name
from ..files.raw.tensors import TensorFile
from ..files.read import alphas_of, check_finite, check_two_factors, inspect_header

_UNCUT = {  # kinds that have no columns to cut or to put side by side
    "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT",
    "difference": "full differences", "norm": "norms",
}  # fmt: skip


class Source(Protocol):
    """What is to be written anew."""

    @property
    def keys(self) -> Sequence[str]:
        """Kohya keys of the components, in the order of the file."""
        ...

    @property
    def nbytes(self) -> int:
        """Of all that is there."""
        ...

    def component(self, key: str) -> Component: ...

    def extra(self, key: str) -> dict[str, Tensor]:
        """Tensors beside the factors, by their ending."""
        ...

    def check_unchanged(self) -> None:
        """Raises LoRAFileError if what components were read from is not what it was."""
        ...


class LoRASource:
    """One file. The tensors of a component are read when it is asked for.

    ``partly``: only its components of two factors; :attr:`left` counts the others by their kind.
    Raises LoRAFileError for a file that is unreadable, or whose LoRA is not of two factors, and
    once it has been changed.
    """

    def __init__(self, path: Path, partly: bool = False):
        self.path = path
        self.header = read_header(path)
        infos, self.metadata = inspect_header(self.header)
        self._nu = {info.key: info.nu for info in infos}
        parsed = self.header.parsed
        if not partly:
            _check_whole(self.header)
        pairs = [pair for pair in parsed.pairs if not (pair.reshape or pair.diagonal)]
        self.left = {_UNCUT[kind]: len(components) for kind, components in parsed.others.items()}
        adaptive = sum(pair.diagonal is not None for pair in parsed.pairs)
        reshaping = len(parsed.pairs) - len(pairs) - adaptive
        self.left |= {"AdaLoRA": adaptive} if adaptive else {}
        self.left |= {"that change a layer's shape": reshaping} if reshaping else {}
        self.ignored = parsed.unknown  # keys that no component has a place for
        self._alphas = alphas_of(self.header)
        self._pairs = {kohya_name(pair.name): pair for pair in pairs}
        if len(self._pairs) < len(pairs):
            raise LoRAFileError(f"{path} is damaged: it names a component twice.")
        self._file = TensorFile(self.header)

    def __enter__(self) -> LoRASource:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    @property
    def keys(self) -> list[str]:
        return list(self._pairs)

    @property
    def nbytes(self) -> int:
        return self.header.file_bytes

    def pair(self, key: str) -> Pair:
        return self._pairs[key]

    def component(self, key: str) -> Component:
        pair = self._pairs[key]
        state = {name: self._file.tensor(name) for name in pair.keys}
        check_finite(state, str(self.path))
        try:
            component = component_of(state, pair, key, self.metadata, self._alphas.get(pair.name))
        except ValueError as error:
            raise LoRAFileError(f"{self.path} is damaged: {error}") from None
        check_finite({pair.down: component.lora_down, pair.up: component.lora_up}, str(self.path))
        return component if pair.nu is not None else replace(component, nu=self._nu[pair.name])

    def extra(self, key: str) -> dict[str, Tensor]:
        name = self._pairs[key].dora_scale
        if name is None:
            return {}
        magnitudes = self._file.tensor(name)
        check_finite({name: magnitudes}, str(self.path))
        known = name.endswith(DORA_SCALE)
        return {DORA_SCALE: (magnitudes if known else as_dora_scale(magnitudes)).float()}

    def copy_to(self, target: BinaryIO) -> None:
        """Write the whole file to ``target``, as it is."""
        self._file.copy_to(target)

    def check_unchanged(self) -> None:
        """Raises LoRAFileError if the file was changed since its header was read."""
        self._file.check_unchanged()


def _check_whole(header: Header) -> None:
    """Raises LoRAFileError where a file holds more than two factors a component."""
    path, parsed = header.path, header.parsed
    if parsed.others:
        kinds = ", ".join(_UNCUT[kind] for kind in parsed.others)
        raise LoRAFileError(
            f"{path} holds {kinds}, which have no ranks to cut or to add; choose a LoRA whose "
            "components are two factors."
        )
    reshaped = next((pair.name for pair in parsed.pairs if pair.reshape), None)
    if reshaped:
        raise LoRAFileError(
            f"{path} changes the shape of {shown_key(reshaped)}; such a LoRA can only be loaded "
            "as it is."
        )
    check_two_factors(header)


@dataclass(frozen=True)
class Addend:
    """One LoRA of a sum; its patches count ``weight`` times."""

    source: LoRASource
    weight: float = 1.0


class Sum:
    """Several files as one. Raises LoRAFileError where they cannot be added."""

    def __init__(self, addends: Sequence[Addend]):
        self._addends = addends
        for addend in addends:
            dora = [key for key in addend.source.keys if addend.source.pair(key).dora_scale]
            if dora:
                raise LoRAFileError(
                    f"{addend.source.path} is a DoRA, whose magnitudes cannot be added to another "
                    "LoRA; load it beside the others instead."
                )
        try:
            styled = in_one_style({str(a.source.path): a.source.keys for a in addends})
        except ValueError as error:
            raise LoRAFileError(str(error)) from None
        self._holders: dict[str, list[tuple[Addend, str]]] = {}
        for addend in addends:
            for key, common in styled[str(addend.source.path)].items():
                self._holders.setdefault(common, []).append((addend, key))
        for key, holders in self._holders.items():
            _check_alike(key, holders)

    @property
    def keys(self) -> list[str]:
        return list(self._holders)

    @property
    def nbytes(self) -> int:
        return sum(addend.source.nbytes for addend in self._addends) * 2  # fp16 may become fp32

    def component(self, key: str) -> Component:
        holders = self._holders[key]
        return sum_of(key, [(a.source.component(name), a.weight) for a, name in holders])

    def extra(self, key: str) -> dict[str, Tensor]:
        return {}

    def check_unchanged(self) -> None:
        for addend in self._addends:
            addend.source.check_unchanged()


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
