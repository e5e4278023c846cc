"""LoRA files: write, read, cut, and look inside without loading.

One safetensors file that every stock loader reads: kohya keys, Λ folded into the two matrices,
each component at its own rank and the same ``alpha`` in all (see STORED_ALPHA), and
columns in order of importance. What is ours stands in the metadata under ``lora2.``.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from . import lora_format, lora_header, lora_keys, lora_shapes, size_budget
from .atomic_file import replacing
from .component import Component
from .lora_format import ALPHA as _ALPHA
from .lora_format import DOWN as _DOWN
from .lora_format import FORMAT_VERSION, PREFIXES, LoRAFileError, encode, fold, kohya_key, to_state
from .lora_format import UP as _UP
from .lora_header import Header
from .lora_keys import MAGNITUDES, Pair
from .lora_shapes import Mismatch

__all__ = [
    "FORMAT_VERSION",
    "PREFIXES",
    "ComponentInfo",
    "LoRAFile",
    "LoRAFileError",
    "check_writable",
    "component_keys",
    "encode",
    "fold",
    "headline",
    "inspect",
    "kohya_key",
    "load",
    "save",
    "to_state",
    "truncate",
    "write_atomically",
    "writing",
]

_MID = ".lora_mid.weight"  # a third factor that some convolution LoRAs of others have
_LARGEST_WIDTH = 1 << 31  # of a layer that the metadata may list


@dataclass(frozen=True)
class ComponentInfo:
    """What a file's header says about one component."""

    key: str  # as in the file, without suffix: "lora_unet_input_blocks_4_1_…_attn1_to_q"
    rank: int  # columns stored; 0 when the component was left out
    in_features: int
    out_features: int
    nu: float | None  # None in files that LoRA² did not train
    nbytes: int  # of its factors
    kind: str = "lora"  # or "conv", "dora", "loha", "lokr", "glora", "oft", "difference", "norm"


@dataclass(frozen=True)
class LoRAFile:
    """A file in memory: tensors by key as stored, and the metadata."""

    state: dict[str, Tensor]
    metadata: dict[str, str]


def truncate(state: Mapping[str, Tensor], max_rank: int) -> dict[str, Tensor]:
    """A valid smaller LoRA: every component cut to its first ``max_rank`` columns.

    Columns lie in order of importance, so the tail is what matters least. The loader's scale
    alpha/rank is kept.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; a LoRA has at least rank 1.")
    out: dict[str, Tensor] = dict(state)
    for key in component_keys(state):
        down, up = state[key + _DOWN], state[key + _UP]
        rank = min(max_rank, down.shape[0])
        out[key + _DOWN] = down[:rank].contiguous()
        out[key + _UP] = up[:, :rank].contiguous()
        if key + _MID in state:
            out[key + _MID] = state[key + _MID][:rank, :rank].contiguous()
        if key + _ALPHA in state:
            out[key + _ALPHA] = state[key + _ALPHA] * (rank / down.shape[0])
    return out


def component_keys(keys: Mapping[str, Any]) -> list[str]:
    """Keys of the components in a state or header, without suffix."""
    return [key[: -len(_DOWN)] for key in keys if key.endswith(_DOWN)]


def save(
    path: Path,
    components: Sequence[Component],
    metadata: Mapping[str, str],
    megabytes: float | None = None,
    min_rank: int = 1,
) -> Path:
    """Write a LoRA² file: to a temporary file beside ``path``, then renamed over it.

    ``megabytes``: 10⁶ bytes that the whole file, header included, may take; what is larger is cut
    to it by one SVD across all components (:func:`.size_budget.fit`), and ``min_rank`` is then
    left to each where possible. The same components and metadata always give the same bytes.
    Raises LoRAFileError when there is nothing to write or the disk is full; an existing file then
    stays as it was.
    """
    if megabytes is None:
        state = to_state(components)
        ranks = lora_format.stored_ranks(state, components)
        full = lora_format.complete(metadata, components, ranks)
    else:
        limit = int(megabytes * 1e6)
        state, full = size_budget.fit(components, metadata, limit, min_rank)
    if not state:
        raise LoRAFileError(
            f"{path.name} was not written: no component has learnt anything yet. Train for more "
            "steps or with a higher learning_rate."
        )
    write_atomically(path, encode(state, full))
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """``data`` in ``path``, whole or not at all. Raises LoRAFileError on a full or closed disk."""
    with writing(path, len(data)) as file:
        file.write(data)


@contextmanager
def writing(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """:func:`.replacing`, whose OSError becomes a LoRAFileError that tells what is needed."""
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise LoRAFileError(
            f"{path} could not be written ({error.strerror or error}); it needs "
            f"{nbytes / 1e6:.1f} MB. Free some space or choose another output folder."
        ) from error


def check_writable(path: Path, nbytes: int) -> None:
    """Before training: can ``nbytes`` be written to ``path``? Raises LoRAFileError if not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise LoRAFileError(
            f"{path.parent} cannot be written to ({error.strerror or error}); make it writable or "
            "choose another output folder."
        ) from error
    if free < nbytes:
        raise LoRAFileError(
            f"The disk of {path.parent} is full: the LoRA needs {nbytes / 1e6:.1f} MB and "
            f"{free / 1e6:.1f} MB are free. Free some space first."
        )


