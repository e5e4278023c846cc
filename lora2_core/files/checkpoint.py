"""Checkpoints: a tree of tensors and plain values in one safetensors file, exactly.

The file is an ordinary safetensors file with one tensor more than the tree holds: the last four
bytes are a CRC-32 of everything before them. Nothing is pickled. Tensors are written one by one,
so that writing takes no memory beside theirs.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import replacing
from .encode import DTYPE_NAMES, bytes_of, shapes_of
from .header import (
    LoRAFileError,
    encode_header,
    first_line,
    in_file_order,
    read_header,
    tensor_entries,
)
from .raw.tensors import TensorFile

_VERSION = "1"  # of checkpoints; LoRA files have their own
_PREFIX = "lora2.checkpoint."
_SUM = "crc32"  # name of the tensor that holds the checksum
_CHUNK = 1 << 22  # bytes read at once
_LARGEST_HEADER = 1 << 30  # bytes; it holds every number of a run that is no tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be read; one line names the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A run as of its last finished step."""

    run: str  # hash of everything that decides the run
    step: int  # finished steps
    target: str  # where the run's LoRA goes
    state: dict[str, Any]  # dicts with text for keys, and lists, of tensors and JSON values
    made_of: Mapping[str, Any] = field(default_factory=dict)  # what decides the run, for people


@dataclass(frozen=True)
class Label:
    """What a checkpoint says of its run, without its state."""

    run: str
    step: int
    target: str
    made_of: Mapping[str, Any]  # empty where an earlier version has written it

    @property
    def name(self) -> str:
        """Of the run's LoRA, without folders and ending."""
        return Path(self.target).stem


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Put ``checkpoint`` at ``path``, whole or not at all.

    Raises OSError for a full or closed disk, and TypeError for a state that JSON or safetensors
    would not give back as it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = _described(checkpoint.state, "", tensors)
    shapes = in_file_order(shapes_of(tensors))
    metadata = {
        _PREFIX + "version": _VERSION,
        _PREFIX + "run": checkpoint.run,
        _PREFIX + "step": str(checkpoint.step),
        _PREFIX + "target": checkpoint.target,
        _PREFIX + "tree": json.dumps(tree),
        _PREFIX + "made_of": json.dumps(checkpoint.made_of),
    }
    head = encode_header(tensor_entries({**shapes, _SUM: ("U8", (4,))}), metadata)
    with replacing(path) as file:
        file.write(head)
        crc = zlib.crc32(head)
        for name in shapes:
            data = bytes_of(tensors[name])
            file.write(data)
            crc = zlib.crc32(data, crc)
        file.write(struct.pack("<I", crc))


def read(path: Path, run: str) -> Checkpoint:
    """The checkpoint of ``run`` at ``path``, bit for bit what was written.

    Its tensors are on the CPU. Raises CheckpointError for a file that is damaged, of another run or
    version, or no checkpoint.
    """
    try:
        header = read_header(path, _LARGEST_HEADER)
        metadata = header.metadata
        _check(path, metadata, run)
        with TensorFile(header) as file:
            if not _is_whole(path):
                raise CheckpointError(f"{path} is damaged: its checksum does not fit its content.")
            tree = json.loads(metadata[_PREFIX + "tree"])
            state = _restored(tree, file.tensor)
            file.check_unchanged()
        label = _label(metadata)
        return Checkpoint(run, label.step, label.target, state, label.made_of)
    except CheckpointError:
        raise
    except LoRAFileError as error:
        reason = str(error).removeprefix(f"{path} ").rstrip(".")
        raise CheckpointError(f"{path} is damaged or no checkpoint: it {reason}.") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{path} is damaged or no checkpoint: {reason}.") from error


def read_label(path: Path) -> Label:
    """What the checkpoint at ``path`` says of its run; nothing but its header is read.

    Raises CheckpointError for what is damaged there, of another version, or no checkpoint.
    """
    try:
        metadata = read_header(path, _LARGEST_HEADER).metadata
        _check(path, metadata)
        return _label(metadata)
    except (LoRAFileError, OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error


def _label(metadata: Mapping[str, str]) -> Label:
    made_of = json.loads(metadata.get(_PREFIX + "made_of", "{}"))
    if not isinstance(made_of, dict) or not isinstance(made_of.get("settings", {}), dict):
        raise ValueError("what it says of its run is no table")
    step = _step(metadata[_PREFIX + "step"])
    return Label(metadata[_PREFIX + "run"], step, metadata[_PREFIX + "target"], made_of)


def _step(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"its step is {text[:20]!r}")
    return int(text)


def _check(path: Path, metadata: Mapping[str, str], run: str | None = None) -> None:
    version = metadata.get(_PREFIX + "version")
    if version is None:
        raise CheckpointError(f"{path} is no checkpoint of LoRA².")
    if version != _VERSION:
        raise CheckpointError(
            f"{path} has format {version[:20]}, of another version of LoRA²; this one reads "
            f"{_VERSION}."
        )
    if run is not None and metadata.get(_PREFIX + "run") != run:
        raise CheckpointError(f"{path} belongs to a run with other settings or photos.")


def _is_whole(path: Path) -> bool:
    left = path.stat().st_size - 4
    crc = 0
    with path.open("rb") as file:
        while left > 0:
            data = file.read(min(_CHUNK, left))
            if not data:
                return False
            crc = zlib.crc32(data, crc)
            left -= len(data)
        return file.read() == struct.pack("<I", crc)


def _described(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` for JSON: a tensor becomes {"": its name}, and is collected in ``tensors``."""
    if torch.is_tensor(value):
        if value.dtype not in DTYPE_NAMES:
            raise TypeError(f"{path} is a tensor of {value.dtype}, which has no place in a file.")
        name = path or "."
        tensors[name] = value.detach()
        return {"": name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or not key or "/" in key:
                raise TypeError(f"{path} has the key {key!r}; use text without a slash.")
        return {key: _described(part, f"{path}/{key}", tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_described(part, f"{path}/{n}", tensors) for n, part in enumerate(value)]
    # Exact types: a subclass, such as NumPy's float, would come back as something else.
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{path} is {type(value).__name__}; use tensors, plain values, lists, dicts.")


def _restored(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {""}:
            return tensor(value[""])
        return {key: _restored(part, tensor) for key, part in value.items()}
    if isinstance(value, list):
        return [_restored(part, tensor) for part in value]
    return value
