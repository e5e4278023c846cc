"""How quickly the REST interface answers while a training runs, and how much its events send.

``.venv/bin/python bench/api.py --json`` prints one JSON object. ComfyUI's own server and a training
of 560 components share one process, as they do in life; the run has 4,500 of its 5,000 steps
behind it (synthetic ones, from a checkpoint) and trains the rest. A second process is the page: it
asks for the list ten times a second, now and then for everything, and counts what the websocket
brings. Last, the training is held and synthetic steps rush in, 50 a second.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import runtime

STEPS, DONE, COMPONENTS = 5000, 4500, 560
EARLIER = 100  # trainings of earlier sessions in the list
PAUSE = 0.1  # seconds between two questions for the list
RUSH, RUSH_SECONDS = 50, 8.0  # synthetic steps a second, and for how long
LIMITS = {"list_p95_ms": 50.0, "messages_per_second": 4.0, "bytes_per_second": 20_000.0}
LIMITS |= {f"rush_{name}": limit for name, limit in LIMITS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure")
    parser.add_argument("--page", metavar="URL", help=argparse.SUPPRESS)  # the second process
    options = parser.parse_args()
    if options.page:
        print(json.dumps(asyncio.run(_page(options.page, options.seconds))))
        return
    found = report(options.seconds)
    print(json.dumps(found, indent=2) if options.json else _table(found))
    sys.exit(any(found[name] >= limit for name, limit in LIMITS.items()))


def report(seconds: float) -> dict[str, Any]:
    """What the page measured, and what the training did meanwhile."""
    runtime.enter()
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="lora2-bench-") as folder:
        _use_folders(Path(folder))
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(_measure(Path(folder), seconds))


def _use_folders(directory: Path) -> None:
    import folder_paths

    for name in ("input", "output", "temp", "user"):
        (directory / name).mkdir()
        getattr(folder_paths, f"set_{name}_directory")(str(directory / name))
    (directory / "output" / "loras").mkdir()
    folder_paths.add_model_folder_path("loras", str(directory / "output" / "loras"))


async def _measure(folder: Path, seconds: float) -> dict[str, Any]:
    from aiohttp import web
    from lora2_pack.lora2_core.jobs.queue import Origin
    from lora2_pack.nodes.background import job_queue
    from lora2_pack.nodes.screen import routes

    import server

    comfyui = server.PromptServer(asyncio.get_running_loop())
    queue = job_queue()
    routes.register(queue)
    comfyui.add_routes()
    runner = web.AppRunner(comfyui.app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    publishing = asyncio.create_task(comfyui.publish_loop())
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    _leave_earlier(folder / "user" / "lora2" / "jobs", folder / "output" / "loras")
    job = _job(folder / "output" / "loras" / "bench_00001_.safetensors")
    entry = queue.add(job, Origin("bench_00001_", "3", {"3": {}}))
    while job.progress.step <= DONE + 5:
        await asyncio.sleep(0.1)
    before, started = job.progress.step, time.perf_counter()
    calm = await _ask_page(url, seconds)
    steps, wall = job.progress.step - before, time.perf_counter() - started
    trained_throughout = entry.state == "running"
    queue.pause(entry.id)
    rush = await _rush(job, url)
    queue.stop(entry.id)
    await asyncio.to_thread(queue.wait, entry.id, 60)
    publishing.cancel()
    await runner.cleanup()
    about = {"components": COMPONENTS, "steps": STEPS, "listed": EARLIER + 1}
    training = {"trained_throughout": trained_throughout, "steps_per_second": steps / wall}
    rushed = {f"rush_{name}": rush[name] for name in rush if f"rush_{name}" in LIMITS}
    return {**about, **calm, **training, **rushed, "limits": LIMITS}


async def _ask_page(url: str, seconds: float) -> dict[str, Any]:
    """What the second process measures."""
    page = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--page", url, "--seconds", str(seconds),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await page.communicate()
    return json.loads(output)


async def _rush(job: Any, url: str) -> dict[str, Any]:
    """The same while synthetic steps, each with other ranks, come in as fast as none of SDXL do."""
    stop = threading.Event()
    more = _events(job.progress.events[-1].ranks)

    def tell() -> None:
        step = job.progress.step
        for event in itertools.cycle(more):
            if stop.wait(1 / RUSH):
                return
            step += 1
            job.progress.add(dataclasses.replace(event, step=step))
            job.watch()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    found = await _ask_page(url, RUSH_SECONDS)
    stop.set()
    teller.join()
    return found


# --- the training ---------------------------------------------------------------------------


def _job(path: Path) -> Any:
    """A real job on a toy of SDXL's structure, with a checkpoint from which it goes on."""
    import toy_sdxl
    from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
    from lora2_pack.lora2_core.adapters.targets import find_targets
    from lora2_pack.lora2_core.config.ranks import RankConfig
    from lora2_pack.lora2_core.config.train import KeepConfig, TrainConfig
    from lora2_pack.lora2_core.files import checkpoint
    from lora2_pack.lora2_core.files.checkpoint import Checkpoint
    from lora2_pack.lora2_core.jobs.job import TrainingJob
    from lora2_pack.lora2_core.jobs.log import pack_events
    from lora2_pack.lora2_core.training.setup import TrainingSetup
    from lora2_pack.lora2_core.training.trainer import Trainer

    model = toy_sdxl.Model()
    rank = RankConfig.balanced(target_rank=8.0, max_rank=16, freeze_fraction=0.0)
    keep = KeepConfig(checkpoint_steps=0, checkpoint_minutes=0)
    config = TrainConfig(steps=STEPS, precision="fp32", entropy_weight=0.0, rank=rank, keep=keep)
    targets = find_targets(model)
    assert len(targets) == COMPONENTS
    network, task = AdaptiveRankNetwork(model, targets, rank), toy_sdxl.Denoising(model)
    kept = path.parents[2] / "user" / "lora2" / "checkpoints"
    kept.mkdir(parents=True)
    setup = TrainingSetup(config, network, task, None, base_hash="bench")
    job = TrainingJob(setup, path, checkpoints=kept)
    state = Trainer(network, task, config).state() | {"step": DONE}
    events = pack_events(_events(network.ranks))
    whole = {"trainer": state, "events": events, "samples": {}, "checkpointing": False}
    file = kept / f"{job.run_hash}.safetensors"
    checkpoint.write(file, Checkpoint(job.run_hash, DONE, str(path), whole))
    return job


