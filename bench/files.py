"""LoRA files: how long inspecting, loading and resizing take, and what memory.

``python3 bench/files.py --json`` prints one JSON object. Inspecting: the header of a file of 2.8 GB
with SDXL's 560 components (its data is a hole in the disk). Loading: what a loader's node does,
from file to patched model, ours and ComfyUI's own in turns, on a U-Net of SDXL's widths; ours looks
at every weight meanwhile. Merging the patches into the weights comes later, in the sampler, and is
the same code for both; the details hold the time with it, which varies by half between two rounds.
Each peak is of a process of its own, and with the merge. Resizing: our decompositions beside
forming every ΔW and taking its full SVD, on components of SDXL's shapes and mixed ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import resident
import runtime

BYTES = 2_800_000_000
LIMITS = {
    "inspect_ms": 50, "inspect_mb": 60, "load_time": 1.0, "load_memory": 1.0,
    "resize_speedup": 20, "size_missed": 0.01,
}  # fmt: skip
# (in, out) of SDXL's attention: 640 and 1280 wide, and what reads a text of 2048.
SHAPES = ((640, 640), (2048, 640), (1280, 1280), (1280, 1280), (1280, 1280), (2048, 1280))
RANKS = (4, 16, 48, 64, 96, 200)  # mean 71, as the paper's SDXL files have
ROUNDS, LOADS, PEAKS = 7, 15, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    runtime.rerun_in_environment()
    if options.measure:
        runtime.enter()
        print(json.dumps(MEASURED[options.measure](options.folder)))
        return
    found = report()
    print(json.dumps(found, indent=2) if options.json else _table(found))


def report() -> dict[str, Any]:
    """Every figure, and what it must keep to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _child("sparse", folder)
        inspected = _child("inspect", folder)
        made = _child("make", folder)
        loaded = _child("load", folder)
        peaks = {
            who: min(_child(f"peak-{who}", folder) for _ in range(PEAKS))
            for who in ("ours", "stock")
        }
        resized = _child("resize", folder)
    figures = {
        "inspect_ms": inspected["ms"],
        "inspect_mb": inspected["mb"],
        "load_time": loaded["ours_patch_ms"] / loaded["stock_patch_ms"],
        "load_memory": peaks["ours"] / peaks["stock"],
        "resize_speedup": resized["full_s"] / resized["ours_s"],
        "size_missed": resized["size_missed"],
    }
    details = {"inspect": inspected, "file": made, "load": loaded, "peak_mb": peaks}
    return {"figures": figures, "limits": LIMITS, "details": {**details, "resize": resized}}


