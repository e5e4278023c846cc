"""A real ComfyUI and the pack in this process, for the benchmarks."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def enter() -> None:
    """Make comfy importable, on the CPU, and the pack as ``lora2_pack``.

    The pack's own folder stays off ``sys.path``: its ``nodes/`` would hide ComfyUI's ``nodes.py``.
    """
    sys.path.insert(0, str(_comfyui()))
    options: Any = importlib.import_module("comfy.options")
    options.enable_args_parsing(False)  # the arguments are the benchmark's
    arguments: Any = importlib.import_module("comfy.cli_args").args
    arguments.cpu = True
    importlib.import_module("utils.extra_config")  # before nodes.py puts comfy/ on the path
    package = ModuleType("lora2_pack")
    spec = importlib.machinery.ModuleSpec(package.__name__, None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    package.__spec__ = spec
    package.__path__ = [str(ROOT)]
    sys.modules[package.__name__] = package


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at the most (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])  # type: ignore[index]


def rerun_in_environment() -> None:
    """Start again with the environment's Python when this one has no torch."""
    if importlib.util.find_spec("torch") is not None:
        return
    found = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not found.is_file():
        sys.exit("There is no .venv yet. Run: python3 tools/comfyui.py --dev")
    os.execv(found, [str(found), *sys.argv])


def _comfyui() -> Path:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        found: Any = importlib.import_module("comfyui")
        return found.ensure(os.environ.get("LORA2_COMFYUI"), dev=True).path
    finally:
        sys.path.remove(str(ROOT / "tools"))
