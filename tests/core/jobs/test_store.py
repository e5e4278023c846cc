"""What is known of trainings outlives the process, whatever happens to the files."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lora2_pack.lora2_core.jobs import store as job_store
from lora2_pack.lora2_core.jobs.queue import Entry, Origin, manifest
from lora2_pack.lora2_core.jobs.store import JobStore, Kept
from lora2_pack.tests.core import toy, toy_job
from lora2_pack.tests.core.toy_job import config, finish

PROMPT: dict[str, Any] = {"3": {"class_type": "LoRA2Train", "inputs": {"steps": 4, "ä": "²"}}}


def entry(folder: Path, steps: int = 4, **options: Any) -> Entry:
    job = toy_job.job(folder / "cat_00001_.safetensors", config(steps=steps), **options)
    return Entry(job, Origin("cat_00001_", "3", PROMPT, "base.safetensors"), background=True)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs")


def as_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on all that is there was written by a process that is gone."""
    monkeypatch.setattr(job_store, "_PROCESS", "another")


def rewrite(store: JobStore, id: str, **changes: Any) -> None:
    path = store.folder / f"{id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))


def test_a_training_is_kept_as_it_is(tmp_path: Path, store: JobStore):
    found = entry(tmp_path)
    store.put(partial(manifest, found))
    assert store.all() == [
        Kept(
            id=found.id,
            name="cat_00001_",
            node_id="3",
            created=found.created,
            state="queued",
            step=0,
            steps=4,
            prompt=PROMPT,
            file=None,
            error=None,
            background=True,
            base="base.safetensors",
            run=found.job.run_hash,
        )
    ]
    finish(found.job)
    store.put(partial(manifest, found))
    [kept] = store.all()
    assert (kept.state, kept.step, kept.file) == ("finished", 4, str(found.job.path))
    assert [path.name for path in store.folder.iterdir()] == [f"{found.id}.json"]


def test_nothing_is_there_at_first(store: JobStore):
    assert store.all() == []
    store.prune()
    assert not store.folder.exists(), "reading writes nothing"


@pytest.mark.parametrize("state", ["queued", "running", "paused", "finished", "failed", "stopped"])
def test_what_a_dead_process_left_is_interrupted(
    tmp_path: Path, store: JobStore, monkeypatch: pytest.MonkeyPatch, state: str
):
    found = entry(tmp_path)
    found.job.progress.state = state  # type: ignore[assignment]
    store.put(partial(manifest, found))
    assert store.all()[0].state == state, "this process is alive"
    as_another_process(monkeypatch)
    over = state in ("finished", "failed", "stopped")
    assert store.all()[0].state == (state if over else "interrupted")


def test_the_end_of_the_process_is_no_stop(tmp_path: Path, store: JobStore):
    found = entry(tmp_path)
    found.cut_off, found.job.progress.state = True, "stopped"
    store.put(partial(manifest, found))
    assert store.all()[0].state == "interrupted"
    found.job.progress.state = "finished"  # it was quicker than the end of the process
    store.put(partial(manifest, found))
    assert store.all()[0].state == "finished"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"id": "' + path.stem + '"}'),
        lambda path: path.write_text(path.read_text().replace('"step": 0', '"step": "0"')),
        lambda path: path.write_text(path.read_text().replace(path.stem, "a" * 22)),
    ],
)
def test_a_damaged_manifest_is_skipped_with_a_warning(
    tmp_path: Path, store: JobStore, caplog: pytest.LogCaptureFixture, damage: Any
):
    whole, broken = entry(tmp_path), entry(tmp_path)
    store.put(partial(manifest, whole))
    store.put(partial(manifest, broken))
    damage(store.folder / f"{broken.id}.json")
    (store.folder / "notes.txt").write_text("not ours")
    assert [kept.id for kept in store.all()] == [whole.id]
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert broken.id in record.getMessage() and "damaged" in record.getMessage()


def test_a_full_disk_is_told_once_and_ends_nothing(
    tmp_path: Path, store: JobStore, caplog: pytest.LogCaptureFixture
):
    found = entry(tmp_path)
    store.put(partial(manifest, found))
    caplog.clear()
    found.job.progress.step = 3
    with toy.file_size_limit(20):
        store.put(partial(manifest, found))
        store.put(partial(manifest, found))
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1 and "could not be written" in told[0]
    assert store.all()[0].step == 0, "the old one is whole"
    store.put(partial(manifest, found))
    assert store.all()[0].step == 3
    assert len(list(store.folder.iterdir())) == 1


def test_a_prompt_that_is_no_json_ends_nothing(
    tmp_path: Path, store: JobStore, caplog: pytest.LogCaptureFixture
):
    found = entry(tmp_path)
    found.origin = Origin("cat", prompt={"3": {"inputs": {"image": object()}}})
    store.put(partial(manifest, found))
    assert store.all() == []
    assert "JSON" in caplog.text


def test_the_newest_come_first_and_the_oldest_go(
    tmp_path: Path, store: JobStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job_store, "KEPT", 3)
    ids: dict[str, list[str]] = {"finished": [], "running": [], "interrupted": []}
    for number in range(5):
        for state, found in ids.items():
            made = entry(tmp_path)
            store.put(partial(manifest, made))
            rewrite(store, made.id, state=state, created=1000.0 + number)
            found.insert(0, made.id)
    store.prune()
    for state, found in ids.items():
        left = [kept.id for kept in store.all() if kept.state == state]
        assert left == (found if state == "running" else found[:3])
    created = [kept.created for kept in store.all()]
    assert created == sorted(created, reverse=True)


def test_a_training_that_goes_on_takes_the_place_of_the_interrupted_one(
    tmp_path: Path, store: JobStore, monkeypatch: pytest.MonkeyPatch
):
    first, other = entry(tmp_path), entry(tmp_path, steps=9)
    finished = entry(tmp_path)
    for found in (first, other, finished):
        store.put(partial(manifest, found))
    rewrite(store, finished.id, state="finished")
    as_another_process(monkeypatch)
    assert first.job.run_hash == finished.job.run_hash != other.job.run_hash
    store.supersede(first.job.run_hash)
    assert {kept.id for kept in store.all()} == {other.id, finished.id}


@pytest.mark.parametrize("id", ["../outside", "", "a/b", "x", "..", "A" * 65, "a.json"])
def test_no_id_leads_out_of_the_folder(tmp_path: Path, store: JobStore, id: str):
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    store.folder.mkdir()
    with pytest.raises(ValueError, match="not the id of a training"):
        store.remove(id)
    assert outside.is_file()


def test_removing_twice_is_fine(tmp_path: Path, store: JobStore):
    found = entry(tmp_path)
    store.put(partial(manifest, found))
    store.remove(found.id)
    store.remove(found.id)
    assert store.all() == []
