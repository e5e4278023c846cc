"""What a result is worth nothing without: card, versions, commit, date and command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .rows import Row

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1
UNKNOWN = "unknown"
_PACKAGES = ("bitsandbytes", "peft", "safetensors", "transformers")
MEANINGS = {
    "step_ms": "median of whole steps, the device synchronised before and after each",
    "of_floor": "share of the frozen floor's step_ms: forward, and backward to the latents alone",
    "peak_allocated_mb": "torch.cuda.max_memory_allocated, the contestant alone; MB are 10^6 bytes",
    "peak_reserved_mb": "torch.cuda.max_memory_reserved, from an emptied cache",
    "told_mb": "the pack's estimate, counted on this model before the run",
    "scaled_mb": "the pack's estimate by ratios, from SDXL's defaults or the model's first row",
    "told_ms": "the pack's estimate of a step, from two forward passes",
    "kernels": "launched in one step; on a CPU calls of PyTorch's operators",
    "idle": "1 - (time in which a kernel or a copy ran, from torch.profiler) / step_ms",
}


def record(
    rows: Sequence[Row], device: torch.device, comfyui: Path, arguments: Sequence[str], **more: Any
) -> dict[str, Any]:
    """The JSON object of a run; ``more``: what else is to be in it."""
    return {
        "schema": SCHEMA,
        "card": card(device),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "comfyui": _comfyui_version(comfyui),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "bench/gpu.py", *arguments]),
        "device": device.type,
        **more,
        "meanings": MEANINGS,
        "rows": [row.as_dict() for row in rows],
    }


def card(device: torch.device) -> dict[str, Any]:
    """Name, memory in MB and what the allocator is called; of a CPU its name."""
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine(), "memory_mb": None}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_mb": found.total_memory / 1e6,
        "capability": f"{found.major}.{found.minor}",
        "allocator": torch.cuda.get_allocator_backend(),
    }


def commit(root: Path = ROOT) -> str:
    """The commit of the pack; "unknown" where git is missing or keeps another folder."""
    command = ("git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    lines = done.stdout.splitlines()
    # A pack that was unpacked in the folder of somebody else's repository has no commit.
    if done.returncode or len(lines) != 2 or Path(lines[0]).resolve() != root.resolve():
        return UNKNOWN
    return lines[1]


def write(found: dict[str, Any], file: Path) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(found, stream, indent=2, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    lines = done.stdout.split("\n")
    return lines[0].strip() or UNKNOWN if done.returncode == 0 else UNKNOWN


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _comfyui_version(comfyui: Path) -> str:
    try:
        text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return UNKNOWN
    return text.partition("__version__ = ")[2].strip().strip("\"'") or UNKNOWN
