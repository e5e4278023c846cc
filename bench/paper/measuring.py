"""What a piece of work takes."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ..runtime import resident

T = TypeVar("T")


def with_peak(work: Callable[[], T]) -> tuple[T, float]:
    """A piece of work's result, and by how many MB it raised the memory in use at its worst.

    On a GPU what torch has allocated there, else the process's resident memory (Linux).
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return result, (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        _give_back()
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # forgets the highest level
        before = resident("VmRSS")
    except OSError:
        return work(), float("nan")
    result = work()
    return result, (resident("VmHWM") - before) / 1e6


def _give_back() -> None:
    """Hand what earlier work has freed back to the system, or it would count as in use."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
