"""How the tests are started: which there are, side by side, and with which variables.

Only the standard library is used here.
"""

from __future__ import annotations

import os

from checkouts import bytecode
from comfyui import Runtime

MOST_PROCESSES = 4  # each boots a ComfyUI of its own
# The tests in which ComfyUI takes part: those to run in every version of it.
GROUPS = ("host", "server", "browser")


def side_by_side(processes: int | None = None) -> list[str]:
    """Return arguments of pytest for files of tests side by side, if there are cores.

    Those that share a server stay together (tests/conftest.py); they take longest and come first.
    """
    processes = processes or min(os.cpu_count() or 1, MOST_PROCESSES)
    if processes == 1:
        return []
    return ["-n", str(processes), "--dist", "loadgroup", "--no-loadscope-reorder"]


def variables_for(runtime: Runtime, command: list[str]) -> dict[str, str]:
    """Return the environment variables of a check."""
    variables = os.environ | {"LORA2_COMFYUI": str(runtime.path)}
    if not runtime.packaged:
        variables["PYTHONPYCACHEPREFIX"] = str(bytecode(runtime))
    if "basedpyright" in command:
        variables["PYTHONPATH"] = str(runtime.path)  # the tests put it on their path themselves
    if "-n" in command:  # or every process would take all cores for each product of matrices
        variables.setdefault("OMP_NUM_THREADS", "1")
    return variables
