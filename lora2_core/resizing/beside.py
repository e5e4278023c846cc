"""What a LoRA file holds beside pairs of factors: differences, embeddings, modules saved as they
are. A smaller file keeps it, a sum adds what can be added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..files.header import Header, LoRAFileError, TensorShape, shown_key, shown_keys
from ..files.keys import (
    BIAS_DIFFERENCES,
    SET_WEIGHT,
    WEIGHT_DIFFERENCES,
    Loose,
    Pair,
    ParsedKeys,
    counted,
)
from ..files.kohya_names import kohya_name
from ..files.read import check_storable
from ..files.shapes import precise_kind

# What a tensor is of a layer: a difference of its weight or bias, or its weight itself.
_WEIGHT, _BIAS, _SET = "weight", "bias", "set"
_ENDINGS = {_WEIGHT: ".diff", _BIAS: ".diff_b", _SET: SET_WEIGHT}
_SLOT_OF = (
    dict.fromkeys(WEIGHT_DIFFERENCES, _WEIGHT)
    | dict.fromkeys(BIAS_DIFFERENCES, _BIAS)
    | {SET_WEIGHT: _SET}
)
_NORMS = (".w_norm", ".b_norm")

Slot = tuple[str, str]  # a layer's name, and which of its tensors


class Reader(Protocol):
    """An open file."""

    path: Path
    header: Header

    def read(self, key: str) -> Tensor:
        """A tensor of it, finite."""
        ...


@dataclass(frozen=True)
class Term:
    """One file's tensor in a sum."""

    file: Reader
    key: str
    weight: float


def kept_keys(parsed: ParsedKeys) -> list[str]:
    """Keys of all that goes into a smaller file as it is."""
    others = [key for components in parsed.others.values() for keys in components.values()
              for key in keys]  # fmt: skip
    return others + [key for one in parsed.loose for key in one.keys]


def magnitudes_alone(pair: Pair, down: Tensor, up: Tensor) -> bool:
    """Whether a DoRA changes its weight by its magnitudes alone, since its factors are 0: then it
    stays as it is. ``down``: (rank, in, …), ``up``: (out, rank, …)."""
    return pair.dora_scale is not None and down.shape[0] > 0 and not (down.any() and up.any())


def shape_of(header: Header, key: str) -> TensorShape:
    return header[key].dtype, header[key].shape


def told(header: Header) -> list[str]:
    """Of one file, for a person: ``258 differences``, ``1 embedding (sks cat)``."""
    shapes = {key: entry.shape for key, entry in header.entries.items()}
    kinds = kinds_of(header.parsed, shapes)
    return [counted(count, kind) for kind, count in kinds.items()] + told_loose(header.parsed.loose)


