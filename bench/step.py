"""How long one training step takes: ours, a frozen floor, PEFT, and ComfyUI's TrainLoraNode.

``.venv/bin/python bench/step.py --json`` prints one JSON object with the settings, every median
and their ratios. All contestants take turns within one run, one step each a round, so that a
machine that is busy for a while is busy for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import runtime

WARM_UP = 8
LIMITS = {
    "floor_demo": 1.3,
    "floor_sdxl_width": 1.05,
    "train_lora_node": 0.42,
    "peft": 0.95,
    "fixed_rank": 1.05,
    "memory_train_lora_node": 0.5,
    "entropy": 1.05,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=60, help="timed steps each, at least 15")
    options = parser.parse_args()
    if options.rounds < 15:
        parser.error("--rounds must be at least 15")
    found = report(options.rounds)
    print(json.dumps(found, indent=2) if options.json else _table(found))


def report(rounds: int) -> dict[str, Any]:
    """Medians in milliseconds, peaks in MB, and their ratios."""
    import memory

    peaks = memory.beside_train_lora_node()
    runtime.enter()
    import contestants
    import torch

    torch.set_num_threads(2)
    clock = _Clock()
    parts = contestants.demo_parts()
    settings = contestants.config
    demo = {
        "floor": contestants.floor(parts),
        "ours": contestants.ours(parts, settings()),
        "ours without entropy": contestants.ours(parts, settings(entropy_weight=0.0)),
        "ours, fixed rank": contestants.ours(parts, settings("fixed")),
        "peft": contestants.peft_lora(parts),
    }
    wide = {
        "floor of width 1280": contestants.wide_floor(),
        "ours of width 1280": contestants.wide_ours(settings(batch_size=1)),
    }
    total = WARM_UP + rounds
    clock.run(demo | wide, parts, total, checkpointing=False)
    both = {"ours, checkpointing": contestants.ours(parts, settings(gradient_checkpointing=True))}
    clock.run(both, parts, total, checkpointing=True)
    medians = {name: statistics.median(times[WARM_UP:]) for name, times in clock.times.items()}
    return {
        "settings": _settings(contestants, rounds, demo["ours"]),
        "medians_ms": medians,
        "peaks_mb": peaks,
        "ratios": _ratios(medians, peaks),
        "checkpointing": {
            "train_lora_node": medians["ours, checkpointing"]
            / medians["train_lora_node, checkpointing"],
            "memory_train_lora_node": peaks["ours-checkpointing"]
            / peaks["train-lora-node-checkpointing"],
        },
        "limits": LIMITS,
    }


class _Clock:
    """Times steps that take turns with those of a running TrainLoraNode."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self._node_started: float | None = None

    def run(
        self, steps: dict[str, Callable[[], Any]], parts: Any, rounds: int, checkpointing: bool
    ) -> None:
        import contestants
        import torch

        name = "train_lora_node" + (", checkpointing" if checkpointing else "")
        self._node_started = None

        def between() -> None:
            if self._node_started is not None:
                self._add(name, self._node_started)
            with torch.inference_mode(False), torch.enable_grad():
                for other, step in steps.items():
                    started = time.perf_counter()
                    step()
                    self._add(other, started)
            self._node_started = time.perf_counter()

        contestants.run_train_lora_node(parts, rounds, checkpointing, between)

    def _add(self, name: str, started: float) -> None:
        self.times.setdefault(name, []).append(1e3 * (time.perf_counter() - started))


def _ratios(medians: dict[str, float], peaks: dict[str, float]) -> dict[str, float]:
    ours = medians["ours"]
    return {
        "floor_demo": ours / medians["floor"],
        "floor_sdxl_width": medians["ours of width 1280"] / medians["floor of width 1280"],
        "train_lora_node": ours / medians["train_lora_node"],
        "peft": ours / medians["peft"],
        "fixed_rank": ours / medians["ours, fixed rank"],
        "memory_train_lora_node": peaks["ours"] / peaks["train-lora-node"],
        "entropy": ours / medians["ours without entropy"],
    }


def _settings(contestants: Any, rounds: int, ours: Callable[[], Any]) -> dict[str, Any]:
    return {
        "device": "cpu",
        "threads": 2,
        "precision": "fp32",
        "rounds": rounds,
        "warm_up": WARM_UP,
        "batch_size": contestants.BATCH,
        "mean_rank": ours().mean_rank,  # of the demo model, at the end
        "blocks": {
            "count": 2,
            "width": contestants.WIDTH,
            "heads": contestants.HEADS,
            "context": contestants.CONTEXT,
            "tokens": contestants.TOKENS,
            "batch_size": 1,
        },
    }


def _table(found: dict[str, Any]) -> str:
    lines = ["Median step, ms", ""]
    lines += [f"  {name:<34}{value:>8.1f}" for name, value in found["medians_ms"].items()]
    lines += ["", "Ratio, and the most it may be", ""]
    for name, value in found["ratios"].items():
        lines.append(f"  {name:<34}{value:>8.3f}{LIMITS[name]:>8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    runtime.rerun_in_environment()
    main()
