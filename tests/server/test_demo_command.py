"""The README's first command, as a person types it: everything it promises is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"
STEPS = 50


def test_the_demo_command(tmp_path: Path, runtime: Any):
    command = [sys.executable, str(TOOLS / "demo.py"), "--steps", str(STEPS), "--out", "results"]
    environment = os.environ | {"COMFYUI_PATH": str(runtime.path)}
    if runtime.packaged:
        del environment["COMFYUI_PATH"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"training {STEPS}/{STEPS}" in done.stdout
    out = tmp_path / "results"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["loss_last"] < 0.95 * summary["loss_first"]
    assert summary["rank_min"] < summary["rank_mean"] < summary["rank_max"]
    assert summary["bytes"] == (out / summary["file"]).stat().st_size
    pictures = {name: Image.open(out / name) for name in ("base.png", "sample.png", "ranks.png")}
    assert pictures["base.png"].tobytes() != pictures["sample.png"].tobytes()
    assert pictures["ranks.png"].width == 1280
