"""ComfyUI's real classes in this process, without its server."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent
COMFYUI = ROOT / ".comfyui"  # where tools/comfyui.py puts it


def open_comfyui(folder: Path = COMFYUI, cpu: bool = True) -> None:
    """Make ``comfy`` importable and keep it on the CPU, unless told otherwise.

    Raises SystemExit when ComfyUI is not there.
    """
    if not (folder / "comfy" / "model_base.py").is_file():
        raise SystemExit(f"No ComfyUI in {folder}; run python3 tools/comfyui.py --dev first.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Before our own root, whose nodes/ would shadow ComfyUI's nodes.py.
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import comfy.cli_args  # its module reads no command line unless told to

    comfy.cli_args.args.cpu = cpu


def core(name: str) -> ModuleType:
    """Return a module of ``lora2_core``, as part of the pack that ComfyUI loads by its path."""
    if "lora2_pack" not in sys.modules:
        package = ModuleType("lora2_pack")
        package.__path__ = [str(ROOT)]
        sys.modules["lora2_pack"] = package
    return importlib.import_module(f"lora2_pack.lora2_core.{name}")
