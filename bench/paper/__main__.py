"""``python -m bench.paper``: train, paint and judge; resumable at any moment."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    """Start the command as part of the pack."""
    runpy.run_path(str(ROOT / "tools" / "pack.py"))["register"]()
    demo = not any(word.startswith("--base") and word != "--base=demo" for word in sys.argv)
    cpu = demo or not importlib.import_module("torch").cuda.is_available()
    importlib.import_module("lora2_pack.tools.tiny_sdxl.host").open_comfyui(cpu=cpu)
    return importlib.import_module("lora2_pack.bench.paper.app").main()


if __name__ == "__main__":
    if not __package__:  # started as a file, whose folder Python has put first
        del sys.path[0]
    runpy.run_path(str(ROOT / "bench" / "runtime.py"))["rerun_in_environment"]()
    sys.exit(main())
