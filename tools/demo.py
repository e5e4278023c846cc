#!/usr/bin/env python3
"""Train a LoRA² in a real ComfyUI on six photos of a robot, and paint it in four new places.

    python3 tools/demo.py [--steps N] [--out DIR] [--comfyui PATH]

Leaves the LoRA file, a picture of what it learnt, its ranks and a summary in DIR. Needs nothing
but Python 3.11 and, the first time, a package registry.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import demo_picture
from comfyui import ROOT, Runtime, ensure
from environment import SetupError, say

WORKFLOW = ROOT / "tests" / "workflows" / "train_and_sample.json"
PHOTOS = ROOT / "photos" / "robot"
# SaveImage nodes of the workflow by their file name prefix, and what we call their pictures.
BASE, SAMPLE = "lora2_base", "lora2_sample"
PICTURES = {BASE: "base.png", SAMPLE: "sample.png", "lora2_ranks": "ranks.png"}
# By a short name, in the words that the demo model learnt; on none of the photos. The first is
# the workflow's own.
PLACES = {
    "In the city": "with a city skyline in the background",
    "On the beach": "on a sandy beach at sunset",
    "In the water": "floating in crystal clear water",
    "In Paris": "with the Eiffel Tower in the background",
}
BAR_WIDTH = 30
CLEARLY_LESS = 0.95  # of the first loss, on fixed noise


class DemoError(Exception):
    """The demo ended without everything it promises; the message says what is missing."""


def load_workflow(steps: int | None = None) -> tuple[dict[str, Any], str]:
    """Return the train-and-sample workflow, with other `steps` if given, and its training node."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    train = next(i for i, node in workflow.items() if node["class_type"] == "LoRA2Train")
    if steps is not None:
        workflow[train]["inputs"]["steps"] = steps
    return workflow, train


def with_places(workflow: dict[str, Any], train: str) -> dict[str, Any]:
    """Return the workflow painting not in the first of `PLACES` alone but in all of them."""
    prompt = next(i for i, node in workflow.items() if node["inputs"].get("text"))
    branch = {prompt}
    for _ in workflow:  # all that hangs on the prompt
        branch |= {i for i, node in workflow.items() if branch & set(_sources(node))}
    longer = dict(workflow)
    for number, place in enumerate(list(PLACES.values())[1:], 2):
        for old in sorted(branch):
            node = copy.deepcopy(workflow[old])
            for name, value in node["inputs"].items():
                if isinstance(value, list) and value[0] in branch:
                    node["inputs"][name] = [f"{value[0]}-{number}", value[1]]
            if old == prompt:
                subject = workflow[train]["inputs"]["instance_prompt"]
                node["inputs"]["text"] = f"{subject} {place}"
            if "seed" in node["inputs"]:
                node["inputs"]["seed"] += number - 1  # else the robot strikes one pose everywhere
            if "filename_prefix" in node["inputs"]:
                node["inputs"]["filename_prefix"] += f"-{number}"
            longer[f"{old}-{number}"] = node
    return longer


def _sources(node: dict[str, Any]) -> list[str]:
    """Return the ids of the nodes that a node takes its inputs from."""
    return [value[0] for value in node["inputs"].values() if isinstance(value, list)]


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


def saved(output: Path, prefix: str) -> Path:
    """Return the picture that a SaveImage node of this prefix left in `output`."""
    found = sorted(output.glob(f"{prefix}_*.png"))
    if not found:
        raise DemoError(f"the workflow saved no picture {prefix}")
    return found[-1]


def draw(output: Path, path: Path, steps: int) -> None:
    """Draw the photos and what base and LoRA², whose pictures lie in `output`, made of them."""
    numbers = ["", *(f"-{number}" for number in range(2, len(PLACES) + 1))]
    photos = sorted(PHOTOS.glob("*.jpg"))
    base = [saved(output, BASE + number) for number in numbers]
    samples = [saved(output, SAMPLE + number) for number in numbers]
    asked = 'asked for "a sks robot" in four places; it knows robots, but no sks'
    rows = (
        demo_picture.Row("The photos", f"all that the LoRA² learns from, in {steps} steps", photos),
        demo_picture.Row("Base model", asked, base, tuple(PLACES)),
        demo_picture.Row("With the LoRA²", "the same words and the same noise", samples),
    )
    demo_picture.write(path, rows)


def collect(output: Path, out: Path, seconds: float) -> dict[str, Any]:
    """Copy what the run left in ComfyUI's `output` to `out`; return the summary."""
    files = sorted((output / "loras").rglob("*.safetensors"))
    if not files:
        raise DemoError("the training node wrote no LoRA file")
    file = Path(shutil.copy2(files[-1], out))
    for prefix, name in PICTURES.items():
        shutil.copy2(saved(output, prefix), out / name)
    summary = summarize(file, seconds)
    draw(output, out / "demo.png", summary["steps"])
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
    workflow = with_places(workflow, train)
    with tempfile.TemporaryDirectory(prefix="lora2-demo-") as folder:
        directory = Path(folder)
        print(f"Starting ComfyUI in {runtime.path} …", flush=True)
        try:
            with Server(runtime, directory) as server:
                print(f"Training {steps} steps on six photos of a robot, then painting it …")
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
  demo.png      the photos, and the robot in four other places: look at this first
  ranks.png     the loss curve and the rank of every component
  {summary["file"]}  the LoRA, for any loader
  sample.png    painted with the LoRA; base.png: the same seed without it
  summary.json  these figures

The demo model is tiny and paints only what its node in ComfyUI says. Next, train on SDXL: copy
this folder into custom_nodes of your ComfyUI and open the template "2 Train on SDXL" (Workflow →
Browse Templates → comfyui-lora2)."""
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a LoRA² in a real ComfyUI on photos of a robot, and paint with it."
    )
    workflow, train = load_workflow()
    steps = workflow[train]["inputs"]["steps"]
    parser.add_argument(
        "--steps", type=int, default=steps, help=f"training steps (default {steps})"
    )
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