def headline(metadata: Mapping[str, str]) -> str:
    """One line about a file, from its metadata; empty when it says nothing."""
    ours = metadata.get("lora2.format_version") == FORMAT_VERSION
    parts = [
        f"LoRA² {metadata['lora2.mode']} mode" if ours and "lora2.mode" in metadata else "",
        f"{metadata['ss_steps']} steps" if metadata.get("ss_steps") else "",
        f'"{metadata["modelspec.trigger_phrase"]}"'
        if metadata.get("modelspec.trigger_phrase")
        else "",
    ]
    return " · ".join(part for part in parts if part)


def load(path: Path) -> LoRAFile:
    """Tensors and metadata of a LoRA file; the tensors are mapped, and read when they are used.

    Raises LoRAFileError for anything unreadable, and for parts that do not fit together.
    """
    header = lora_header.read_header(path)
    _components(header, lora_keys.split(header.entries), {})
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in header.entries}
    # It has changed since, or is of a type that this version of torch does not know.
    except (OSError, AttributeError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise LoRAFileError(f"{path} cannot be read ({reason}). Copy it again.") from error
    return LoRAFile(state, header.metadata)


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raises LoRAFileError, naming the tensor, if a weight is infinite or not a number."""
    for key, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        wide = tensor.float() if tensor.itemsize == 1 else tensor  # fp8 knows no comparisons
        low, high = torch.aminmax(wide)  # copies nothing; both are NaN where one weight is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise LoRAFileError(
                f"{source} is damaged: {lora_header.shown(key)} holds weights that are not finite. "
                "Copy or download it again, or train again with a lower learning_rate."
            )


def inspect(path: Path) -> tuple[list[ComponentInfo], dict[str, str]]:
    """Components and metadata from the header alone; no tensor is read.

    Of LoRAs of any trainer and kind. Components that training left out as zero are listed with
    rank 0. Raises LoRAFileError when the file is missing, cut short, no safetensors file or holds
    no LoRA.
    """
    return describe(lora_header.read_header(path))


def describe(header: Header) -> tuple[list[ComponentInfo], dict[str, str]]:
    """:func:`inspect` of a header that was read already."""
    parts = lora_keys.split(header.entries)
    trained = _trained_components(header.metadata)
    infos = _components(header, parts, trained)
    if not infos:
        raise LoRAFileError(
            f"{header.path} holds no LoRA (no key ends in {_DOWN} or any other LoRA's ending); "
            "choose a LoRA file, not a checkpoint."
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


def _components(
    header: Header, parts: lora_keys.Parts, trained: Mapping[str, Any]
) -> list[ComponentInfo]:
    """What is in the file. Raises LoRAFileError where tensors do not fit together."""
    if parts.lonely:
        raise LoRAFileError(
            f"{header.path} is damaged: {lora_header.shown(parts.lonely[0])} lacks its other half."
        )
    magnitudes = {
        key.removesuffix(end) for key in parts.unknown for end in MAGNITUDES if key.endswith(end)
    }
    infos: list[ComponentInfo] = []
    name = ""
    try:
        for pair in parts.pairs:
            name = pair.name
            infos.append(_info(header, pair, trained.get(name), name in magnitudes))
        for kind, components in parts.others.items():
            for name, keys in components.items():
                infos.append(_other(header, kind, name, keys))
    except Mismatch as mismatch:
        raise LoRAFileError(
            f"{header.path} is damaged: the two halves of {lora_header.shown(name)} do not "
            f"fit together ({mismatch})."
        ) from None
    return infos


def _trained_components(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our own list of components; empty when somebody else wrote into our metadata, since the
    tensors still tell the ranks. That of a newer format is not ours to understand."""
    if metadata.get("lora2.format_version", FORMAT_VERSION) != FORMAT_VERSION:
        return {}
    try:
        listed = json.loads(metadata.get("lora2.components", "{}"))
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


def _info(
    header: Header, pair: Pair, trained: Mapping[str, Any] | None, magnitudes: bool
) -> ComponentInfo:
    """Of two factors; ``magnitudes``: whether PEFT's belong to them."""
    down, up = header[pair.down], header[pair.up]
    mid = header[pair.mid] if pair.mid else None
    if pair.alpha:
        _check_alpha(header, pair.alpha)
    product = lora_shapes.of_pair(down.shape, up.shape, mid.shape if mid else None)
    area = math.prod((mid or down).shape[2:])
    return ComponentInfo(
        key=pair.name,
        rank=product.rank,
        in_features=product.in_features,
        out_features=product.out_features,
        nu=trained["nu"] if trained else None,
        nbytes=down.nbytes + up.nbytes + (mid.nbytes if mid else 0),
        kind="dora" if pair.dora_scale or magnitudes else "conv" if area > 1 else "lora",
    )


def _other(header: Header, kind: str, name: str, keys: Sequence[str]) -> ComponentInfo:
    """A component of another kind than two factors; 0 for what its tensors do not tell."""
    _check_alpha(header, name + lora_keys.ALPHA)
    product = lora_shapes.of_other(kind, {key[len(name) :]: header[key].shape for key in keys})
    nbytes = sum(header[key].nbytes for key in keys)
    return ComponentInfo(
        name, product.rank, product.in_features, product.out_features, None, nbytes, kind
    )


def _check_alpha(header: Header, key: str) -> None:
    if key in header and (count := math.prod(header[key].shape)) != 1:
        raise LoRAFileError(
            f"{header.path} is damaged: {lora_header.shown(key)} holds {count} numbers where one "
            "belongs. Copy or download it again."
        )
