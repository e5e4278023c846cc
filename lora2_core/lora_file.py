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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from . import lora_format, lora_header, lora_keys, size_budget
from .atomic_file import replacing
from .component import Component
from .lora_format import ALPHA as _ALPHA
from .lora_format import DOWN as _DOWN
from .lora_format import FORMAT_VERSION, PREFIXES, LoRAFileError, encode, fold, kohya_key, to_state
from .lora_format import UP as _UP
from .lora_header import Header, TensorEntry
from .lora_keys import Pair

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
]

_MID = ".lora_mid.weight"  # a third factor that some convolution LoRAs of others have


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
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise LoRAFileError(
            f"{path} could not be written ({error.strerror or error}); it needs "
            f"{len(data) / 1e6:.1f} MB. Free some space or choose another output folder."
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

    Raises LoRAFileError for anything unreadable.
    """
    header = lora_header.read_header(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in header.entries}
    except (OSError, safetensors.SafetensorError) as error:  # it has changed since
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
    if parts.lonely:
        raise LoRAFileError(
            f"{header.path} is damaged: {lora_header.shown(parts.lonely[0])} lacks its other half."
        )
    infos = [_info(header, pair, trained.get(pair.name)) for pair in parts.pairs]
    infos += [
        _other(header, kind, name, keys)
        for kind, components in parts.others.items()
        for name, keys in components.items()
    ]
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


def _trained_components(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our own list of components; empty when somebody else wrote into our metadata, since the
    tensors still tell the ranks. That of a newer format is not ours to understand."""
    if metadata.get("lora2.format_version", FORMAT_VERSION) != FORMAT_VERSION:
        return {}
    try:
        listed = json.loads(metadata.get("lora2.components", "{}"))
        return {
            str(key): {"nu": _number(e["nu"]), "in": int(e["in"]), "out": int(e["out"])}
            for key, e in listed.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return {}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _info(header: Header, pair: Pair, trained: Mapping[str, Any] | None) -> ComponentInfo:
    down, up = header[pair.down], header[pair.up]
    if min(len(down.shape), len(up.shape)) < 2 or down.shape[0] != up.shape[1]:
        raise LoRAFileError(
            f"{header.path} is damaged: the two halves of {lora_header.shown(pair.name)} do not "
            f"fit together ({_shape(down)} and {_shape(up)})."
        )
    kind = "dora" if pair.dora_scale else "conv" if math.prod(down.shape[2:]) > 1 else "lora"
    area = math.prod(header[pair.mid].shape[2:]) if pair.mid else 1
    return ComponentInfo(
        key=pair.name,
        rank=down.shape[0],
        in_features=math.prod(down.shape[1:]) * area,
        out_features=up.shape[0],
        nu=trained["nu"] if trained else None,
        nbytes=down.nbytes + up.nbytes + (header[pair.mid].nbytes if pair.mid else 0),
        kind="conv" if kind == "lora" and area > 1 else kind,
    )


def _other(header: Header, kind: str, name: str, keys: Sequence[str]) -> ComponentInfo:
    """A component of another kind than two factors; 0 for what its tensors do not tell."""
    shapes: dict[str, tuple[int, ...]] = {key.removeprefix(name): header[key].shape for key in keys}

    def size(key: str, dimension: int) -> int:
        shape = shapes.get(key)
        return shape[dimension] if shape and len(shape) > dimension else 0

    rank = {
        "loha": size(".hada_w1_b", 0),
        "lokr": size(".lokr_w2_b", 0) or size(".lokr_w1_b", 0),
        "glora": size(".b1.weight", 0),
    }.get(kind, 0)
    in_features, out_features = size(".hada_w1_b", 1), size(".hada_w1_a", 0)
    if kind == "difference" and len(shapes.get(".diff", ())) >= 2:
        out_features, in_features = size(".diff", 0), math.prod(shapes[".diff"][1:])
    nbytes = sum(header[key].nbytes for key in keys)
    return ComponentInfo(name, rank, in_features, out_features, None, nbytes, kind)


def _shape(entry: TensorEntry) -> str:
    return "×".join(map(str, entry.shape)) or "a single number"