def _child(name: str, folder: Path) -> Any:
    command = [sys.executable, str(Path(__file__)), "--measure", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- inspecting -------------------------------------------------------------------------------


def _sparse(path: Path) -> float:
    """560 components of mixed ranks, 2.8 GB of them in all, none of which is on the disk."""
    from lora2_pack.lora2_core.files.header import encode_header, tensor_bytes, tensor_entries

    chance = random.Random(0)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    listing: dict[str, Any] = {}
    sizes = [(640, 640), (1280, 1280), (2048, 1280)]
    names = [f"input_blocks_7_1_transformer_blocks_{n}_attn{a}_to_{k}"
             for n in range(70) for a in (1, 2) for k in ("q", "k", "v", "out_0")]  # fmt: skip
    picked = [(name, *chance.choice(sizes), chance.randint(1, 1024)) for name in names]
    scale = BYTES / 2 / sum((i + o) * rank for _, i, o, rank in picked)
    for name, width, out, share in picked:
        rank = max(1, min(round(share * scale), 10_000))
        for part, shape in (("down", (rank, width)), ("up", (out, rank))):
            shapes[f"lora_unet_{name}.lora_{part}.weight"] = "F16", shape
        listing[f"lora_unet_{name}"] = {"nu": 2.3 / rank, "rank": rank, "in": width, "out": out}
    metadata = {
        "lora2.format_version": "1", "lora2.components": json.dumps(listing), "ss_steps": "500",
    }  # fmt: skip
    path.write_bytes(encode_header(tensor_entries(shapes), metadata))
    os.truncate(path, path.stat().st_size + sum(map(tensor_bytes, shapes.values())))
    return path.stat().st_size / 1e9


def _inspect(folder: Path) -> dict[str, Any]:
    from lora2_pack.lora2_core.reports import inspector

    # Made by a process of its own, and not looked at before: else what this one needs of memory
    # would be there already, and count as nothing.
    path = folder / "sparse.safetensors"
    before = resident.settled()
    seconds = [_timed(lambda: inspector.inspect(path)) for _ in range(ROUNDS)]
    mb = resident.risen(before)
    size = path.stat().st_size
    path.unlink()
    return {"ms": 1e3 * statistics.median(seconds), "mb": mb, "file_gb": size / 1e9}


# --- loading ----------------------------------------------------------------------------------


def _model() -> Any:
    """A U-Net of SDXL's widths, of the depth of its smallest relative, untrained, in fp16."""
    import torch
    from lora2_pack.lora2_core import comfy_host
    from lora2_pack.lora2_core.tiny_sdxl.model import UNET_CONFIG, text_configs

    config = dict(UNET_CONFIG)
    config |= {
        "model_channels": 320, "channel_mult": (1, 2, 4), "context_dim": 2048,
        "adm_in_channels": 2816, "num_head_channels": 64, "num_heads": -1,
    }  # fmt: skip
    text = text_configs()
    torch.manual_seed(0)

    def fill(*modules: Any) -> None:
        for module in modules:
            for parameter in module.parameters():
                parameter.data.normal_(0, 0.02)

    with torch.inference_mode():
        return comfy_host.build_sdxl(config, text, fill)[0]


def _make(folder: Path) -> dict[str, Any]:
    """A LoRA of mixed ranks for all attention of that model."""
    import torch
    from lora2_pack.lora2_core import lora_file
    from lora2_pack.lora2_core.adapters.targets import find_targets
    from lora2_pack.lora2_core.files.component import Component

    unet = _model().model.diffusion_model
    components = [
        Component(
            target.name,
            torch.randn(rank, target.in_features) / 30,
            torch.randn(target.out_features, rank) / 30,
            torch.ones(rank),
            0.1,
        )
        for index, target in enumerate(find_targets(unet))
        for rank in (RANKS[index % len(RANKS)],)
    ]
    path = lora_file.save(folder / "lora.safetensors", components, {})
    weights = sum(p.numel() for p in unet.parameters())
    return {"components": len(components), "mb": path.stat().st_size / 1e6, "unet_weights": weights}


def _ours(model: Any, path: Path) -> Any:
    from lora2_pack.lora2_core import comfy_host
    from lora2_pack.lora2_core.config.load import Limits
    from lora2_pack.lora2_core.resizing.recent import LoRACache

    file = LoRACache().open(path, Limits())
    return comfy_host.apply_lora(model, None, file, 1.0, 1.0, path.name).model


def _stock(model: Any, path: Path) -> Any:
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(str(path), safe_load=True)
    return comfy.sd.load_lora_for_models(model, None, state, 1.0, 0)[0]


def _ready(load: Callable[[Any, Path], Any], model: Any, path: Path) -> None:
    """From the file to a model that could be sampled."""
    import comfy.model_management
    import torch

    with torch.inference_mode():
        patched = load(model, path)
        comfy.model_management.load_models_gpu([patched], force_full_load=True)


def _load(folder: Path) -> dict[str, Any]:
    import comfy.model_management
    import torch

    torch.set_num_threads(2)
    model, path = _model(), folder / "lora.safetensors"
    found: dict[str, list[float]] = {"ours": [], "stock": [], "ours_patch": [], "stock_patch": []}
    for number in range(LOADS + 1):
        pairs = [("ours", _ours), ("stock", _stock)]
        for name, load in pairs[:: 1 if number % 2 else -1]:  # neither always comes first
            seconds = _timed(lambda load=load: _ready(load, model, path))
            comfy.model_management.unload_all_models()
            patch = _timed(lambda load=load: load(model, path))
            if number:
                found[name].append(seconds)
                found[f"{name}_patch"].append(patch)
    return {f"{name}_ms": 1e3 * statistics.median(times) for name, times in found.items()}


def _peak(load: Callable[[Any, Path], Any], folder: Path) -> float:
    import torch

    torch.set_num_threads(2)
    model, path = _model(), folder / "lora.safetensors"
    before = resident.settled()
    _ready(load, model, path)
    return resident.risen(before)


# --- resizing ---------------------------------------------------------------------------------


def _resize(folder: Path) -> dict[str, Any]:
    """The whole of our resize against the mere SVDs of the other way."""
    import torch
    from lora2_pack.lora2_core import lora_file
    from lora2_pack.lora2_core.config.load import Limits
    from lora2_pack.lora2_core.files.component import Component
    from lora2_pack.lora2_core.resizing.resize import resize_file
    from lora2_pack.lora2_core.resizing.source import LoRASource

    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    components = []
    for number, ((width, out), rank) in enumerate(zip(SHAPES, RANKS, strict=True)):
        down = torch.randn(rank, width, generator=generator)
        up = torch.randn(out, rank, generator=generator) / 30
        importance = torch.exp(-3 * torch.arange(rank) / rank)
        components.append(Component(f"b.{number}.to_q", down, up, importance, 0.1))
    source = lora_file.save(folder / "a.safetensors", components, {})
    target = folder / "b.safetensors"

    def ours() -> None:
        resize_file(source, target, Limits(energy=0.95))

    def full() -> None:
        with LoRASource(source) as opened:
            for key in opened.keys:
                component = opened.component(key)
                torch.linalg.svd(component.lora_up @ component.lora_down, full_matrices=False)

    ours()
    times: dict[str, list[float]] = {"ours": [], "full": []}
    for _ in range(3):
        times["ours"].append(_timed(ours))
        times["full"].append(_timed(full))
    missed = 0.0
    for share in (0.2, 0.5, 0.8):
        limit = source.stat().st_size * share / 1e6
        size = resize_file(source, target, Limits(megabytes=limit)).after / 1e6
        if size > limit:
            raise RuntimeError(f"{size} MB were written where {limit} were allowed")
        missed = max(missed, 1 - size / limit)
    medians = {f"{name}_s": statistics.median(found) for name, found in times.items()}
    return {**medians, "size_missed": missed, "ranks": RANKS, "shapes": SHAPES}


MEASURED: dict[str, Callable[[Path], Any]] = {
    "sparse": lambda folder: _sparse(folder / "sparse.safetensors"),
    "inspect": _inspect,
    "make": _make,
    "load": _load,
    "peak-ours": lambda folder: _peak(_ours, folder),
    "peak-stock": lambda folder: _peak(_stock, folder),
    "resize": _resize,
}


def _table(found: dict[str, Any]) -> str:
    lines = [f"{'':18}{'measured':>10}{'limit':>10}"]
    for name, value in found["figures"].items():
        sign = "at least" if name == "resize_speedup" else "at most"
        lines.append(f"{name:<18}{value:>10.3g}{sign:>10} {found['limits'][name]:g}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
