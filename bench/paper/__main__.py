"""``python -m bench.paper``: train, paint and judge; resumable at any moment."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    """Start the command as part of the pack, whose own folder must stay off ``sys.path``."""
    sys.path[:] = [one for one in sys.path if Path(one or ".").resolve() != ROOT]
    package = ModuleType("lora2_pack")
    package.__path__ = [str(ROOT)]
    sys.modules[package.__name__] = package
    importlib.import_module("lora2_pack.tools.tiny_sdxl.host").open_comfyui()
    return importlib.import_module("lora2_pack.bench.paper.app").main()


def in_environment() -> None:
    """Start again with the environment's Python when this one has no torch."""
    if importlib.util.find_spec("torch") is not None:
        return
    found = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not found.is_file():
        sys.exit("There is no .venv yet. Run: python3 tools/comfyui.py --dev")
    os.execv(found, [str(found), "-m", "bench.paper", *sys.argv[1:]])


if __name__ == "__main__":
    in_environment()
    sys.exit(main())
