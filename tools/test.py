#!/usr/bin/env python3
"""Run every check of the pack in a real ComfyUI: lint, format, types, tests.

    python3 tools/test.py [--comfyui PATH] [arguments for pytest]

All checks run even when one fails; the last line says which did.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from comfyui import ROOT, Runtime, ensure
from environment import SetupError, say

GREEN, RED, BOLD, PLAIN = "32", "31", "1", "0"
MOST_PROCESSES = 4  # each boots a ComfyUI of its own


def side_by_side() -> list[str]:
    """Arguments of pytest for the whole suite: files of tests side by side, if there are cores.

    Those that share a server stay together (tests/conftest.py); they take longest and come first.
    """
    processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    if processes == 1:
        return []
    return ["-n", str(processes), "--dist", "loadgroup", "--no-loadscope-reorder"]


def steps(runtime: Runtime, pytest_arguments: list[str]) -> dict[str, list[str]]:
    """Return the command of each check by its name."""
    python = str(runtime.python)
    return {
        "ruff check": [python, "-m", "ruff", "check", "."],
        "ruff format": [python, "-m", "ruff", "format", "--check", "."],
        "pyright": [python, "-m", "basedpyright", "--pythonpath", python],
        "pytest": [python, "-m", "pytest", *(pytest_arguments or side_by_side())],
    }


def run_step(name: str, command: list[str], runtime: Runtime) -> bool:
    """Run one check, show its output and its time, and return whether it passed."""
    print(_coloured(f"== {name}", BOLD), flush=True)
    variables = os.environ | {"LORA2_COMFYUI": str(runtime.path)}
    if "-n" in command:  # or every process would take all cores for each product of matrices
        variables.setdefault("OMP_NUM_THREADS", "1")
    if name == "pyright":
        # For a ComfyUI elsewhere than in .comfyui/. The tests put it on their path themselves.
        variables["PYTHONPATH"] = str(runtime.path)
    started = time.monotonic()
    passed = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode == 0
    verdict = _coloured("passed", GREEN) if passed else _coloured("FAILED", RED)
    print(f"== {name} {verdict} in {time.monotonic() - started:.1f} s\n", flush=True)
    return passed


def _coloured(text: str, code: str) -> str:
    """Colour text on a terminal, and only there."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\033[{code}m{text}\033[{PLAIN}m"


def main() -> int:
    """Run the checks; 0 if all passed."""
    parser = argparse.ArgumentParser(
        description="Run every check of LoRA² in a real ComfyUI.",
        epilog="Other arguments go to pytest, for example: -x -k inspect tests/core",
        allow_abbrev=False,
    )
    parser.add_argument("--comfyui", metavar="PATH", help="the folder of a ComfyUI to use")
    options, pytest_arguments = parser.parse_known_args()
    try:
        runtime = ensure(options.comfyui, dev=True)
    except SetupError as error:
        say(str(error))
        return error.code
    print(f"ComfyUI: {runtime.path}\nPython: {runtime.python}\n", flush=True)
    failed = [
        name
        for name, command in steps(runtime, pytest_arguments).items()
        if not run_step(name, command, runtime)
    ]
    print(
        _coloured(f"Failed: {', '.join(failed)}.", RED)
        if failed
        else _coloured("All checks passed.", GREEN)
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
