"""Trainings and files as a screen gets them: complete, in order, bounded, whatever they are at."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.jobs.queue import JobQueue, Origin, UnknownJob, WrongState
from lora2_pack.lora2_core.lora_file import ComponentInfo
from lora2_pack.nodes.screen import views
from lora2_pack.nodes.screen.trainings import JobList
from lora2_pack.nodes.screen.watch import COLUMNS, JobWatch, map_cells
from lora2_pack.tests.core import toy, toy_job
from lora2_pack.tests.core.shown import HOST, Held, a_queue, check
from PIL import Image
from safetensors.torch import save_file

FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    with a_queue(tmp_path) as found:
        yield found


# --- places ---------------------------------------------------------------------------------


def _info(key: str, rank: int = 4) -> ComponentInfo:
    return ComponentInfo(key, rank, 8, 8, 0.1, 64 * rank)


def test_rows_stand_in_the_order_of_the_network_and_columns_by_projection():
    keys = [
        f"lora_unet_{block}_transformer_blocks_{n}_attn{kind}_to_{row}"
        for block in ("output_blocks_0_1", "middle_block_1", "input_blocks_7_1", "input_blocks_4_1")
        for n in (1, 0)
        for kind in (2, 1)
        for row in ("out_0", "v", "q", "k")
    ]
    found = map_cells([_info(key) for key in keys])
    assert sorted(place.key for place in found) == sorted(keys)
    assert [place.column for place in found] == list(COLUMNS) * 8
    assert list(dict.fromkeys(place.row for place in found)) == [
        f"{name} · {n}" for name in ("down 4.1", "down 7.1", "mid", "up 0.1") for n in (0, 1)
    ]
    assert found[0].label == "down 4.1 · 0 · attn1.q"


def test_what_is_no_attention_stands_below_by_kind():
    keys = [
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_2",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ]
    found = [(p.row, p.column) for p in map_cells([_info(key) for key in keys])]
    assert found == [
        ("down 4.1 · 0", "attn1.q"),
        ("Text encoder 1", "0"),
        ("Feed-forward", "0"),
        ("Feed-forward", "1"),
    ]


# --- one training, from queued to over --------------------------------------------------------


def test_a_look_stays_as_it_was_when_the_training_goes_on(queue: JobQueue, tmp_path: Path):
    """It may come to its end while it is told of; between two reads of it: test_events.py."""
    held = Held(tmp_path, draw=13)
    entry = queue.add(held.job, Origin("cat_00001_", "12"))
    assert held.there.wait(60)
    look = JobWatch(held.job).look()
    held.go.set()
    assert entry.over.wait(60)
    shown = views.summary(entry, look, None, HOST)
    assert shown["step"] < shown["steps"] and shown["state"] == "running"
    shown = views.summary(entry, JobWatch(held.job).look(), None, HOST)
    assert shown["step"] == shown["steps"] and shown["state"] == "finished"


def test_a_training_can_be_shown_at_every_point(queue: JobQueue, tmp_path: Path):
    held = Held(tmp_path / "a", draw=13, samples=toy_job.prompts("a cat", "", every=4))
    jobs = JobList(queue, HOST)
    first = queue.add(held.job, Origin("cat_00001_", "12", {"12": {}}, "toy"))
    second = queue.add(
        toy_job.job(tmp_path / "b" / "dog_00001_.safetensors", toy_job.config()), Origin("dog", "3")
    )
    assert held.there.wait(60)

    running, queued = check({"jobs": jobs.summaries(), "checkpoints": jobs.checkpoints()}, "jobs")[
        "jobs"
    ][::-1]
    assert (running["id"], running["node_id"], running["state"]) == (first.id, "12", "running")
    assert 0 < running["step"] < 24 and running["seconds_left"] > 0 and running["loss"] > 0
    assert (queued["state"], queued["position"], queued["step"]) == ("queued", 1, 0)
    assert queued["loss"] is None and queued["seconds_left"] is None and queued["bytes"] > 0

    shown = check(jobs.details(first.id), "job")
    components = shown["components"]
    assert len(components) == 16 and all(c["rank"] <= c["max_rank"] <= 8 for c in components)
    assert all(c["nu"] > 0 for c in components)
    assert [s["step"] for s in shown["samples"]] == [4] and shown["log"]
    assert len(shown["samples"][0]["urls"]) == 2
    assert check(jobs.details(second.id), "job")["history"]["steps"] == []

    held.go.set()
    assert queue.wait(first.id, 60) and queue.wait(second.id, 60)
    after = check(jobs.details(first.id), "job")
    assert (after["state"], after["step"], after["file"]) == (
        "finished", 24, "cat_00001_.safetensors",
    )  # fmt: skip
    assert after["bytes"] == held.job.path.stat().st_size
    saved = {c.key: c for c in lora_file.inspect(held.job.path)[0]}
    assert [c["module"] for c in after["components"]] == [c["module"] for c in components]
    for component in after["components"]:
        info = saved[component["module"]]
        assert (component["rank"], component["bytes"]) == (info.rank, info.nbytes)
        assert component["nu"] == pytest.approx(info.nu, rel=1e-4)
    assert after["history"]["steps"] == list(range(1, 25))
    assert after["history"]["probe_steps"] and after["seconds_left"] is None


def test_pictures(queue: JobQueue, tmp_path: Path):
    job = toy_job.job(
        tmp_path / "cat.safetensors", toy_job.config(samples=toy_job.prompts("a", "b"))
    )
    jobs = JobList(queue, HOST)
    entry = queue.add(job, Origin("cat"))
    assert queue.wait(entry.id, 60)
    found = check(jobs.details(entry.id), "job")["samples"]
    assert [sample["step"] for sample in found] == [8, 16, 24]
    assert found[0]["urls"][1] == f"/lora2/jobs/{entry.id}/samples/8/1"
    for sample in found:
        picture = Image.open(io.BytesIO(jobs.sample(entry.id, sample["step"], 1)))
        assert (picture.format, picture.size) == ("PNG", (64, 64))
    for step, n in ((9, 0), (8, 2), (8, -1), (0, 0)):
        with pytest.raises(UnknownJob, match="picture"):
            jobs.sample(entry.id, step, n)
    report = jobs.report(entry.id)
    assert Image.open(io.BytesIO(report)).size[0] == 1280
    assert jobs.report(entry.id) is report


def test_the_estimate_of_the_size_comes_near_the_file(queue: JobQueue, tmp_path: Path):
    job = toy_job.job(tmp_path / "cat.safetensors", toy_job.config())
    watch = JobWatch(job)
    watch.look()
    entry = queue.add(job, Origin("cat"))
    assert queue.wait(entry.id, 60)
    watch.look()
    assert watch._glance.nbytes == pytest.approx(job.path.stat().st_size, abs=6000)


def test_a_size_as_target(queue: JobQueue, tmp_path: Path):
    rank = toy_job.RankConfig.balanced(target_megabytes=0.018, max_rank=8)
    job = toy_job.job(tmp_path / "cat.safetensors", toy_job.config(rank=rank))
    jobs = JobList(queue, HOST)
    entry = queue.add(job, Origin("cat"))
    early = jobs.summary(entry.id)
    assert early["target_bytes"] == 18_000 and early["target_rank"] is None
    assert queue.wait(entry.id, 60)
    late = check(jobs.summary(entry.id), "summary")
    assert late["bytes"] == job.path.stat().st_size <= 18_000


def test_a_failure_is_told(queue: JobQueue, tmp_path: Path):
    job = toy_job.job(tmp_path / "cat.safetensors", toy_job.config())

    def fail() -> None:
        raise RuntimeError("the roof fell in " + "x" * 5000)

    toy_job.at_draw(job, 1, fail)
    jobs = JobList(queue, HOST)
    entry = queue.add(job, Origin("cat"))
    assert queue.wait(entry.id, 60)
    found = check(jobs.details(entry.id), "job")
    assert found["state"] == "failed" and found["error"].startswith("the roof fell in")
    assert len(found["error"]) <= 2000 and found["file"] is None
    with pytest.raises(UnknownJob, match="no file"):
        jobs.report(entry.id)


def test_a_long_run_is_shown_in_2000_points(tmp_path: Path):
    job = toy_job.job(tmp_path / "cat.safetensors", toy_job.config(steps=30_000))
    event = _event(job, 1)
    job.progress.events = [
        _replaced(event, step=n, loss=99.0 if n == 777 else 1 + n / 1e5) for n in range(1, 25_001)
    ]
    watch = JobWatch(job)
    found = check(views.history(watch.look(after=0).curves), "history")
    assert 1900 < len(found["steps"]) <= 2000
    assert found["steps"][0] == 1 and found["steps"][-1] == 25_000
    assert found["loss"][found["steps"].index(777)] == 99.0
    started = time.perf_counter()
    watch.look()
    assert time.perf_counter() - started < 0.05  # nothing is read twice


def test_a_run_that_is_over_and_forgot_most_steps_is_read_on(tmp_path: Path):
    job = toy_job.job(tmp_path / "cat.safetensors", toy_job.config(steps=9000))
    event = _event(job, 1)
    job.progress.events = [_replaced(event, step=n, loss=float(n)) for n in range(1, 5001)]
    watch = JobWatch(job)
    watch.look()
    job.progress.events += [_replaced(event, step=n, loss=float(n)) for n in range(5001, 9001)]
    job.progress.step, job.progress.state = 9000, "finished"
    job.progress.slim()
    glance = watch.look().glance
    assert (glance.step, glance.loss) == (9000, 9000.0)
    assert len(glance.ranks) == 16
    steps = list(watch.look(after=0).curves.steps)
    assert steps == sorted(set(steps)) and steps[-1] == 9000 and len(steps) <= 2000


def _event(job: Any, step: int) -> Any:
    from lora2_pack.lora2_core.training.trainer import StepEvent

    ranks = tuple(toy_job.setup_of(job).network.ranks)
    return StepEvent(step, 9, 1.0, 0.0, 0.0, 0.0, 1.0, 3.0, ranks, 0, 0.01, None)


def _replaced(event: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(event, **changes)


# --- trainings of earlier sessions -------------------------------------------------------------


def _earlier(folder: Path, id: str, **changes: Any) -> None:
    """A manifest as another process has left it."""
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "id": id, "name": "old", "node_id": "7", "created": 5.0, "state": "running", "step": 3,
        "steps": 9, "prompt": {"7": {"class_type": "LoRA2Train"}}, "file": None, "error": None,
        "background": True, "base": "", "run": "r", "process": "another",
    }  # fmt: skip
    (folder / f"{id}.json").write_text(json.dumps({**values, **changes}))


def test_trainings_of_earlier_sessions(queue: JobQueue, tmp_path: Path):
    job = toy_job.finish(toy_job.job(tmp_path / "old.safetensors", toy_job.config()))
    _earlier(tmp_path / "jobs", "interrupted1")
    _earlier(tmp_path / "jobs", "without-prompt", prompt=None, created=4.0)
    _earlier(
        tmp_path / "jobs", "finished1", state="finished", file=str(job.path), step=9, created=3.0
    )
    _earlier(tmp_path / "jobs", "moved-away", state="finished", file="/no/where", created=2.0)
    jobs = JobList(queue, HOST)
    found = check({"jobs": jobs.summaries(), "checkpoints": jobs.checkpoints()}, "jobs")["jobs"]
    assert [(j["id"], j["state"], j["resumable"], j["file"]) for j in found] == [
        ("interrupted1", "interrupted", True, None),
        ("without-prompt", "interrupted", False, None),
        ("finished1", "finished", False, "old.safetensors"),
        ("moved-away", "finished", False, None),
    ]
    for one in found:
        check(jobs.details(one["id"]), "job")
    assert len(jobs.details("finished1")["components"]) == 16
    assert Image.open(io.BytesIO(jobs.report("finished1"))).format == "PNG"
    for gone in ("moved-away", "interrupted1"):
        with pytest.raises(UnknownJob):
            jobs.report(gone)
    assert jobs.act("interrupted1", "resume") is None
    assert jobs.prompt("interrupted1") == {"7": {"class_type": "LoRA2Train"}}
    with pytest.raises(WrongState, match="workflow"):
        jobs.prompt("without-prompt")
    for what in ("pause", "cancel"):
        with pytest.raises(WrongState):
            jobs.act("interrupted1", what)
    with pytest.raises(WrongState):
        jobs.act("finished1", "resume")


def test_a_resumed_training_takes_the_place_of_the_interrupted_one(queue: JobQueue, tmp_path: Path):
    jobs = JobList(queue, HOST)
    job = toy_job.job(tmp_path / "cat.safetensors", toy_job.config())
    _earlier(tmp_path / "jobs", "interrupted1", run=job.run_hash)
    assert [found["id"] for found in jobs.summaries()] == ["interrupted1"]
    entry = queue.add(job, Origin("cat"))
    assert [found["id"] for found in jobs.summaries()] == [entry.id]
    assert queue.wait(entry.id, 60)


# --- files ------------------------------------------------------------------------------------


def _save(path: Path, metadata: dict[str, str]) -> None:
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    state = {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.ones(6, 2)}
    lora_file.write_atomically(path, lora_file.encode(state, metadata))


def test_a_file_of_others(tmp_path: Path):
    picture = toy.thumbnail()
    path = tmp_path / "of others.safetensors"
    _save(
        path,
        {
            "ss_dataset_dirs": '{"/home/ada/photos": 5}',
            "ss_network_dim": "2",
            "ss_output_name": "C:\\Users\\ada\\my cats\\cat",
            "modelspec.trigger_phrase": "sks cat",
            "modelspec.thumbnail": picture,
            "modelspec.title": "t" * 5000,
            "ss_sd_model_name": "/home/ada/base.safetensors",
        },
    )
    found = check(views.inspected("x/of others.safetensors", path), "file")
    assert found["name"] == "x/of others.safetensors" and found["trigger"] == "sks cat"
    assert found["bytes"] == path.stat().st_size and found["mean_rank"] == 2
    assert found["metadata"].keys() == {
        "ss_network_dim", "ss_output_name", "modelspec.trigger_phrase", "modelspec.title",
    }  # fmt: skip
    assert found["metadata"]["ss_output_name"] == "cat"
    assert len(found["metadata"]["modelspec.title"]) <= 500
    assert found["thumbnail"] == picture
    assert found["base"] == "an unknown model" and found["kinds"] == {"lora": 1}
    assert found["hashes"].keys() == {"sshs_model_hash", "sshs_legacy_hash"}
    assert "/home" not in json.dumps(found)
    (component,) = found["components"]
    assert (component["rank"], component["nu"], component["max_rank"]) == (2, None, None)


def test_a_file_of_other_kinds(tmp_path: Path):
    """None of it is called left out: what has no rank says its kind, what is beside it its name."""
    path = tmp_path / "x.safetensors"
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    lokr = {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(3, 4)}
    word = {"bundle_emb.sks cat.clip_l": torch.ones(2, 64), "bundle_emb./home/ada/x": torch.ones(3)}
    save_file(lokr | word, path)
    found = check(views.inspected("x", path), "file")
    assert found["mean_rank"] is None and found["kinds"] == {"lokr": 1}
    (component,) = found["components"]
    assert (component["rank"], component["kind"], component["bytes"]) == (0, "lokr", 64)
    # Factors and a bias of one layer, as ComfyUI trains them, are two cells.
    for name in (key, "lora_unet_time_embed_0"):
        pair = {
            f"{name}.lora_down.weight": torch.ones(2, 8),
            f"{name}.lora_up.weight": torch.ones(8, 2),
        }
        save_file(pair | {f"{name}.diff_b": torch.ones(8)}, path)
        both = check(views.inspected("x", path), "file")["components"]
        assert [(one["rank"], one["bytes"], one.get("kind")) for one in both] == [
            (2, 128, None), (0, 32, "difference"),
        ]  # fmt: skip
    assert found["beside"] == [
        {"kind": "embedding", "name": "x", "tensors": 1, "bytes": 12},
        {"kind": "embedding", "name": "sks cat", "tensors": 1, "bytes": 512},
    ]


@pytest.mark.parametrize(
    "picture",
    [
        "data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIj4=",
        "https://example.com/tracker.png",
        "javascript:alert(1)",
        "data:image/png;base64," + "A" * 2_000_000,
        "data:image/png;base64," + "iVBORw0KGgo" * 4,  # begins as one
    ],
)
def test_only_pictures_are_thumbnails(tmp_path: Path, picture: str):
    path = tmp_path / "x.safetensors"
    _save(path, {"modelspec.thumbnail": picture})
    assert views.inspected("x", path)["thumbnail"] is None
