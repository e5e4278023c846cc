"""RAM that a GPU reads by itself, in pieces, and none of it wasted or kept.

PyTorch pins powers of two: sixty pieces of 69 MB would take as many of 134 MB, and 8.4 GB of a
computer's RAM instead of 4.4. And it never hands back what it has pinned unless it is asked to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import _C, Tensor

_LARGEST = 1 << 30  # bytes of what is pinned at once


def ram_for(sizes: Sequence[int], pinned: bool) -> Iterator[Tensor]:
    """Memory of each of ``sizes``, (bytes,) uint8, one after the other as it is asked for.

    ``pinned``: cut from pieces that are pinned, as long as the system grants it.
    """
    left, done = list(sizes), 0
    while done < len(left):
        whole = empty_pinned([_next_size(left[done:])], torch.uint8) if pinned else None
        if whole is None:
            pinned = False  # what could be had in smaller pieces is left to others
            yield _empty(left[done])
            done += 1
            continue
        begin = 0
        while done < len(left) and begin + left[done] <= len(whole):
            yield whole[begin : begin + left[done]]
            begin, done = begin + left[done], done + 1


def _next_size(left: Sequence[int]) -> int:
    """A power of two that the first of ``left`` fits into, and of which little stays empty."""
    least, total = _power_of_two(left[0]), sum(left)
    size = _LARGEST
    while size > total:
        size //= 2
    return max(least, size)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """A tensor of anything in pinned RAM; None, told once, where the system grants no more."""
    try:
        with torch.inference_mode(False):
            return torch.empty(list(shape), dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        _tell(str(error).partition("\n")[0])
        return None


@cache
def _tell(reason: str) -> None:
    told = "LoRA²: RAM cannot be pinned, so that copies to and from the card take longer: %s"
    logging.warning(told, reason)


def _empty(nbytes: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8)


def give_back() -> None:
    """Let the system have pinned RAM that nobody uses any more."""
    if torch.cuda.is_initialized():
        public = getattr(torch, "accelerator", None)
        empty = getattr(public, "empty_host_cache", None) or getattr(_C, "_host_emptyCache", None)
        if empty is not None:  # of PyTorch 2.5 and newer
            empty()
