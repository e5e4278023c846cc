"""LoRA files of any trainer: read strictly, or looked into without reading a tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .header import Header, LoRAFileError, read_header, shown_key
from .keys import ALPHA, DOWN, FACTORS, Loose, Pair, ParsedKeys, parse_keys
from .metadata import COMPONENTS, told_alphas, understood_metadata
from .model_family import other_than_a_lora
from .raw.tensors import TensorFile
from .shapes import Empty, Mismatch, precise_kind, product_of_kind, product_of_pair

_LARGEST_WIDTH = 1 << 31  # of a layer that the metadata may list
_MOST_LISTED = 20_000  # components; SDXL with its text encoders has 1,000 that can be trained
_FRACTIONS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
# Of a factor; those that are trained stay below a thousand. Products and their squares are finite.
LARGEST_WEIGHT = 1e15


@dataclass(frozen=True)
class ComponentInfo:
    """What a file's header says about one component."""

    key: str  # as in the file, without suffix: "lora_unet_input_blocks_4_1_…_attn1_to_q"
    rank: int  # columns stored; 0 when the component was left out
    in_features: int
    out_features: int
    nu: float | None  # None in files that LoRA² did not train
    nbytes: int  # of all that was trained
    # Or "conv", "dora", "adalora", "loha", "lokr", "glora", "oft", "boft", "ia3", "difference",
    # "set weight", "norm".
    kind: str = "lora"
    numbers: int | None = None  # that were trained; None: those of two factors

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        own = self.rank * (self.in_features + self.out_features)
        return own if self.numbers is None else self.numbers

    @property
    def ranked(self) -> bool:
        """Whether it has a rank; one of 0 is that of a component that was left out."""
        return self.rank > 0 or self.kind in FACTORS


@dataclass(frozen=True)
class Beside:
    """Whole tensors that a file holds beside its components, as a header tells them."""

    kind: str  # as in :class:`.keys.Loose`
    name: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class LoRAFile:
    """A file in memory: tensors by key as stored, and the metadata. Neither must be changed."""

    state: dict[str, Tensor]
    metadata: dict[str, str]
    known: ParsedKeys | None = None  # what its keys are, if that has been told before
    name: str = ""  # of the file that it was read from, and the bytes that that takes
    nbytes: int = 0

    @cached_property
    def parsed(self) -> ParsedKeys:
        """What the keys are; they are parsed once at most."""
        return parse_keys(self.state) if self.known is None else self.known

    def with_state(self, state: dict[str, Tensor]) -> LoRAFile:
        """The same file with other tensors; only other keys have to be parsed again."""
        same = state.keys() == self.state.keys()
        return replace(self, state=state, known=self.parsed if same else None)


def inspect(path: str | os.PathLike[str]) -> tuple[list[ComponentInfo], dict[str, str]]:
    """Components and metadata from the header alone; no tensor is read.

    Of LoRAs of any trainer and kind. Components that training left out as zero are listed with
    rank 0. Raises LoRAFileError when the file is missing, cut short, no safetensors file or holds
    no LoRA.
    """
    return inspect_header(read_header(path))


def inspect_header(header: Header) -> tuple[list[ComponentInfo], dict[str, str]]:
    """:func:`inspect` of a header that was read already."""
    trained = _trained_components(header.metadata)
    infos = _components(header, trained)
    if not infos:
        if other := other_than_a_lora(header.entries):
            raise LoRAFileError(f"{header.path} is no LoRA but {other}.")
        raise LoRAFileError(
            f"{header.path} holds no LoRA (no key ends in {DOWN} or any other LoRA's ending); "
            "choose a LoRA file."
        )
    present = {info.key for info in infos}
    infos += [
        ComponentInfo(key, 0, entry["in"], entry["out"], entry["nu"], 0)
        for key, entry in trained.items()
        if key not in present
    ]
    order = {key: position for position, key in enumerate(trained)}
    infos.sort(key=lambda info: order.get(info.key, len(order)))
    return infos, header.metadata


def beside_components(header: Header) -> tuple[Beside, ...]:
    """What no component has a place for; whatever nobody can tell the meaning of comes last."""
    found = [one for one in header.parsed.loose if one.kind != "unknown"]
    left = [key for one in header.parsed.loose if one.kind == "unknown" for key in one.keys]
    left += header.parsed.strays
    found += [Loose("unknown", key, (key,)) for key in left]
    return tuple(
        Beside(one.kind, one.name, len(one.keys), sum(header[key].nbytes for key in one.keys))
        for one in found
    )


