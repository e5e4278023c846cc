"""Files written component by component: how much memory that takes, measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lora2_pack.tests.conftest import ROOT

FEW, MANY, RANK, WIDTH = 8, 32, 128, 1280
ONE_MB = RANK * 2 * WIDTH * 8 / 1e6  # a component in fp64, as it is computed with: 2.6

# What the system counts as the process's own memory; pages mapped from a file are the disk's. It
# is read whenever a component is asked for and whenever bytes are written.
MEASURE = """
import importlib, re, runpy, sys
from pathlib import Path

runpy.run_path(sys.argv[1])["register"]()
import torch
torch.set_num_threads(1)
resize = importlib.import_module("lora2_pack.lora2_core.resizing.resize")
Limits = importlib.import_module("lora2_pack.lora2_core.config.load").Limits
status, peak = Path("/proc/self/status"), 0

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", status.read_text())[1]) * 1024 / 1e6

def watch(frame, event, what):
    global peak
    if event in ("call", "return") and "lora2_core" in frame.f_code.co_filename:
        peak = max(peak, anonymous())

small, large, target, way = sys.argv[2:]
def work(source):
    limits = Limits(energy=0.9) if way == "resize" else Limits()
    if way == "resize":
        resize.resize_file(Path(source), Path(target), limits)
    else:
        resize.merge_files([(Path(source), 1.0), (Path(source), 0.5)], Path(target), limits)
work(small)  # what the libraries set up once
before = anonymous()
sys.setprofile(watch)
work(large)
sys.setprofile(None)
print("peak", peak - before)
"""


def write(path: Path, components: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number in range(components):
        key = f"lora_unet_blocks_{number}_attn1_to_q"
        down = torch.randn(RANK, WIDTH, generator=generator, dtype=torch.float32)
        state[f"{key}.lora_down.weight"] = down.half()
        state[f"{key}.lora_up.weight"] = down.t().flip(0).contiguous().half()
        state[f"{key}.alpha"] = torch.tensor(float(RANK))
    safetensors.torch.save_file(state, path)
    return path


def peak(tmp_path: Path, components: int, way: str) -> float:
    """Memory that work on a file of so many components takes, in MB, in a process of its own."""
    small, large = write(tmp_path / "small", 1), write(tmp_path / "large", components)
    paths = [str(path) for path in (ROOT / "tools" / "pack.py", small, large, tmp_path / "target")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths, way], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak ([-\d.]+)", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("way", "ranks"), [("resize", 1), ("merge", 2)])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, way: str, ranks: int):
    few, many = peak(tmp_path, FEW, way), peak(tmp_path, MANY, way)
    one = ranks * ONE_MB  # a sum of two has the rank of both
    # If they were kept, 24 more in fp32 would take 24 · one / 2; what stays is the allocator's.
    assert many < few + 4 * one, f"{many} MB for {MANY} components, {few} MB for {FEW}"
    assert many < 8 * one, "both factors, their fp16 versions and products, all in fp64"
