"""``python -m tools.tiny_sdxl``: draw, train, export and judge the demo model."""

from __future__ import annotations

import importlib
import sys

from ..pack import register

if __name__ == "__main__":
    register()
    sys.exit(importlib.import_module("lora2_pack.tools.tiny_sdxl.commands").main())
