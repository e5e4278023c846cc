"""A real ComfyUI and the pack in this process, for the benchmarks.

The packaged ComfyUI, or the one whose folder the environment's ``LORA2_COMFYUI`` names.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def enter() -> None:
    """Make comfy importable, on the CPU, and the pack as ``lora2_pack``."""
    tool = _tool("comfyui")
    enter_comfyui(tool.find(os.environ.get("LORA2_COMFYUI")) or tool.ensure(dev=True).path)
    _tool("pack").register()


def enter_comfyui(comfyui: Path, cpu: bool = True) -> None:
    """Make comfy of the ComfyUI in the folder ``comfyui`` importable, on the CPU or on a card.

    Raises ImportError where it, or a package that it needs to start, is not there.
    """
    sys.path.insert(0, str(comfyui))
    options: Any = importlib.import_module("comfy.options")
    options.enable_args_parsing(False)  # the arguments are the benchmark's
    arguments: Any = importlib.import_module("comfy.cli_args").args
    arguments.cpu = cpu
    importlib.import_module("utils.extra_config")  # before nodes.py puts comfy/ on the path


def present_comfyui() -> Path | None:
    """The folder of a ComfyUI that is there already: nothing is set up. None where there is none.

    Raises the tools' SetupError where ``LORA2_COMFYUI`` names something else.
    """
    tool = _tool("comfyui")
    found = tool.find(os.environ.get("LORA2_COMFYUI")) or ROOT / ".comfyui"
    return found if tool.is_comfyui(found) else None


def rerun_in_environment() -> None:
    """Start again with the environment's Python when this one has no torch."""
    if importlib.util.find_spec("torch") is not None:
        return
    found = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    named = os.environ.get("LORA2_COMFYUI")
    if named:  # with packages of its own
        found = _tool("checkouts").runtime_for(named).python
    if not found.is_file():
        sys.exit("There is no .venv yet. Run: python3 tools/comfyui.py --dev")
    os.execv(found, [str(found), *sys.argv])


def _tool(name: str) -> Any:
    """A module of ``tools/``, whose ``server.py`` must not stay in the way of ComfyUI's."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "tools"))
