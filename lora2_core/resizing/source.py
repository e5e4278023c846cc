"""LoRA files as something to take components from, one at a time: one file, or a sum of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from torch import Tensor

from ..files.component import Component, sum_of
from ..files.decode import component_of, stored_magnitudes
from ..files.header import Header, LoRAFileError, TensorShape, read_header, shown_key
from ..files.keys import ALPHA, DORA_SCALE, DOWN, FACTORS, UP, Pair, counted
from ..files.kohya_names import changed_twice, in_one_style, kohya_name, sgm_name
from ..files.raw.tensors import TensorFile
from ..files.read import (
    alphas_of,
    check_finite,
    check_readable,
    inspect_header,
    unused_alphas,
)
from .beside import SumBeside, kept_keys, sets, shape_of, slots_of, told

# By these ComfyUI tells the LoRAs that Flux' makers gave away for depth and edges: they double
# the inputs of img_in.
_FLUX_TOOLS = {"img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"}


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

    def keeps_whole(self, key: str, component: Component) -> bool:
        """Whether the component of ``key`` goes, from now on, into the file to be as it is: a DoRA
        whose factors are 0, since its magnitudes change the weight all the same."""
        ...

    def extra(self, key: str) -> dict[str, Tensor]:
        """Tensors beside the factors, by their ending."""
        ...

    @property
    def beside(self) -> Mapping[str, TensorShape]:
        """Tensors that are no two factors and go with them into the file to be, by their key."""
        ...

    def tensor(self, key: str) -> Tensor:
        """One of :attr:`beside`."""
        ...

    def changes_beside(self) -> bool:
        """Whether any of it changes a weight of a model."""
        ...

    def told_beside(self) -> list[str]:
        """Sentences on it, for a person."""
        ...

    def check_unchanged(self) -> None:
        """Raises LoRAFileError if what components were read from is not what it was."""
        ...


class LoRASource:
    """One file. The tensors of a component are read when it is asked for.

    ``partly``: whatever it holds; :attr:`left` counts what has no columns by its kind. Raises
    LoRAFileError for a file that is unreadable, or that can only be loaded as it is, and once it
    has been changed.
    """

    def __init__(self, path: Path, partly: bool = False):
        self.path = path
        self.header = read_header(path)
        infos, self.metadata = inspect_header(self.header)
        parsed = self.header.parsed
        self._nu = {info.key: info.nu for info in infos if info.kind in FACTORS}
        if not partly:
            _check_sizes_stay(self.header)
            check_readable(self.header)
            _check_once(self.header)
        pairs = [pair for pair in parsed.pairs if not (pair.reshape or pair.diagonal)]
        self.left = dict(Counter(info.kind for info in infos if info.kind not in FACTORS))
        adaptive = sum(pair.diagonal is not None for pair in parsed.pairs)
        reshaping = len(parsed.pairs) - len(pairs) - adaptive
        self.left |= {"AdaLoRA": adaptive} if adaptive else {}
        self.left |= {"that change a layer's shape": reshaping} if reshaping else {}
        self.ignored = parsed.strays  # keys that mean nothing beside other factors
        if partly:
            pairs = self._sure(pairs)
        else:
            self._alphas = alphas_of(self.header)
        self._pairs = {kohya_name(pair.name): pair for pair in pairs}
        beside = kept_keys(parsed)
        ours = {key + end for key in self._pairs for end in (DOWN, UP, ALPHA, DORA_SCALE)}
        if not partly and (len(self._pairs) < len(pairs) or ours & {*beside}):
            raise LoRAFileError(f"{path} is damaged: it names a component twice.")
        self.beside = {key: shape_of(self.header, key) for key in beside}
        shapes = {key: entry.shape for key, entry in self.header.entries.items()}
        self._aside = 0  # components that are kept as they are
        self._unused = unused_alphas(parsed, shapes)
        self._file = TensorFile(self.header)

    def _sure(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Those of which a file says only one thing; the others are counted in :attr:`left`."""
        names = Counter(sgm_name(kohya_name(pair.name)) for pair in pairs)
        once = [pair for pair in pairs if names[sgm_name(kohya_name(pair.name))] == 1]
        if len(once) < len(pairs):
            self.left["that the file names twice"] = len(pairs) - len(once)
        try:
            self._alphas = alphas_of(self.header)
        except LoRAFileError:
            self._alphas = {}
            sure = [pair for pair in once if pair.alpha is not None]
            self.left["whose alpha cannot be read (lora_adapter_metadata)"] = len(once) - len(sure)
            return sure
        return once

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
    def names(self) -> list[str]:
        """Kohya keys of all that can be added: of components, and of layers with differences."""
        slots = [kohya_name(name) for name, _ in slots_of(self.header.parsed)]
        return list(dict.fromkeys([*self._pairs, *slots]))

    @property
    def nbytes(self) -> int:
        return self.header.file_bytes

    def pair(self, key: str) -> Pair:
        return self._pairs[key]

    def component(self, key: str) -> Component:
        pair = self._pairs[key]
        state = {name: self.read(name) for name in pair.keys}
        try:
            component = component_of(state, pair, key, self.metadata, self._alphas.get(pair.name))
        except ValueError as error:
            raise LoRAFileError(f"{self.path} is damaged: {error}") from None
        check_finite({pair.down: component.lora_down, pair.up: component.lora_up}, str(self.path))
        return component if pair.nu is not None else replace(component, nu=self._nu[pair.name])

    def read(self, key: str) -> Tensor:
        """A tensor of the file, as it is; it is finite, but for an alpha that scales nothing."""
        tensor = self._file.tensor(key)
        if key not in self._unused:
            check_finite({key: tensor}, str(self.path))
        return tensor

    def tensor(self, key: str) -> Tensor:
        return self.read(key)

    def changes_beside(self) -> bool:
        parsed = self.header.parsed
        if self._aside or parsed.others.keys() - {"difference", "norm"}:
            return True
        return any(
            sets(slot) or bool(self.read(key).double().any())
            for slot, key in slots_of(parsed).items()
        )

    def told_beside(self) -> list[str]:
        kept = told(self.header.parsed)
        kept += [f"{self._aside} DoRA of magnitudes alone"] if self._aside else []
        return [f"Kept as they are: {', '.join(kept)}."] if kept else []

    def keeps_whole(self, key: str, component: Component) -> bool:
        pair = self._pairs[key]
        zero = not (component.lora_down.any() and component.lora_up.any())
        if pair.dora_scale is None or not component.rank or not zero:
            return False
        del self._pairs[key]
        self._aside += 1
        self.beside |= {name: shape_of(self.header, name) for name in pair.keys}
        return True

    def extra(self, key: str) -> dict[str, Tensor]:
        name = self._pairs[key].dora_scale
        if name is None:
            return {}
        magnitudes = self.read(name)
        return {DORA_SCALE: stored_magnitudes(name, magnitudes)}

    def copy_to(self, target: BinaryIO) -> None:
        """Write the whole file to ``target``, as it is."""
        self._file.copy_to(target)

    def check_unchanged(self) -> None:
        """Raises LoRAFileError if the file was changed since its header was read."""
        self._file.check_unchanged()


