"""How much memory there is for what is to be read."""

from __future__ import annotations

import sys
from pathlib import Path


def free_ram() -> int | None:
    """Bytes that this process may still allocate; None where the system does not tell.

    The lower of what Linux calls available and what is left of a limit on the process.
    """
    found: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        if sys.platform != "win32":
            import resource

            limit, _ = resource.getrlimit(resource.RLIMIT_AS)
            if limit != resource.RLIM_INFINITY:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                found.append(max(0, limit - pages * resource.getpagesize()))
    except (OSError, ValueError, ImportError):
        return None
    return min(found, default=None)
