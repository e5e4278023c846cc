"""A LoRA file as something to take components from, one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from torch import Tensor

from ..files.component import Component
from ..files.decode import component_of, stored_magnitudes
from ..files.header import Header, LoRAFileError, TensorShape, read_header, shown_key
from ..files.keys import ALPHA, DORA_SCALE, DOWN, FACTORS, UP, Pair, counted
from ..files.kohya_names import changed_twice, kohya_name, sgm_name
from ..files.raw.tensors import TensorFile
from ..files.read import (
    alphas_of,
    check_finite,
    check_readable,
    inspect_header,
    unused_alphas,
)
from .beside import kept_keys, magnitudes_alone, sets, shape_of, slots_of, told

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

    def rank(self, key: str) -> int:
        """How many columns are stored of it."""
        ...

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

    def rank(self, key: str) -> int:
        return self.header[self._pairs[key].down].shape[0]

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
        kept = told(self.header)
        kept += [f"{self._aside} DoRA of magnitudes alone"] if self._aside else []
        return [f"Kept as they are: {', '.join(kept)}."] if kept else []

    def keeps_whole(self, key: str, component: Component) -> bool:
        pair = self._pairs[key]
        if not magnitudes_alone(pair, component.lora_down, component.lora_up):
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
        raise named_twice(header.path, *twice)


def named_twice(path: Path, *names: str) -> LoRAFileError:
    """Of a file that says two things of one layer."""
    return LoRAFileError(
        f"{path} is damaged: it names a component twice ({' and '.join(map(shown_key, names))})."
    )


def check_can_be_cut(source: LoRASource) -> None:
    """Raises LoRAFileError where nothing in a file has columns to cut."""
    if not source.keys:
        raise nothing_to_cut(source, source.left)


def nothing_to_cut(source: LoRASource, kinds: Iterable[str]) -> LoRAFileError:
    """Of a file of these kinds."""
    called = ", ".join(counted(2, kind).removeprefix("2 ") for kind in kinds)
    return LoRAFileError(
        f"{source.path} holds {called}, which have no ranks to cut or to add; choose a LoRA whose "
        "components are two factors."
    )
