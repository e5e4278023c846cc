"""Runs that do harm: they stop, go back to the best state, and never end without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.train import (
    OptimizerConfig,
    TextConfig,
    TrainConfig,
    doubts_about_rates,
)
from lora2_pack.lora2_core.files import checkpoint
from lora2_pack.lora2_core.files.metadata import _first_and_last
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.training.trainer import TrainingError
from lora2_pack.tests.core import toy_job
from lora2_pack.tests.core.toy_job import at_draw, config, finish

NAME = "cat_00001_.safetensors"
BEFORE = 22.416  # loss on fixed noise of the toy before its first step


def settings(rate: float, **changes: Any) -> TrainConfig:
    plain = {"steps": 120, "probes": 25, "schedule": "constant", "optimizer": OptimizerConfig()}
    return config(learning_rate=rate, **{**plain, **changes})


def probes(job: TrainingJob) -> dict[int, float]:
    return {e.step: e.probe for e in job.progress.events if e.probe is not None}


def ruined(path: Path, wanted: TrainConfig) -> TrainingJob:
    job = toy_job.job(path, wanted)
    with pytest.raises(TrainingError, match=r"does harm.*: try 0\.001\."):
        finish(job)
    assert job.progress.state == "failed"
    return job


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("rate", [0.3, 0.5, 1.0])
def test_a_ruined_run_stops_early_and_keeps_its_best_state(
    tmp_path: Path, rate: float, schedule: str
):
    job = ruined(tmp_path / NAME, settings(rate, schedule=schedule))
    assert job.progress.step <= 30, "a quarter of the run tells enough"
    assert min(list(probes(job).values())[-2:]) > BEFORE
    below = {step: loss for step, loss in probes(job).items() if loss < BEFORE}
    if below:
        best = min(below, key=below.__getitem__)
        assert lora_file.load(tmp_path / NAME).metadata["ss_steps"] == str(best)
        assert f"the LoRA of step {best} was kept" in str(job.progress.error)
    else:
        assert not (tmp_path / NAME).exists(), "worse than nothing is not written"
        assert "no LoRA is written" in str(job.progress.error)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_best_state_survives_a_resume(tmp_path: Path):
    wanted = settings(0.3)
    whole = ruined(tmp_path / "whole" / NAME, wanted)
    first = toy_job.job(tmp_path / NAME, wanted)
    finish(at_draw(first, 3, first.stop))
    again = ruined(tmp_path / NAME, wanted)
    assert again.path.read_bytes() == whole.path.read_bytes()
    assert probes(again) == probes(whole)


def test_damage_in_the_last_step_is_seen(tmp_path: Path):
    wanted = settings(1e-3, steps=10, probes=1)
    job = toy_job.job(tmp_path / NAME, wanted)
    matrix = toy_job.task_of(job).matrix
    at_draw(job, 10, lambda: matrix.mul_(3))
    with pytest.raises(TrainingError, match="the LoRA of step 1 was kept"):
        finish(job)


def test_a_run_that_ends_above_its_start_says_so(tmp_path: Path):
    """Not clearly enough to end it: it is finished, but not without a word."""
    job = toy_job.job(tmp_path / NAME, settings(1e-6, steps=10))
    matrix = toy_job.task_of(job).matrix
    finish(at_draw(job, 8, lambda: matrix.mul_(1.1)))
    assert job.progress.state == "finished"
    assert "may do harm" in job.progress.message and "try 1e-07" in job.progress.message
    assert job.progress.message in job.progress.log


def test_a_good_run_ends_without_a_word(tmp_path: Path):
    job = finish(toy_job.job(tmp_path / NAME, settings(1e-2)))
    assert job.progress.message == ""
    measured = list(probes(job).values())
    assert measured[0] < BEFORE, "what was measured before the first step stays out"
    told = json.loads(lora_file.load(tmp_path / NAME).metadata["lora2.loss"])
    assert told["fixed_noise"] == _first_and_last(measured)


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path: Path):
    wanted = settings(1e-2, steps=30)
    whole = finish(toy_job.job(tmp_path / "whole" / NAME, wanted))
    first = toy_job.job(tmp_path / NAME, wanted)
    finish(at_draw(first, 9, first.stop))
    (file,) = (tmp_path / "checkpoints").iterdir()
    kept = checkpoint.read(file, first.run_hash)
    state = {**kept.state, "trainer": {**kept.state["trainer"]}}
    del state["trainer"]["probe_guard"]
    checkpoint.write(file, checkpoint.Checkpoint(kept.run, kept.step, kept.target, state))
    again = finish(toy_job.job(tmp_path / NAME, wanted))
    assert "Going on after step" in again.progress.message
    assert again.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize(
    ("optimizer", "rate", "text", "words"),
    [
        ("adamw", 1.0, 0.0, ["learning_rate is 1, and adamw", "optimizer prodigy"]),
        ("adamw8bit", 1e-4, 0.5, ["text_learning_rate is 0.5, and adamw8bit"]),
        ("prodigy", 1e-4, 0.0, ["leave it at 1"]),
        ("prodigy", 1.0, 1.0, []),
        ("adamw", 1e-2, 0.0, []),
    ],
)
def test_a_rate_of_another_optimizer_is_told_of_before_the_run(
    optimizer: Any, rate: float, text: float, words: list[str]
):
    wanted = settings(rate, optimizer=OptimizerConfig(optimizer), text=TextConfig(text))
    told = doubts_about_rates(wanted)
    assert len(told) == bool(words)
    assert all(word in told[0] for word in words)


def test_a_doubt_stands_in_the_log_of_the_run(tmp_path: Path):
    job = toy_job.job(tmp_path / NAME, settings(0.5))
    seen: list[str] = []
    at_draw(job, 1, lambda: seen.extend(job.progress.log))
    with pytest.raises(TrainingError):
        finish(job)
    assert any("adamw is likely to ruin" in line for line in seen), "before the first step"
