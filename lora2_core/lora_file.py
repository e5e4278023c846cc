"""LoRA files: write, read, cut, and look inside without loading.

One safetensors file that every stock loader reads: kohya keys, Λ folded into the two matrices,
each component at its own rank and the same ``alpha`` in all (STORED_ALPHA in
:mod:`.files.encode`), and columns in order of importance. What is ours stands in the metadata
under ``lora2.``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .files.component import Component
from .files.encode import PREFIXES, encode, fold, kohya_key, stored_ranks, to_state
from .files.header import LoRAFileError, parse_header
from .files.keys import ALPHA, DOWN, MID, UP
from .files.metadata import FORMAT_VERSION, complete_metadata, headline
from .files.read import (
    ComponentInfo,
    LoRAFile,
    check_finite,
    component_keys,
    inspect,
    load,
)
from .files.read import inspect_header as describe
from .files.write import check_writable, write_atomically, writing
from .resizing.fit import fit_to_megabytes

__all__ = [
    "FORMAT_VERSION",
    "PREFIXES",
    "ComponentInfo",
    "LoRAFile",
    "LoRAFileError",
    "check_finite",
    "check_writable",
    "component_keys",
    "describe",
    "encode",
    "fold",
    "headline",
    "inspect",
    "kohya_key",
    "load",
    "save",
    "to_state",
    "truncate",
    "write",
    "write_atomically",
    "writing",
]


def truncate(state: Mapping[str, Tensor], max_rank: int) -> dict[str, Tensor]:
    """A valid smaller LoRA: every component cut to its first ``max_rank`` columns.

    Columns lie in order of importance, so the tail is what matters least. The loader's scale
    alpha/rank is kept.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; a LoRA has at least rank 1.")
    out: dict[str, Tensor] = dict(state)
    for key in component_keys(state):
        down, up = state[key + DOWN], state[key + UP]
        if not down.shape[0]:
            continue  # of rank 0 already
        rank = min(max_rank, down.shape[0])
        out[key + DOWN] = down[:rank].contiguous()
        out[key + UP] = up[:, :rank].contiguous()
        if key + MID in state:
            out[key + MID] = state[key + MID][:rank, :rank].contiguous()
        if key + ALPHA in state:
            out[key + ALPHA] = state[key + ALPHA] * (rank / down.shape[0])
    return out


@dataclass(frozen=True)
class Written:
    """What was written, without a look at the disk."""

    file: LoRAFile
    components: tuple[ComponentInfo, ...]
    nbytes: int


def save(
    path: Path,
    components: Sequence[Component],
    metadata: Mapping[str, str],
    megabytes: float | None = None,
    min_rank: int = 1,
    new: bool = False,
) -> Path:
    """Write a LoRA² file: to a temporary file beside ``path``, then renamed over it.

    ``new``: nothing is replaced; raises NameTaken when there is something at ``path``.

    ``megabytes``: 10⁶ bytes that the whole file, header included, may take; what is larger is cut
    to it by one SVD across all components (:func:`.resizing.fit.fit_to_megabytes`), and
    ``min_rank`` is then left to each where possible. The same components and metadata always give
    the same bytes. Raises LoRAFileError when there is nothing to write or the disk is full; an
    existing file then stays as it was.
    """
    write(path, components, metadata, megabytes, min_rank, new)
    return path


def write(
    path: Path,
    components: Sequence[Component],
    metadata: Mapping[str, str],
    megabytes: float | None = None,
    min_rank: int = 1,
    new: bool = False,
) -> Written:
    """:func:`save`, and what is in the file now: it need not be read, which might fail."""
    if megabytes is None:
        state = to_state(components)
        ranks = stored_ranks(state, components)
        full = complete_metadata(metadata, components, ranks)
    else:
        limit = int(megabytes * 1e6)
        state, full = fit_to_megabytes(components, metadata, limit, min_rank)
    if not state:
        raise LoRAFileError(
            f"{path.name} was not written: no component has learnt anything yet. Train for more "
            "steps or with a higher learning_rate."
        )
    data = encode(state, full)
    write_atomically(path, data, new)
    infos, written = describe(parse_header(path, data))
    return Written(LoRAFile(state, written), tuple(infos), len(data))
