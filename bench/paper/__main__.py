"""``python -m bench.paper``: train, paint and judge; resumable at any moment."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    """Start the command as part of the pack, whose own folder must stay off ``sys.path``, as must
    the one that Python puts there when this is run as a file."""
    off = (ROOT, Path(__file__).resolve().parent)
    sys.path[:] = [one for one in sys.path if Path(one or ".").resolve() not in off]
    package = ModuleType("lora2_pack")
    package.__path__ = [str(ROOT)]
    sys.modules[package.__name__] = package
    demo = not any(word.startswith("--base") and word != "--base=demo" for word in sys.argv)
    cpu = demo or not importlib.import_module("torch").cuda.is_available()
    importlib.import_module("lora2_pack.tools.tiny_sdxl.host").open_comfyui(cpu=cpu)
    return importlib.import_module("lora2_pack.bench.paper.app").main()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "bench"))  # not `bench.runtime`: run as a file there is no root
    importlib.import_module("runtime").rerun_in_environment()
    sys.exit(main())
