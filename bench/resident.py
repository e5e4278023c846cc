"""The resident memory of this process, as Linux counts it: what some work raises it by."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path


def settled() -> int:
    """Bytes in use before some work, for :func:`risen`; the highest level so far is forgotten.

    What earlier work has freed goes back to the system first, or it would be filled unseen. Raises
    OSError where there is no /proc.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    return _bytes("VmRSS")


def risen(before: int) -> float:
    """By how many MB memory was above ``before`` at its worst since :func:`settled`."""
    return (_bytes("VmHWM") - before) / 1e6


def _bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert found is not None, f"/proc/self/status has {field}"
    return 1024 * int(found[1])
