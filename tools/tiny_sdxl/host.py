"""ComfyUI's real classes in this process, without its server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# The one that is named, or where tools/comfyui.py puts it.
COMFYUI = Path(os.environ.get("LORA2_COMFYUI") or ROOT / ".comfyui").absolute()


def open_comfyui(folder: Path = COMFYUI, cpu: bool = True) -> None:
    """Make ``comfy`` importable and keep it on the CPU, unless told otherwise.

    Raises SystemExit when ComfyUI is not there.
    """
    if not (folder / "comfy" / "model_base.py").is_file():
        raise SystemExit(f"No ComfyUI in {folder}; run python3 tools/comfyui.py --dev first.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import comfy.cli_args  # its module reads no command line unless told to

    comfy.cli_args.args.cpu = cpu
