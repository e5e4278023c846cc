#!/usr/bin/env python3
"""Train a LoRA² in a real ComfyUI on five photos of a cat, paint with it, and show its ranks.

    python3 tools/demo.py [--steps N] [--out DIR] [--comfyui PATH]

Leaves the LoRA file, the pictures and a summary in DIR. Needs nothing but Python 3.11 and, the
first time, a package registry.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from comfyui import ROOT, Runtime, ensure
from environment import SetupError, say

WORKFLOW = ROOT / "tests" / "workflows" / "train_and_sample.json"
# SaveImage nodes of the workflow by their file name prefix, and what we call their pictures.
PICTURES = {
    "lora2_base": "base.png",
    "lora2_sample": "sample.png",
    "lora2_ranks": "ranks.png",
}
BAR_WIDTH = 30
CLEARLY_LESS = 0.95  # of the first loss, on fixed noise


class DemoError(Exception):
    """The demo ended without everything it promises; the message says what is missing."""


def load_workflow(steps: int) -> tuple[dict[str, Any], str]:
    """Return the train-and-sample workflow with `steps`, and the id of its training node."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    train = next(i for i, node in workflow.items() if node["class_type"] == "LoRA2Train")
    workflow[train]["inputs"]["steps"] = steps
    return workflow, train


class ProgressLine:
    """Shows the training node's progress: a bar on a terminal, ten lines elsewhere."""

    def __init__(self, train: str, steps: int) -> None:
        self.train, self.steps = train, steps
        self._tenths = 0

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        """Take in a websocket message."""
        if event != "progress" or data.get("node") != self.train:
            return
        done = int(data["value"])
        tenths = 10 * done // self.steps
        if sys.stdout.isatty():
            filled = BAR_WIDTH * done // self.steps
            bar = "█" * filled + "░" * (BAR_WIDTH - filled)
            end = "\n" if done == self.steps else ""
            print(f"\r  training {bar} {done}/{self.steps}", end=end, flush=True)
        elif tenths > self._tenths:
            print(f"  training {done}/{self.steps}", flush=True)
        self._tenths = tenths


def summarize(file: Path, seconds: float) -> dict[str, Any]:
    """Return the figures of a trained file."""
    from safetensors import safe_open

    with safe_open(file, "np") as stored:
        metadata = stored.metadata()
    components = json.loads(metadata["lora2.components"])
    ranks = [entry["rank"] for entry in components.values()]
    # Medians of the first and last fifth of the run, on fixed noise and timesteps.
    first, last = json.loads(metadata["lora2.loss"])["fixed_noise"]
    return {
        "steps": int(metadata["lora2.steps"]),
        "seconds": round(seconds, 1),
        "loss_first": round(first, 5),
        "loss_last": round(last, 5),
        "components": len(ranks),
        "rank_min": min(ranks),
        "rank_mean": round(sum(ranks) / len(ranks), 2),
        "rank_max": max(ranks),
        "bytes": file.stat().st_size,
        "file": file.name,
    }


def collect(output: Path, out: Path, seconds: float) -> dict[str, Any]:
    """Copy what the run left in ComfyUI's `output` to `out`; return the summary."""
    files = sorted((output / "loras").rglob("*.safetensors"))
    if not files:
        raise DemoError("the training node wrote no LoRA file")
    file = Path(shutil.copy2(files[-1], out))
    for prefix, name in PICTURES.items():
        found = sorted(output.glob(f"{prefix}_*.png"))
        if not found:
            raise DemoError(f"the workflow saved no picture {prefix}")
        shutil.copy2(found[-1], out / name)
    summary = summarize(file, seconds)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def check(summary: dict[str, Any], out: Path) -> None:
    """Raise `DemoError` unless the run shows what the demo is there to show."""
    if (out / "base.png").read_bytes() == (out / "sample.png").read_bytes():
        raise DemoError("the LoRA changed nothing in the picture")
    if not summary["loss_last"] < CLEARLY_LESS * summary["loss_first"]:
        raise DemoError(
            f"the loss did not fall clearly ({summary['loss_first']} to {summary['loss_last']}); "
            "give it more --steps"
        )
    if summary["rank_min"] == summary["rank_max"]:
        raise DemoError("every component has the same rank; give it more --steps")


def run(runtime: Runtime, steps: int, out: Path) -> dict[str, Any]:
    """Boot ComfyUI, train, sample, and collect the results in `out`."""
    from server import Server

    workflow, train = load_workflow(steps)
    with tempfile.TemporaryDirectory(prefix="lora2-demo-") as folder:
        directory = Path(folder)
        print(f"Starting ComfyUI in {runtime.path} …", flush=True)
        try:
            with Server(runtime, directory) as server:
                print(f"Training {steps} steps on five photos of a cat, then painting …")
                started = time.monotonic()
                server.run(
                    workflow,
                    on_progress=ProgressLine(train, steps),
                    timeout=3600 + 10 * steps,
                )
                seconds = time.monotonic() - started
                return collect(server.output, out, seconds)
        finally:
            log = directory / "server.log"
            if log.is_file():
                shutil.copy2(log, out / "server.log")


def report(summary: dict[str, Any], out: Path) -> None:
    """Print what was reached, and what to do next."""
    print(
        f"""
Done in {summary["seconds"]:.0f} s: {summary["steps"]} steps, loss {summary["loss_first"]:.3f} → \
{summary["loss_last"]:.3f} on fixed noise.
{summary["components"]} components chose ranks {summary["rank_min"]} to {summary["rank_max"]} \
(mean {summary["rank_mean"]}); the file has {summary["bytes"] / 1e6:.2f} MB.

In {out}:
  {summary["file"]}  the LoRA, for any loader
  ranks.png     the loss curve and the rank of every component
  sample.png    painted with the LoRA; base.png: the same seed without it
  summary.json  these figures

The demo model is tiny and has never seen a picture, so its samples are noise. Next, train on
SDXL: copy this folder into custom_nodes of your ComfyUI and open the template "2 Train on SDXL"
(Workflow → Browse Templates → comfyui-lora2)."""
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a LoRA² in a real ComfyUI on photos of a cat, and paint with it."
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where results go")
    parser.add_argument("--comfyui", metavar="PATH", help="the folder of a ComfyUI to use")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be 1 or more.")
    return options


def main() -> int:
    """Run the demo; 0 only if everything it promises is there."""
    options = parse()
    try:
        runtime = ensure(options.comfyui)
    except SetupError as error:
        say(str(error))
        return error.code
    # From here on aiohttp is needed, which the ComfyUI's own Python has.
    if Path(sys.executable).absolute() != runtime.python.absolute():
        command = [str(runtime.python), os.path.abspath(__file__), *sys.argv[1:]]
        return subprocess.run(command, check=False).returncode
    from server import ServerError, WorkflowError, WorkflowInterrupted

    out = options.out.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        summary = run(runtime, options.steps, out)
        check(summary, out)
    except (DemoError, ServerError, WorkflowError, WorkflowInterrupted, OSError) as error:
        say(f"The demo failed: {error}. The server's log is {out / 'server.log'}.")
        return 1
    except KeyboardInterrupt:
        say("Stopped.")
        return 130
    report(summary, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
