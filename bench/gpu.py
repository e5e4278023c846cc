"""A training step on a card: ours by preset beside a frozen floor and other trainers.

``python bench/gpu.py [--json FILE] [--device cuda] [--tiny] [--minutes 10]``: SDXL's and
KOALA-700m's real shapes with seeded weights, nothing to download. Prints a table in Markdown and
writes one JSON object. ``--device cpu --tiny`` tries all of it without a card. docs/benchmark.md
says how to read it.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    here = Path(__file__).resolve().parent
    # What lies beside this file must hide no package of the same name from others.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    runpy.run_path(str(ROOT / "tools" / "pack.py"))["register"]()
    command: Any = importlib.import_module("lora2_pack.bench.gpu_cells.command")
    return command.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