def load(path: str | os.PathLike[str]) -> LoRAFile:
    """Tensors and metadata of a LoRA file, in memory: whatever becomes of the file, they stay.

    An alpha that diffusers told in the metadata alone is among the tensors, as any loader reads it.
    Raises LoRAFileError for anything unreadable, for parts that do not fit together, for a file
    that is changed while it is read, and for what no loader can read: an AdaLoRA, an IA³.
    """
    header = read_header(path)
    _components(header, {})
    check_readable(header)
    told = alphas_of(header)
    with TensorFile(header) as file:
        state = file.all()
    about = {"name": header.path.name, "nbytes": header.file_bytes}
    if not told:
        return LoRAFile(state, header.metadata, header.parsed, **about)
    state |= {name + ALPHA: torch.tensor(alpha) for name, alpha in told.items()}
    return LoRAFile(state, header.metadata, **about)


def check_readable(header: Header) -> None:
    """Raises LoRAFileError for an IA³, which has nothing to add, and for an AdaLoRA, whose file
    does not hold all that its update takes."""
    if not header.parsed.pairs and header.parsed.others.keys() == {"ia3"}:
        raise LoRAFileError(f"{header.path} is no LoRA but {other_than_a_lora(header.entries)}.")
    found = next((pair for pair in header.parsed.pairs if pair.diagonal), None)
    if found is not None:
        raise LoRAFileError(
            f"{header.path} is an AdaLoRA ({shown_key(found.diagonal or '')}), whose strength "
            "stands in its adapter_config.json alone; turn it into a plain LoRA with PEFT, or "
            "choose another."
        )


def alphas_of(header: Header) -> dict[str, float]:
    """The alpha of components that have it in the metadata alone, by their names.

    Raises LoRAFileError where the metadata tells it in a way that this pack cannot read.
    """
    ranks = {p.name: header[p.down].shape[0] for p in header.parsed.pairs if p.alpha is None}
    try:
        return told_alphas(header.metadata, ranks)
    except ValueError as error:
        raise LoRAFileError(
            f"{header.path} has a lora_adapter_metadata that cannot be read ({error}); choose "
            "another LoRA, or save it with its alphas as tensors, as kohya's are."
        ) from None


def learnt_nus(metadata: Mapping[str, str]) -> dict[str, float | None]:
    """The ν of components by their keys, as our own files tell them."""
    return {key: entry["nu"] for key, entry in _trained_components(metadata).items()}


def component_keys(keys: Mapping[str, Any]) -> list[str]:
    """Keys of the components in a state or header, without suffix."""
    return [key.removesuffix(DOWN) for key in keys if key.endswith(DOWN)]


def unused_alphas(parsed: ParsedKeys, shapes: Mapping[str, Sequence[int]]) -> set[str]:
    """Keys of alphas that scale nothing, and may be any number: LyCORIS writes an infinite one
    beside a LoKr of two whole matrices.

    ``shapes``: of the tensors, by key.
    """
    found = {key for key in parsed.unknown if key.endswith(ALPHA)}
    found |= {p.alpha for p in parsed.pairs if p.alpha and not shapes[p.down][0]}
    for kind in ("difference", "norm", "ia3"):
        found |= {name + ALPHA for name in parsed.others.get(kind, {})}
    whole = set[str]()
    for name, keys in parsed.others.get("lokr", {}).items():
        if {name + ".lokr_w1", name + ".lokr_w2"} <= {*keys}:
            whole.add(name + ALPHA)
    scaling = ("loha", "lokr", "glora", "oft")  # whose alpha may stand with a bias' difference
    used = {name + ALPHA for kind in scaling for name in parsed.others.get(kind, {})} - whole
    used |= {p.alpha for p in parsed.pairs if p.alpha and shapes[p.down][0]}
    return (found | whole) - used


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raises LoRAFileError, naming the tensor, if a weight is infinite, not a number, or so large
    that nothing can be calculated with it."""
    for key, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        wide = tensor.float() if tensor.itemsize == 1 else tensor  # fp8 knows no comparisons
        low, high = torch.aminmax(wide)  # copies nothing; both are NaN where one weight is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise LoRAFileError(
                f"{source} is damaged: {shown_key(key)} holds weights that are not finite. "
                "Copy or download it again, or train again with a lower learning_rate."
            )
        if max(-low, high) > LARGEST_WEIGHT:
            raise LoRAFileError(
                f"{source} is damaged: {shown_key(key)} holds weights up to "
                f"{float(max(-low, high)):.0e}, which ruin every model. Copy or download it again, "
                "or train again with a lower learning_rate."
            )


def check_storable(key: str, tensor: Tensor) -> None:
    """Raises LoRAFileError for what would be written and could not be read again."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor.float())
        largest = max(-float(low), float(high))  # not a number where one is not
        if not largest <= LARGEST_WEIGHT:
            raise LoRAFileError(
                f"{shown_key(key)} would hold values that are too large to be stored, so nothing "
                f"was written ({LARGEST_WEIGHT:.0e} is the most); choose smaller weights, or "
                "another LoRA."
            )


