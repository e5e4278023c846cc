#!/usr/bin/env python3
"""Run every check of the pack in a real ComfyUI: lint, format, types, tests.

    python3 tools/test.py [--comfyui PATH] [--frontend VERSION] [arguments for pytest]

All checks run even when one fails; the last line says which did. In another ComfyUI than the
packaged one, the tests that meet it are run (host, server, browser), in an environment of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from checkouts import runtime_for
from comfyui import ROOT, Runtime
from environment import SetupError, say
from suite import GROUPS, side_by_side, variables_for

GREEN, RED, BOLD, PLAIN = "32", "31", "1", "0"


def steps(runtime: Runtime, pytest_arguments: list[str]) -> dict[str, list[str]]:
    """Return the command of each check by its name."""
    python = str(runtime.python)
    pytest = [python, "-m", "pytest"]
    if not runtime.packaged:
        groups = [*side_by_side(), *(f"tests/{group}" for group in GROUPS)]
        return {"pytest": [*pytest, *(pytest_arguments or groups)]}
    return {
        "ruff check": [python, "-m", "ruff", "check", "."],
        "ruff format": [python, "-m", "ruff", "format", "--check", "."],
        "pyright": [python, "-m", "basedpyright", "--pythonpath", python],
        "pytest": [*pytest, *(pytest_arguments or side_by_side())],
    }


def run_step(name: str, command: list[str], runtime: Runtime) -> bool:
    """Run one check, show its output and its time, and return whether it passed."""
    print(_coloured(f"== {name}", BOLD), flush=True)
    variables = variables_for(runtime, command)
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
    parser.add_argument("--frontend", metavar="VERSION", help="another front end than its own")
    options, pytest_arguments = parser.parse_known_args()
    try:
        runtime = runtime_for(options.comfyui, options.frontend)
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
