"""LoRA files: write, read, cut, and look inside without loading.

One safetensors file that every stock loader reads: kohya keys, Λ folded into the two matrices,
``alpha`` equal to the rank so that the loader's scale is 1, each component at its own rank, and
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
import safetensors.torch
from torch import Tensor

from . import lora_format, size_budget
from .atomic_file import replacing
from .component import Component
from .lora_format import ALPHA as _ALPHA
from .lora_format import DOWN as _DOWN
from .lora_format import FORMAT_VERSION, PREFIXES, LoRAFileError, encode, fold, kohya_key, to_state
from .lora_format import UP as _UP

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
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class ComponentInfo:
    """What a file's header says about one component."""

    key: str  # kohya key without suffix, "lora_unet_input_blocks_4_1_…_attn1_to_q"
    rank: int  # columns stored; 0 when the component was left out
    in_features: int
    out_features: int
    nu: float | None  # None in files that LoRA² did not train
    nbytes: int  # of both tensors


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
        full = lora_format.complete(metadata, components, [c.rank for c in components])
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
    ours = "lora2.format_version" in metadata
    parts = [
        f"LoRA² {metadata['lora2.mode']} mode" if ours and "lora2.mode" in metadata else "",
        f"{metadata['ss_steps']} steps" if metadata.get("ss_steps") else "",
        f'"{metadata["modelspec.trigger_phrase"]}"'
        if metadata.get("modelspec.trigger_phrase")
        else "",
    ]
    return " · ".join(part for part in parts if part)


def load(path: Path) -> LoRAFile:
    """Tensors and metadata of a LoRA file. Raises LoRAFileError for anything unreadable."""
    _, metadata = _read_header(path)
    try:
        return LoRAFile(safetensors.torch.load_file(path), metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error


def inspect(path: Path) -> tuple[list[ComponentInfo], dict[str, str]]:
    """Components and metadata from the header alone; no tensor is read.

    Components that training left out as zero are listed with rank 0. Raises LoRAFileError when
    the file is missing, cut short, no safetensors file or no LoRA in kohya form.
    """
    entries, metadata = _read_header(path)
    trained = _trained_components(metadata)
    infos = [_info(path, entries, key, trained.get(key)) for key in component_keys(entries)]
    if not infos:
        raise LoRAFileError(
            f"{path} holds no LoRA in kohya form (no key ends in {_DOWN}); "
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
    return infos, metadata


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 4)


def _read_header(path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Shapes and types of all tensors, and the metadata; the library checks the header."""
    if not path.is_file():
        raise LoRAFileError(f"{path} does not exist; choose a file from the loras folder.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            entries = {
                key: _Entry(tuple(part.get_shape()), part.get_dtype())
                for key, part in slices.items()
            }
            return entries, dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> LoRAFileError:
    try:
        with path.open("rb") as file:
            starts_right = file.read(9)[8:] == b"{"
    except OSError as refused:
        return LoRAFileError(f"{path} cannot be read: {refused.strerror}. Check its permissions.")
    reason = str(error).splitlines()[0]
    if starts_right and ("not fully covered" in reason or "invalid header length" in reason):
        return LoRAFileError(
            f"{path} is cut short: its safetensors header announces another size than its "
            f"{path.stat().st_size} bytes. Download or copy it again."
        )
    return LoRAFileError(
        f"{path} is not a safetensors file ({reason}); only .safetensors LoRAs are read (pickled "
        ".pt and .ckpt files can run code)."
    )


def _trained_components(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our own list of components; empty when somebody else wrote into our metadata, since the
    tensors still tell the ranks."""
    try:
        listed = json.loads(metadata.get("lora2.components", "{}"))
        return {
            str(key): {"nu": float(e["nu"]), "in": int(e["in"]), "out": int(e["out"])}
            for key, e in listed.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _info(
    path: Path, entries: Mapping[str, _Entry], key: str, trained: Mapping[str, Any] | None
) -> ComponentInfo:
    down, up = entries[key + _DOWN], entries.get(key + _UP)
    if up is None or not down.shape or not up.shape:
        raise LoRAFileError(f"{path} is damaged: {key} has a lora_down without its lora_up.")
    return ComponentInfo(
        key=key,
        rank=down.shape[0],
        in_features=math.prod(down.shape[1:]),
        out_features=up.shape[0],
        nu=trained["nu"] if trained else None,
        nbytes=down.nbytes + up.nbytes,
    )
