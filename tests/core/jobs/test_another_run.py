"""A run that starts anew beside an unfinished one of the same name says so, and why."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import DataConfig, KeepConfig, TrainConfig
from lora2_pack.lora2_core.files import checkpoint
from lora2_pack.lora2_core.jobs.differences import differences, made_of
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.jobs.keeper import run_hash
from lora2_pack.tests.core import toy_job
from lora2_pack.tests.core.toy_job import at_draw, config, finish

NAME = "cat_00001_.safetensors"
PARTS = {"photos": "p", "masks": "m", "repeats": "r", "class images": "c"}
PARTS |= {"text and VAE": "t", "sampling": "s"}
OTHER = {
    "photos": "other photos",
    "masks": "other masks",
    "repeats": "other repeats of photos",
    "class images": "other class images",
    "text and VAE": "another CLIP or VAE",
    "sampling": "another sampling of the model",
}


def left(path: Path, wanted: TrainConfig | None = None, **options: Any) -> TrainingJob:
    """A training stopped after two of its steps."""
    job = toy_job.job(path, wanted or config(steps=4), data_parts=PARTS, **options)
    finish(at_draw(job, 3, job.stop))
    assert job.progress.step == 2
    return job


def beside(path: Path, wanted: TrainConfig, **options: Any) -> str:
    """What a job of no step says; it leaves nothing."""
    job = toy_job.job(path, wanted, **{"data_parts": PARTS, **options})
    job.stop()
    finish(job)
    assert job.progress.step == 0
    return next((line for line in job.progress.log if "starts anew" in line), "")


def test_the_sentence_names_what_changed_and_the_old_run_goes_on(tmp_path: Path, caplog: Any):
    path = tmp_path / NAME
    first = left(path)
    kept = tmp_path / "checkpoints" / f"{first.run_hash}.safetensors"
    before = kept.read_bytes()
    wanted = config(steps=6, learning_rate=2e-2, data=DataConfig(flip=True, trigger="sks"))
    second = toy_job.job(tmp_path / "cat_00002_.safetensors", wanted, data_parts=PARTS)
    caplog.set_level(logging.INFO)
    finish(second)
    told = (
        "This starts anew: cat_00001_ lies unfinished after step 2 of 4, but this is another run "
        "(steps 4 → 6, learning_rate 0.01 → 0.02, flip off → on, and 1 more). The checkpoint of "
        "the unfinished one stays: queued as it was, it goes on."
    )
    assert second.progress.log[0] == told and f"LoRA²: {told}" in caplog.messages
    assert second.progress.message == told, "whoever waits for the training sees it"
    assert kept.read_bytes() == before
    third = finish(toy_job.job(path, config(steps=4), data_parts=PARTS))
    assert "Going on after step 2 of 4" in third.progress.log[0]


def test_what_does_not_decide_a_run_is_not_named(tmp_path: Path):
    left(tmp_path / NAME)
    keep = KeepConfig(checkpoint_steps=1)
    samples = toy_job.prompts("a cat", every=100)
    told = beside(tmp_path / NAME, config(steps=5, keep=keep, samples=samples))
    assert "(steps 4 → 5)" in told
    same = toy_job.job(tmp_path / NAME, config(steps=4, keep=keep), data_parts=PARTS)
    assert not any("starts anew" in line for line in finish(same).progress.log)


@pytest.mark.parametrize("part", PARTS)
def test_other_data_is_named(tmp_path: Path, part: str):
    left(tmp_path / NAME)
    changed = {**PARTS, part: "x"}
    told = beside(tmp_path / NAME, config(steps=4), data_parts=changed, data_hash="x")
    assert f"({OTHER[part]})" in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"captions": ("a cat", "a wolf"), "data_hash": "x"}, "(other captions)"),
        ({"base_hash": "x"}, "(another base model)"),
        ({"data_hash": "x"}, "(other photos)"),  # in pixels that no sample holds
    ],
)
def test_other_inputs_are_named(tmp_path: Path, changes: dict[str, Any], words: str):
    left(tmp_path / NAME)
    told = beside(tmp_path / NAME, config(steps=4), **changes)
    assert words in told
    assert "wolf" not in told


def test_of_an_earlier_version_nothing_is_named(tmp_path: Path):
    first = left(tmp_path / NAME)
    path = tmp_path / "checkpoints" / f"{first.run_hash}.safetensors"
    kept = checkpoint.read(path, first.run_hash)
    checkpoint.write(path, dataclasses.replace(kept, made_of={}))
    told = beside(tmp_path / NAME, config(steps=5))
    assert (
        "after step 2, but this is another run (its settings, photos or model differ, and" in told
    )


def test_silence(tmp_path: Path):
    """About names of others, where nothing lies, where resume is off, and what is no checkpoint."""
    path = tmp_path / NAME
    assert not beside(path, config(steps=4)), "nothing is there"
    left(tmp_path / "dog_00001_.safetensors", config(steps=5))
    left(tmp_path / "folder" / NAME, config(steps=5))
    folder = tmp_path / "checkpoints"
    for file in (tmp_path / "folder" / "checkpoints").iterdir():
        file.rename(folder / file.name)
    (folder / f"{'0' * 64}.safetensors").write_bytes(b"nothing of the kind")
    assert not beside(path, config(steps=6)), "another name, another folder"
    left(path, config(steps=8))
    anew = config(steps=9, keep=KeepConfig(resume=False))
    assert not beside(path, anew), "to start anew was what was asked for"


def test_the_newest_is_told(tmp_path: Path):
    path = tmp_path / NAME
    for steps in (4, 5, 7):
        job = left(path, config(steps=steps))
        os.utime(tmp_path / "checkpoints" / f"{job.run_hash}.safetensors", (steps, steps))
    assert "(steps 7 → 6)" in beside(path, config(steps=6))


def test_captions_are_kept_as_a_digest(tmp_path: Path):
    captions = ("a very private cat", "a very private dog")
    first = left(tmp_path / NAME, captions=captions)
    data = (tmp_path / "checkpoints" / f"{first.run_hash}.safetensors").read_bytes()
    assert b"private" not in data
    label = checkpoint.read_label(tmp_path / "checkpoints" / f"{first.run_hash}.safetensors")
    assert (label.run, label.step, label.name) == (first.run_hash, 2, "cat_00001_")
    assert len(json.dumps(label.made_of)) < 4000


CHANGES: dict[str, tuple[Any, str]] = {
    "steps": (5, "steps 4 → 5"),
    "schedule": ("constant", "schedule cosine → constant"),
    "precision": ("bf16", "precision fp32 → bf16"),
    "frozen_weights": ("fp8", "frozen_weights as precision → fp8"),
    "targets": ("x" * 100, f"targets attention → {'x' * 39}…"),
    "rank": (
        RankConfig.balanced(target_rank=2.5, max_rank=8, rank_learning_rate=0.1),
        "target_rank 3 → 2.5",
    ),
    "data": (DataConfig(trigger="a\u202eb"), "trigger none → a?b"),
}


@given(chosen=st.sets(st.sampled_from(sorted(CHANGES))), base=st.booleans(), data=st.booleans())
def test_exactly_what_differs_is_named(chosen: set[str], base: bool, data: bool):
    before = _made(config(steps=4))
    changes = {name: CHANGES[name][0] for name in chosen}
    now = _made(config(steps=4, **{k: v for k, v in changes.items() if k != "steps"}), "c")
    now["settings"]["steps"] = changes.get("steps", 4)
    now |= {"base": "x"} if base else {}
    now |= {"data": "x", "photos": "x"} if data else {}
    wanted = {CHANGES[name][1] for name in chosen}
    if base and "precision" not in chosen:  # its weights in another precision are other numbers
        wanted.add("another base model")
    wanted |= {"other photos"} if data else set()
    found = differences(before, now)
    assert set(found) == wanted and len(found) == len(wanted)


def test_a_setting_of_later_is_named_both_ways_and_changes_no_run_without_it():
    plain, eight = (_made(config(steps=4, **kept)) for kept in ({}, {"frozen_weights": "fp8"}))
    assert "frozen_weights" not in plain["settings"]
    assert differences(eight, plain) == ["frozen_weights fp8 → as precision"]
    runs = [TrainConfig(), TrainConfig(frozen_weights="fp8")]
    hashes = [run_hash(one, ["a photo of sks cat"], "base", "data") for one in runs]
    # As it was before there was this setting: checkpoints of then go on.
    assert hashes[0] == "b3248fc665fcf91bfd727c0f9e533fd1389f9fc61ec28b45bf263c5356f5f85e"
    assert hashes[1] != hashes[0]


def _made(settings: TrainConfig, caption: str = "c") -> dict[str, Any]:
    class Setup:
        config, captions, data_parts = settings, (caption,), PARTS
        base_hash, data_hash = "b", "d"

    return made_of(Setup())  # type: ignore[arg-type]