def kinds_of(parsed: ParsedKeys, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """How many components there are of each kind that is no two factors; ``shapes``: by key."""
    found = Counter[str]()
    for kind, components in parsed.others.items():
        for name, keys in components.items():
            found[precise_kind(kind, {key[len(name) :]: shapes[key] for key in keys})] += 1
    return dict(found)


def told_loose(every: Iterable[Loose]) -> list[str]:
    """The same of what no component has a place for."""
    by_kind: dict[str, list[Loose]] = {}
    for one in every:
        by_kind.setdefault(one.kind, []).append(one)
    found = []
    for kind, some in by_kind.items():
        count = sum(len(one.keys) for one in some) if kind == "unknown" else len(some)
        names = [one.name for one in some if one.name]
        found.append(counted(count, kind) + (f" ({shown_keys(names)})" if names else ""))
    return found


def slots_of(parsed: ParsedKeys) -> dict[Slot, str]:
    """The key of every difference by what it is of; names as in the file.

    Of two for one weight the one is told that ComfyUI takes.
    """
    found: dict[Slot, str] = {}
    for kind in ("norm", "difference"):
        for name, keys in parsed.others.get(kind, {}).items():
            for key in keys:
                slot = _SLOT_OF.get(key[len(name) :])
                if slot == _WEIGHT and name.endswith(".bias"):  # a bias by its own name
                    found[name.removesuffix(".bias"), _BIAS] = key
                elif slot is not None:
                    found[name, slot] = key
    return found


def sets(slot: Slot) -> bool:
    """Whether a weight is set, whatever it is set to."""
    return slot[1] == _SET


class SumBeside:
    """What is beside the factors of several files, as one.

    ``files``: each with its weight; ``common``: path → kohya name → the name it has in the sum;
    ``factors``: names of layers that have factors there. Reads what it has to compare. Raises
    LoRAFileError for what cannot be added.
    """

    def __init__(
        self,
        files: Sequence[tuple[Reader, float]],
        common: Mapping[str, Mapping[str, str]],
        factors: Mapping[str, Sequence[Path]],
    ):
        self._terms: dict[str, tuple[Term, ...]] = {}
        self.ignored: list[str] = []
        self._whole: list[Loose] = []
        self._scaled = any(weight != 1 for _, weight in files)
        holders: dict[Slot, list[Term]] = {}
        for file, weight in files:
            names = common[str(file.path)]
            for (name, slot), key in slots_of(file.header.parsed).items():
                place = names[kohya_name(name)], slot
                holders.setdefault(place, []).append(Term(file, key, weight))
        self._set = sum(slot == _SET for _, slot in holders)
        self._layers = len({name for name, slot in holders if slot != _SET})
        for (name, slot), terms in holders.items():
            if slot != _BIAS:
                _check_alone(name, slot, terms, factors.get(name, ()), holders)
            ours = terms[:1] if slot == _SET else terms
            _check_shapes(name, ours)
            self._terms[_key_of(name, slot, holders)] = tuple(ours)
        self._take_whole(files)

    @property
    def shapes(self) -> dict[str, TensorShape]:
        """Of the tensors of the sum; what is one file's alone, and counts once, stays as it is."""
        return {
            key: shape_of(terms[0].file.header, terms[0].key)
            if self._untouched(key)
            else ("F32", terms[0].file.header[terms[0].key].shape)
            for key, terms in self._terms.items()
        }

    def tensor(self, key: str) -> Tensor:
        terms = self._terms[key]
        if self._untouched(key):
            return terms[0].file.read(terms[0].key)
        parts = [term.file.read(term.key).double() * term.weight for term in terms]
        found = torch.stack(parts).sum(0).float()
        check_storable(key, found)
        return found

    def changes(self) -> bool:
        """Whether any of it changes a weight."""
        differences = [key for key in self._terms if key.endswith((*_NORMS, ".diff", ".diff_b"))]
        return self._set > 0 or any(bool(self.tensor(key).double().any()) for key in differences)

    def told(self) -> list[str]:
        """Sentences for a person."""
        layers = "1 layer" if self._layers == 1 else f"{self._layers} layers"
        said = [f"Added too: the differences of {layers}."] if self._layers else []
        whole = told_loose(self._whole)
        whole += [counted(self._set, "set weight")] if self._set else []
        if whole:
            words = "as they are, whatever the weights" if self._scaled else "as they are"
            said.append(f"Kept {words}: {', '.join(whole)}.")
        return said

    def _untouched(self, key: str) -> bool:
        """Whether a tensor goes into the sum as it is in one file."""
        term, *others = self._terms[key]
        linear = key.endswith((*_NORMS, ".diff", ".diff_b"))
        return not others and (term.weight == 1 or not linear)

    def _take_whole(self, files: Sequence[tuple[Reader, float]]) -> None:
        """What has no sum: of one file, or the same in all that have it."""
        found: dict[tuple[str, str], list[tuple[Reader, Loose]]] = {}
        for file, _ in files:
            for one in file.header.parsed.loose:
                # Of what nobody knows each tensor stands by itself.
                each = [Loose(one.kind, key, (key,)) for key in one.keys]
                for part in each if one.kind == "unknown" else [one]:
                    found.setdefault((part.kind, part.name), []).append((file, part))
        for (kind, _), holders in found.items():
            (file, first), *others = holders
            alike = partial(_alike, file, first.keys)
            other = next((o for o, one in others if not alike(o, one.keys)), None)
            if other is not None and kind != "unknown":
                raise _two_of_them(first, file, other)
            if other is not None:
                self.ignored += [key for _, one in holders for key in one.keys]
                continue
            self._whole.append(first)
            self._terms |= {key: (Term(file, key, 1.0),) for key in first.keys}


def _key_of(name: str, slot: str, holders: Mapping[Slot, Sequence[Term]]) -> str:
    """The key in a sum. As in the files where all call a layer's differences alike: a difference
    of a norm's bias counts only beside one of its weight."""
    place = [term.key for part in (_WEIGHT, _BIAS) for term in holders.get((name, part), ())]
    if slot == _SET:
        place = [term.key for term in holders[name, slot]]
    ends = {key: next(end for end in _SLOT_OF if key.endswith(end)) for key in place}
    called = {key.removesuffix(end) for key, end in ends.items()}
    norms = {end in _NORMS for end in ends.values()}
    if len(called) == 1 and len(norms) == 1:
        return holders[name, slot][0].key
    return name + _ENDINGS[slot]


def _check_alone(
    name: str,
    slot: str,
    terms: Sequence[Term],
    factors: Sequence[Path],
    holders: Mapping[Slot, Sequence[Term]],
) -> None:
    """Raises LoRAFileError where a weight has a difference and factors, or is set and changed."""
    first = terms[0]
    other = next(iter(factors), None)
    if other is None and slot == _SET:
        changed = holders.get((name, _WEIGHT), ())
        other = next((term.file.path for term in changed), None)
        if other is None:
            alike = partial(_alike, first.file, [first.key])
            others = (term.file for term in terms[1:] if not alike(term.file, [term.key]))
            other = next((file.path for file in others), None)
    if other is not None:
        what = "sets the whole weight" if slot == _SET else "has a difference of the whole weight"
        raise LoRAFileError(
            f"{first.file.path} {what} of {shown_key(name)}, which {other} changes in another way; "
            "load one beside the other instead."
        )


def _check_shapes(name: str, terms: Sequence[Term]) -> None:
    first, *others = terms
    shape = first.file.header[first.key].shape
    for term in others:
        if (theirs := term.file.header[term.key].shape) != shape:
            raise LoRAFileError(
                f"{term.file.path} was trained for another architecture than {first.file.path}: "
                f"the difference of {shown_key(name)} is {_sizes(theirs)} in one and "
                f"{_sizes(shape)} in the other."
            )


def _two_of_them(one: Loose, file: Reader, other: Reader) -> LoRAFileError:
    what = {"embedding": "embedding", "module": "module, saved as a whole"}[one.kind]
    name = f" {shown_key(one.name)}" if one.name else ""
    return LoRAFileError(
        f"{file.path} and {other.path} hold the same {what}{name}, each another one, of which "
        "there is no sum; merge them without one of the two, or load one beside the other."
    )


def _alike(file: Reader, keys: Sequence[str], other: Reader, its: Sequence[str]) -> bool:
    """Whether two files hold the same under these keys, number by number."""
    return len(keys) == len(its) and all(
        shape_of(file.header, a) == shape_of(other.header, b)
        and _bits(file.read(a)).equal(_bits(other.read(b)))
        for a, b in zip(sorted(keys), sorted(its), strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _sizes(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a single number"
