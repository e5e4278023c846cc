"""LoRA files: write, read, cut, and look inside without loading.

One safetensors file that every stock loader reads: kohya keys, Λ folded into the two matrices,
``alpha`` equal to the rank so that the loader's scale is 1, each component at its own rank, and
columns in order of importance. What is ours stands in the metadata under ``lora2.``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .network import Component

FORMAT_VERSION = "1"
UNET_PREFIX = "lora_unet_"
_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_MID = ".lora_mid.weight"  # a third factor that some convolution LoRAs of others have
# A component whose fp16 ΔW would be off by more than this is kept in fp32.
_HALF_ERROR = 5e-4
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


class LoRAFileError(ValueError):
    """A file cannot be read or written; the message names the file, the cause and the fix."""


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


def kohya_key(name: str) -> str:
    """``input_blocks.4.1…attn1.to_q`` → ``lora_unet_input_blocks_4_1_…_attn1_to_q``."""
    return UNET_PREFIX + name.replace(".", "_")


def fold(component: Component) -> tuple[Tensor, Tensor]:
    """(down, up) with ΔW = up · down, the columns of both sides at equal norm.

    √Λ goes into each side (eq. 10); the norms are then balanced column by column, because an
    early B near 1e-6 beside an A near 1 would lose its digits in fp16.
    """
    root = component.importance.sqrt()  # (rank,)
    down = component.lora_down.flatten(1) * root[:, None]  # (rank, in)
    up = component.lora_up.flatten(1) * root  # (out, rank)
    down_norm, up_norm = down.norm(dim=1), up.norm(dim=0)
    usable = (down_norm > 0) & (up_norm > 0)
    balance = torch.where(usable, (up_norm / down_norm.clamp(min=1e-38)).sqrt(), 1.0)
    balance = balance.clamp(1e-18, 1e18)
    down, up = down * balance[:, None], up / balance
    return down.view_as(component.lora_down), up.view_as(component.lora_up)


def to_state(components: Sequence[Component]) -> dict[str, Tensor]:
    """The tensors of a file: fp16 (fp32 where fp16 would show), zero components left out.

    Raises LoRAFileError if a weight is not finite.
    """
    state: dict[str, Tensor] = {}
    for component in components:
        down, up = fold(component)
        exact = up.flatten(1) @ down.flatten(1)  # (out, in)
        if not exact.isfinite().all():
            raise LoRAFileError(
                f"{component.name} holds values that are not finite, so nothing was written; "
                "train again with a lower learning_rate."
            )
        if not exact.any():
            continue
        down, up = _narrowed(down, up, exact)
        key = kohya_key(component.name)
        state[key + _DOWN], state[key + _UP] = down.contiguous(), up.contiguous()
        state[key + _ALPHA] = torch.tensor(float(down.shape[0]))
    return state


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


def save(path: Path, components: Sequence[Component], metadata: Mapping[str, str]) -> Path:
    """Write a LoRA² file: to a temporary file beside ``path``, then renamed over it.

    The same components and metadata always give the same bytes. Raises LoRAFileError when there
    is nothing to write or the disk is full; an existing file then stays as it was.
    """
    state = to_state(components)
    if not state:
        raise LoRAFileError(
            f"{path.name} was not written: no component has learnt anything yet. Train for more "
            "steps or with a higher learning_rate."
        )
    entries = {
        kohya_key(c.name): {
            "nu": c.nu,
            "rank": int(c.importance.numel()),
            "in": math.prod(c.lora_down.shape[1:]),
            "out": c.lora_up.shape[0],
        }
        for c in components
    }
    full = {
        **metadata,
        "lora2.format_version": FORMAT_VERSION,
        "lora2.components": json.dumps(entries),  # in forward order
    }
    write_atomically(path, encode(state, full))
    return path


def encode(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, its metadata in sorted order and with its hashes.

    The library writes metadata in the random order of its hash map; the header is rewritten
    so that equal runs give equal files. ``sshs_model_hash`` is the SHA-256 of what follows the
    header. ``sshs_legacy_hash`` is, as kohya takes it, the first 8 digits of the SHA-256 of 64 KiB
    from byte 1,048,576 of the file with its ``ss_*`` metadata alone.
    """
    kohya = {name: text for name, text in metadata.items() if name.startswith("ss_")}
    raw = safetensors.torch.save(dict(state), kohya)
    header, data = _split(raw)
    tensors = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
    digest = hashlib.sha256(data).hexdigest()
    full = {
        **metadata,
        "sshs_model_hash": digest,
        "modelspec.hash_sha256": "0x" + digest,
        "sshs_legacy_hash": hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8],
    }
    text = json.dumps({"__metadata__": dict(sorted(full.items())), **tensors}).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    return struct.pack("<Q", len(text)) + text + data


def write_atomically(path: Path, data: bytes) -> None:
    """``data`` in ``path``, whole or not at all. Raises LoRAFileError on a full or closed disk."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from other users
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
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


def _narrowed(down: Tensor, up: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    half = down.half(), up.half()
    product = half[1].float().flatten(1) @ half[0].float().flatten(1)
    error = (product - exact).norm() / exact.norm()
    return half if error <= _HALF_ERROR else (down, up)


def _split(raw: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length], raw[8 + length :]


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