def _check_sizes_stay(header: Header) -> None:
    """Raises LoRAFileError where a file makes a layer larger; ComfyUI tells some by two keys."""
    parsed = header.parsed
    reshaped = next((pair.name for pair in parsed.pairs if pair.reshape), None)
    if header.entries.keys() >= _FLUX_TOOLS:
        reshaped = "img_in"
    if reshaped:
        raise LoRAFileError(
            f"{header.path} changes the shape of {shown_key(reshaped)}; such a LoRA can only be "
            "loaded as it is."
        )


def _check_once(header: Header) -> None:
    """Raises LoRAFileError where a file changes a weight in two ways."""
    if twice := changed_twice(header.parsed):
        raise LoRAFileError(
            f"{header.path} is damaged: it names a component twice "
            f"({' and '.join(map(shown_key, twice))})."
        )


def check_can_be_cut(source: LoRASource) -> None:
    """Raises LoRAFileError where nothing in a file has columns to cut."""
    if not source.keys:
        raise _nothing_to_cut(source, source.header.parsed.others)


def _nothing_to_cut(source: LoRASource, kinds: Iterable[str]) -> LoRAFileError:
    called = ", ".join(counted(2, kind).removeprefix("2 ") for kind in kinds)
    return LoRAFileError(
        f"{source.path} holds {called}, which have no ranks to cut or to add; choose a LoRA whose "
        "components are two factors."
    )


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

    def component(self, key: str) -> Component:
        holders = self._holders[key]
        return sum_of(key, [(a.source.component(name), a.weight) for a, name in holders])

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


def _check_one_each(path: Path, common: Mapping[str, str]) -> None:
    """Raises LoRAFileError where a file names one layer as ComfyUI and as diffusers do.

    ``common``: its names → those of the sum.
    """
    seen: dict[str, str] = {}
    for name, new in common.items():
        if (other := seen.setdefault(new, name)) != name:
            raise LoRAFileError(
                f"{path} is damaged: it names a component twice ({shown_key(other)} and "
                f"{shown_key(name)})."
            )


def _check_can_be_added(source: LoRASource) -> None:
    dora = [key for key in source.keys if source.pair(key).dora_scale]
    if dora:
        raise LoRAFileError(
            f"{source.path} is a DoRA, whose magnitudes cannot be added to another LoRA; load it "
            "beside the others instead."
        )
    if others := source.header.parsed.others.keys() - {"difference", "norm"}:
        raise _nothing_to_cut(source, sorted(others))


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
