"""What a piece of work takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ...resident import risen, settled

T = TypeVar("T")


def with_peak(work: Callable[[], T]) -> tuple[T, float]:
    """A piece of work's result, and by how many MB it raised the memory in use at its worst.

    On a GPU what torch has allocated there, else the process's resident memory (Linux; elsewhere
    NaN).
    """
    if torch.cuda.is_available():
        gc.collect()  # or what earlier work has left would count as in use
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return result, (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        before = settled()
    except OSError:
        return work(), float("nan")
    result = work()
    return result, risen(before)
