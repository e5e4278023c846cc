"""A LoRA file written component by component: never more than one of them is in memory.

The bytes are those of :func:`..files.encode.encode`. The header comes first in a file and holds the
hash of what follows; so its place is left free, and it is written last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.encode import (
    KOHYA_WINDOW,
    STORED_ALPHA,
    bytes_of,
    encoded_bytes,
    hashed_header,
    library_header_bytes,
)
from ..files.header import TensorShape, in_file_order, tensor_bytes, tensor_entries
from ..files.keys import DOWN, UP
from ..files.write import writing
from .choice import Outline


@dataclass(frozen=True)
class Beside:
    """Tensors that are of no component: types and shapes by key, and how to come by each."""

    shapes: Mapping[str, TensorShape]
    tensor: Callable[[str], Tensor]


class Planned:
    """One component of the file to be: its outline, its rank above 0, and its type."""

    def __init__(self, outline: Outline, rank: int, half: bool, extra: Mapping[str, Tensor] = {}):
        self.outline, self.rank, self.half = outline, rank, half
        self.extra = dict(extra)  # the tensors of ``outline.beside``, by their ending

    @property
    def shapes(self) -> dict[str, TensorShape]:
        return self.outline.shapes(self.rank, self.half)


def write_stream(
    path: Path,
    planned: Sequence[Planned],
    metadata: Mapping[str, str],
    tensors_of: Callable[[Planned], tuple[Tensor, Tensor]],
    new: bool = False,
    check: Callable[[], None] = lambda: None,
    beside: Beside | None = None,
) -> int:
    """Write a LoRA file whole or not at all; its size in bytes.

    ``tensors_of``: (down, up) of one component, asked for once each, in the order of the file.
    ``new``: nothing is replaced. ``check`` is asked before the file gets its name; where it raises,
    there is none. ``beside``: what the file holds besides, each asked for
    once, too. Raises LoRAFileError for a full or closed disk, and NameTaken as
    :func:`..files.atomic.replacing` does.
    """
    every = {key: shape for one in planned for key, shape in one.shapes.items()}
    shapes = in_file_order(every | dict(beside.shapes if beside else {}))
    owners = {key: one for one in planned for key in one.shapes}
    size = encoded_bytes(shapes, metadata)
    length = size - sum(map(tensor_bytes, shapes.values()))
    whole, window = hashlib.sha256(), hashlib.sha256()
    with writing(path, size, new) as file:
        file.write(bytes(length))
        position = library_header_bytes(shapes, metadata)
        for data in _data(list(shapes), owners, tensors_of, beside):
            file.write(data)
            whole.update(data)
            start, end = (min(max(edge - position, 0), len(data)) for edge in KOHYA_WINDOW)
            window.update(data[start:end])
            position += len(data)
        header = hashed_header(
            tensor_entries(shapes), metadata, whole.hexdigest(), window.hexdigest()[:8]
        )
        if len(header) != length:
            raise RuntimeError(f"{path.name}: the header has {len(header)} bytes, not {length}")
        check()
        file.seek(0)
        file.write(header)
    return size


def _data(
    order: Sequence[str],
    owners: Mapping[str, Planned],
    tensors_of: Callable[[Planned], tuple[Tensor, Tensor]],
    beside: Beside | None,
) -> Iterator[memoryview]:
    """The bytes of every tensor in turn; both factors of a component lie side by side."""
    held: tuple[str, Tensor] | None = None
    for key in order:
        if beside is not None and key in beside.shapes:
            yield bytes_of(beside.tensor(key))
            continue
        one = owners[key]
        end = key[len(one.outline.key) :]
        if end == DOWN:
            down, up = tensors_of(one)
            held = key, up
            yield bytes_of(down)
        elif end == UP:
            if held is None or held[0] != one.outline.key + DOWN:
                raise RuntimeError(f"{key} does not follow its other half")
            yield bytes_of(held[1])
            held = None
        elif end in one.extra:
            yield bytes_of(one.extra[end])
        else:
            yield bytes_of(torch.tensor(STORED_ALPHA))