def _components(header: Header, trained: Mapping[str, Any]) -> list[ComponentInfo]:
    """What is in the file. Raises LoRAFileError where tensors do not fit together."""
    parsed = header.parsed
    if parsed.lonely:
        raise LoRAFileError(
            f"{header.path} is damaged: {shown_key(parsed.lonely[0])} lacks its other half."
        )
    infos: list[ComponentInfo] = []
    name = ""
    try:
        for pair in parsed.pairs:
            name = pair.name
            infos.append(_info(header, pair, trained.get(name)))
        for kind, components in parsed.others.items():
            for name, keys in components.items():
                infos.append(_other(header, kind, name, keys))
    except Empty as empty:
        raise LoRAFileError(
            f"{header.path} is damaged: {shown_key(name)} has a tensor without numbers "
            f"({empty.shape}). Copy or download it again."
        ) from None
    except Mismatch as mismatch:
        raise LoRAFileError(
            f"{header.path} is damaged: the two halves of {shown_key(name)} do not "
            f"fit together ({mismatch})."
        ) from None
    return infos


def _trained_components(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our own list of components; empty when somebody else wrote into our metadata, since the
    tensors still tell the ranks. That of a newer format is not ours to understand."""
    try:
        listed = json.loads(understood_metadata(metadata).get(COMPONENTS, "{}"))
        if len(listed) > _MOST_LISTED:
            return {}
        return {
            str(key): {"nu": _number(e["nu"]), "in": _width(e["in"]), "out": _width(e["out"])}
            for key, e in listed.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return {}


def _number(value: Any) -> float | None:
    number = None if value is None else float(value)
    if number is None or math.isfinite(number):
        return number
    raise ValueError


def _width(value: Any) -> int:
    if 0 <= (number := int(value)) <= _LARGEST_WIDTH:
        return number
    raise ValueError


def _info(header: Header, pair: Pair, trained: Mapping[str, Any] | None) -> ComponentInfo:
    """Of two factors."""
    beside = {pair.alpha, pair.reshape, pair.nu}
    trained_keys = [key for key in pair.keys if key not in beside]
    _check_types(header, trained_keys)
    down, up = header[pair.down], header[pair.up]
    mid = header[pair.mid] if pair.mid else None
    if pair.alpha:
        _check_alpha(header, pair.alpha)
    product = product_of_pair(down.shape, up.shape, mid.shape if mid else None)
    count = sum(math.prod(header[key].shape) for key in trained_keys)
    area = math.prod((mid or down).shape[2:])
    return ComponentInfo(
        key=pair.name,
        rank=product.rank,
        in_features=product.in_features,
        out_features=product.out_features,
        nu=trained["nu"] if trained else None,
        nbytes=sum(header[key].nbytes for key in trained_keys),
        kind=_kind(pair, area),
        numbers=None if len(trained_keys) == 2 else count,
    )


def _kind(pair: Pair, area: int) -> str:
    if pair.diagonal:
        return "adalora"
    return "dora" if pair.dora_scale else "conv" if area > 1 else "lora"


def _other(header: Header, kind: str, name: str, keys: Sequence[str]) -> ComponentInfo:
    """A component of another kind than two factors; 0 for what its tensors do not tell."""
    _check_alpha(header, name + ALPHA)
    numbers = [key for key in keys if key not in (name + ALPHA, name + ".on_input")]
    _check_types(header, numbers)
    shapes = {key[len(name) :]: header[key].shape for key in numbers}
    product = product_of_kind(kind, shapes)
    return ComponentInfo(
        key=name,
        rank=product.rank,
        in_features=product.in_features,
        out_features=product.out_features,
        nu=None,
        nbytes=sum(header[key].nbytes for key in keys),
        kind=precise_kind(kind, shapes),
        numbers=sum(math.prod(header[key].shape) for key in numbers),
    )


def _check_types(header: Header, keys: Iterable[str]) -> None:
    """Nobody calculates with whole numbers."""
    for key in keys:
        if (dtype := header[key].dtype) not in _FRACTIONS:
            raise LoRAFileError(
                f"{header.path} is damaged: {shown_key(key)} is of type {dtype}, where a LoRA has "
                "fractions. Copy or download it again."
            )


def _check_alpha(header: Header, key: str) -> None:
    if key in header and (count := math.prod(header[key].shape)) != 1:
        raise LoRAFileError(
            f"{header.path} is damaged: {shown_key(key)} holds {count} numbers where one "
            "belongs. Copy or download it again."
        )
