"""Tensors that are dear to make, kept on disk under the hash of what they were made from.

A convenience: a file that is missing, damaged or foreign is made anew, and a disk that cannot be
written to costs nothing but time.
"""

from __future__ import annotations

import hashlib
import logging
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files.atomic import replacing
from ..files.encode import bytes_of, shapes_of
from ..files.header import (
    LoRAFileError,
    encode_header,
    in_file_order,
    read_header,
    tensor_bytes,
    tensor_entries,
)
from ..files.raw.tensors import TensorFile

_KEY, _CONTENT = "lora2.cache.key", "lora2.cache.content"  # in the header of a file


class TensorCache:
    """Named tensors by key, one safetensors file each in ``folder``; None keeps nothing.

    ``hits`` and ``misses`` count what was read and what had to be made.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.hits = self.misses = 0

    def get_or_make(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives, or gave when ``key`` was asked for before; bit for bit the same.

        ``key``: letters, digits, ``-`` and ``_``, as :func:`content_key` makes them. The tensors
        are on the CPU, contiguous, and fit for a backward pass even when made in inference mode.
        Raises ValueError for another kind of key, and whatever ``make`` raises.
        """
        if not re.fullmatch(r"[0-9A-Za-z_-]+", key):
            raise ValueError(f"key is {key!r}; use letters, digits, - and _: content_key(…).")
        path = None if self.folder is None else self.folder / f"{key}.safetensors"
        kept = None if path is None else _read(path, key)
        if kept is not None:
            self.hits += 1
            return kept
        self.misses += 1
        made = make()
        with torch.inference_mode(False):
            # A clone, since tensors of inference mode stay such, and views hold what they are of.
            tensors = {n: t.detach().cpu().clone().contiguous() for n, t in made.items()}
            if path is not None:
                self._write(path, key, tensors)
        return tensors

    def _write(self, path: Path, key: str, tensors: dict[str, Tensor]) -> None:
        shapes = in_file_order(shapes_of(tensors))
        header = encode_header(tensor_entries(shapes), {_KEY: key, _CONTENT: _digest(tensors)})
        try:
            with replacing(path) as file:
                file.write(header)
                for name in shapes:
                    file.write(bytes_of(tensors[name]))
        except OSError as error:
            size = len(header) + sum(map(tensor_bytes, shapes.values()))
            logging.warning(
                "LoRA²: the cache is switched off for this run: %s could not be written (%s); it "
                "needs %.1f MB. Free some space or choose another output folder.",
                path,
                error.strerror or error,
                size / 1e6,
            )
            self.folder = None


def content_key(*parts: str | bytes | Tensor | int | float) -> str:
    """SHA-256 of ``parts`` as 64 hexadecimal digits; equal only for equal parts in equal order.

    Kinds are told apart (1 is not 1.0 is not "1"), and a tensor counts with its type, shape and
    bytes. Raises TypeError for any other kind of part.
    """
    digest = hashlib.sha256()
    for part in parts:
        kind, data = _encoded(part)
        # The length in front: ("ab", "c") must not read like ("a", "bc").
        digest.update(f"{kind} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def digest_of_each(parts: Iterable[str]) -> str:
    """Two digests of texts, "in this order/in any order and number"."""
    every = list(parts)
    return f"{content_key(*every)[:32]}/{content_key(*sorted(set(every)))[:32]}"


def weights_hash(module: nn.Module) -> str:
    """:func:`named_weights_hash` of a module's state dict."""
    return named_weights_hash(module.state_dict().items())


def named_weights_hash(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and a sample of every weight.

    A thousand values a tensor, so that SDXL takes well under a second. Not a file's hash, which a
    MODEL no longer knows, and another one for the same model in another precision.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        # A single number by itself: after ComfyUI has put patches on such a one and taken them off
        # again (0.33), PyTorch makes no view of it.
        flat = weight.detach().flatten() if weight.dim() else weight.detach().clone()[None]
        digest.update(flat[:: max(1, flat.numel() // 1000)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _encoded(part: object) -> tuple[str, bytes | memoryview]:
    if isinstance(part, Tensor):
        return f"tensor {part.dtype} {tuple(part.shape)}", bytes_of(part)
    if isinstance(part, str):
        return "str", part.encode("utf-8", "surrogatepass")
    if isinstance(part, bytes):
        return "bytes", part
    if isinstance(part, int):  # bool too: True is kept apart by its text
        return "int", str(part).encode()
    if isinstance(part, float):
        return "float", struct.pack("<d", part)
    raise TypeError(
        f"a key cannot be made from {type(part).__name__}; give text, bytes or numbers."
    )


def _digest(tensors: dict[str, Tensor]) -> str:
    return content_key(*(part for name in sorted(tensors) for part in (name, tensors[name])))


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors in ``path``; None, with a warning unless it is missing, if they are not ours."""
    if not path.is_file():
        return None
    try:
        header = read_header(path)
        with torch.inference_mode(False), TensorFile(header) as file:
            tensors = file.all()
    except LoRAFileError as error:
        reason = str(error)
    else:
        said = header.metadata
        if said.get(_KEY) == key and said.get(_CONTENT) == _digest(tensors):
            return tensors
        reason = "it holds something else."
    logging.warning("LoRA²: %s in the cache is made anew: %s", path, reason)
    return None
