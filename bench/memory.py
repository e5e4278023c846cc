"""How much memory training takes: by mean rank, by optimizer state, and beside TrainLoraNode.

``python3 bench/memory.py [--json]``. Each figure is the peak of a process of its own: how far its
resident memory rises above what it held before the training was prepared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import resident
import runtime

CAPS = (8, 64, 512)
# Batch size, px, checkpointing: each value twice, each pair of values once.
ESTIMATED = ((1, 192, False), (1, 384, True), (2, 192, True), (2, 384, False))
STEPS, ESTIMATED_STEPS = 6, 3  # the second step has the optimizer's memory, and so the peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(options.measure)))
        return
    found = report()
    print(json.dumps(found, indent=2) if options.json else _table(found))


def report() -> dict[str, Any]:
    """Every figure, in MB (10⁶ bytes)."""
    by_rank = {f"rank {cap}": peak(f"rank-{cap}") for cap in CAPS}
    by_rank["cap 512, mean rank 16"] = peak("cap-512-mean-16")
    states = {name: peak(f"state-{name}") for name in ("adamw", "adamw8bit")}
    return {
        "blocks_of_width_1280_mb": by_rank,
        "optimizer_state_mb": states,
        "eight_bit_share": states["adamw8bit"] / states["adamw"],
        "demo_model_mb": beside_train_lora_node(),
        "estimates": estimates(),
    }


def estimates() -> list[dict[str, Any]]:
    """What the pack says before a run of the demo model, and what the run then takes."""
    return json.loads(_child("estimates"))


def beside_train_lora_node() -> dict[str, float]:
    """Peaks on the demo model, ours and ComfyUI's own trainer, by checkpointing."""
    names = ("ours", "ours-checkpointing", "train-lora-node", "train-lora-node-checkpointing")
    return {name: peak(name) for name in names}


def peak(name: str) -> float:
    """The figure ``name``, measured in a process of its own."""
    return float(json.loads(_child(name)))


def _child(name: str) -> str:
    command = [sys.executable, str(Path(__file__)), "--measure", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def _measure(name: str) -> Any:
    runtime.enter()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if name.startswith("state-"):
        return _state_megabytes(name.removeprefix("state-"))
    if name == "estimates":
        return _estimates()
    return _growth(_run_of(name))


def _growth(run: Callable[[], Any]) -> float:
    before = resident.settled()
    run()
    return resident.risen(before)


def _estimates() -> list[dict[str, Any]]:
    import contestants

    parts = contestants.demo_parts()
    contestants.ours(parts, contestants.config())()  # loads what is loaded once
    found = []
    for batch, size, checkpointing in ESTIMATED:
        settings = contestants.config(
            steps=ESTIMATED_STEPS,
            batch_size=batch,
            resolution=size,
            gradient_checkpointing=checkpointing,
        )
        told: list[Any] = []
        started: list[float] = []

        def run(settings: Any = settings, told: Any = told, started: Any = started) -> None:
            setup, step = contestants.prepared(parts, settings)
            told.append(setup.estimate)
            del setup
            resident.settled()  # photos are encoded by then: the VAE's peak is not the training's
            started.append(time.perf_counter())
            _steps(step, ESTIMATED_STEPS)

        peak_mb = _growth(run)
        found.append(
            {
                "batch_size": batch,
                "resolution": size,
                "checkpointing": checkpointing,
                "told_mb": told[0].memory.total / 1e6,
                "taken_mb": peak_mb,
                "told_s": told[0].seconds,
                "taken_s": time.perf_counter() - started[0],
            }
        )
    return found


def _run_of(name: str) -> Callable[[], Any]:
    """What is measured, with everything that it is not about made before."""
    import contestants

    if found := re.fullmatch(r"rank-(\d+)|cap-(\d+)-mean-(\d+)", name):
        whole, cap, mean = (int(number) if number else None for number in found.groups())
        settings = contestants.config(batch_size=1, rank=_ranks(cap or whole, mean or whole))
        blocks = contestants.Blocks()
        return lambda: _steps(contestants.wide_trainer(settings, blocks).run().__next__)
    parts = contestants.demo_parts()
    checkpointing = name.endswith("-checkpointing")
    if name.startswith("ours"):
        settings = contestants.config(gradient_checkpointing=checkpointing)
        return lambda: _steps(contestants.ours(parts, settings))
    return lambda: contestants.run_train_lora_node(parts, STEPS, checkpointing, lambda: None)


def _ranks(cap: int | None, mean: int | None) -> Any:
    from lora2_pack.lora2_core.config.ranks import RankConfig

    return RankConfig.balanced(max_rank=cap, target_rank=float(mean or 0))


def _steps(step: Callable[[], Any], count: int = STEPS) -> None:
    for _ in range(count):
        step()


def _state_megabytes(optimizer: str) -> float:
    """What the optimizer of A and B remembers, at rank 64 on the two blocks."""
    import contestants
    from lora2_pack.lora2_core.config.train import OptimizerConfig

    choice = OptimizerConfig(name=optimizer)  # type: ignore[arg-type]
    settings = contestants.config(batch_size=1, rank=_ranks(64, 64), optimizer=choice)
    trainer = contestants.wide_trainer(settings, contestants.Blocks())
    next(trainer.run())
    tensors = {id(v): v for s in trainer.optimizer.state.values() for v in s.values() if _big(v)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6


def _big(value: Any) -> bool:
    return hasattr(value, "numel") and value.numel() > 1


def _table(found: dict[str, Any]) -> str:
    lines = ["Peak training memory, MB above the loaded model", ""]
    for title in ("blocks_of_width_1280_mb", "demo_model_mb", "optimizer_state_mb"):
        lines.append(title.removesuffix("_mb").replace("_", " "))
        lines += [f"  {name:<32}{value:>10.1f}" for name, value in found[title].items()]
    lines += ["", "told before a run of the demo model, and taken", ""]
    for row in found["estimates"]:
        how = f"batch {row['batch_size']}, {row['resolution']} px" + (
            ", checkpointing" if row["checkpointing"] else ""
        )
        told = f"{row['told_mb']:>8.1f} MB {row['told_s']:>6.2f} s"
        lines.append(f"  {how:<32}{told}{row['taken_mb']:>10.1f} MB {row['taken_s']:>6.2f} s")
    return "\n".join([*lines, "", f"8-bit state: {found['eight_bit_share']:.1%} of fp32 state"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    runtime.rerun_in_environment()
    main()