def _events(ranks: Sequence[int]) -> list[Any]:
    """Steps 1 to DONE as a training tells them: a noisy loss, ranks that always move a little."""
    import random

    from lora2_pack.lora2_core.training.trainer import StepEvent

    chance, now, events = random.Random(0), list(ranks), []
    for step in range(1, DONE + 1):
        for index in chance.sample(range(len(now)), 4):
            now[index] = min(16, max(1, now[index] + chance.choice((-1, 1))))
        loss = 0.1 + 0.2 * math.exp(-step / 800) + 0.05 * chance.random()
        mean = statistics.fmean(now)
        probe = loss if step % 200 == 0 else None
        events.append(
            StepEvent(step, STEPS, loss, 0.0, 0.0, 0.0, 1.0, mean, tuple(now), 4, 0.1, probe)
        )
    return events


def _leave_earlier(folder: Path, loras: Path) -> None:
    """What trainings of earlier sessions have left: a file, and a workflow of 20 nodes."""
    folder.mkdir(parents=True, exist_ok=True)
    prompt = {str(n): {"class_type": "A", "inputs": {"text": "x" * 200}} for n in range(20)}
    for number in range(EARLIER):
        id = f"earlier-training-{number:04}"
        file = loras / f"earlier_{number:05}_.safetensors"
        file.write_bytes(bytes(1000))
        kept = {
            "id": id, "name": f"earlier_{number:05}_", "node_id": "3", "created": 1e9 + number,
            "state": "finished", "step": 500, "steps": 500, "prompt": prompt, "file": str(file),
            "error": None, "background": True, "base": "", "run": str(number), "process": "x",
        }  # fmt: skip
        (folder / f"{id}.json").write_text(json.dumps(kept))


# --- the page -------------------------------------------------------------------------------


async def _page(url: str, seconds: float) -> dict[str, Any]:
    import aiohttp

    socket = url.replace("http", "ws", 1) + "/ws?clientId=bench"
    async with aiohttp.ClientSession() as session, session.ws_connect(socket) as channel:
        id = (await _timed(session, f"{url}/lora2/jobs"))[1]["jobs"][0]["id"]
        heard: list[tuple[float, int, int]] = []
        listening = asyncio.create_task(_listen(channel, heard))
        lists: list[float] = []
        details: list[float] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            lists.append((await _timed(session, f"{url}/lora2/jobs"))[0])
            if len(lists) % 20 == 10:
                details.append((await _timed(session, f"{url}/lora2/jobs/{id}"))[0])
            await asyncio.sleep(PAUSE)
        listening.cancel()
    sizes = [size for _, size, _ in heard]
    return {
        "seconds": seconds,
        "questions": len(lists),
        "list_p50_ms": _quantile(lists, 0.5),
        "list_p95_ms": _quantile(lists, 0.95),
        "list_max_ms": max(lists),
        "details_p95_ms": _quantile(details, 0.95),
        "messages_per_second": len(sizes) / seconds,
        "bytes_per_second": sum(sizes) / seconds,
        "largest_message_bytes": max(sizes, default=0),
        "points_told": sum(points for *_, points in heard),
    }


async def _timed(session: Any, url: str) -> tuple[float, Any]:
    started = time.perf_counter()
    async with session.get(url) as reply:
        text = await reply.read()
    milliseconds = 1e3 * (time.perf_counter() - started)
    return milliseconds, json.loads(text)


async def _listen(channel: Any, heard: list[tuple[float, int, int]]) -> None:
    async for message in channel:
        content = json.loads(message.data)
        if content["type"] == "lora2.progress":
            points = len(content["data"]["points"])
            heard.append((time.monotonic(), len(message.data), points))


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def _table(found: dict[str, Any]) -> str:
    lines = []
    for name, value in found.items():
        if name == "limits":
            continue
        limit = f"   below {LIMITS[name]:g}" if name in LIMITS else ""
        shown = f"{value:.1f}" if isinstance(value, float) else str(value)
        lines.append(f"  {name.replace('_', ' '):<26}{shown:>12}{limit}")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    runtime.rerun_in_environment()
    main()
