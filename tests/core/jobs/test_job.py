"""A job that is stopped, fails or runs out of memory, and what it leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import KeepConfig, OptimizerConfig, TrainConfig
from lora2_pack.lora2_core.files import checkpoint
from lora2_pack.lora2_core.jobs import shutdown
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.jobs.log import pack_events, unpack_events
from lora2_pack.lora2_core.training.out_of_memory import OutOfMemory
from lora2_pack.lora2_core.training.trainer import StepEvent, TrainingError
from lora2_pack.tests.core import toy, toy_job
from lora2_pack.tests.core.toy_job import at_draw, config, finish

OPTIMIZERS = {
    "adamw": OptimizerConfig(weight_decay=0.01, ema=0.9, accumulation=2, clip_norm=1.0),
    "adamw8bit": OptimizerConfig("adamw8bit", ema=0.9, accumulation=2),
    "prodigy": OptimizerConfig("prodigy", ema=0.9, accumulation=2),
}
NAME = "cat_00001_.safetensors"


def settings(name: str = "adamw", **changes: Any) -> TrainConfig:
    rate = {"learning_rate": 1.0} if name == "prodigy" else {}
    return config(optimizer=OPTIMIZERS[name], **{**rate, **changes})


Whole = Callable[[TrainConfig], TrainingJob]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run without any accident, in a folder of its own; each of these settings trains once."""

    @cache
    def run(wanted: TrainConfig) -> TrainingJob:
        return finish(toy_job.job(tmp_path_factory.mktemp("whole") / NAME, wanted))

    return run


def stopped(path: Path, wanted: TrainConfig, draw: int, **options: Any) -> TrainingJob:
    job = toy_job.job(path, wanted, **options)
    finish(at_draw(job, draw, job.stop))
    assert job.progress.state == "stopped"
    assert 0 < job.progress.step < wanted.steps
    return job


def checkpoints(path: Path) -> list[Path]:
    return sorted((path.parent / "checkpoints").glob("*"))


def _raise(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def timeless(events: Sequence[StepEvent]) -> list[StepEvent]:
    """``events`` without what the clock said."""
    return [dataclasses.replace(event, seconds=0) for event in events]


def check_same_end(first: TrainingJob, second: TrainingJob) -> None:
    """The same file, the same steps and the same curves; only the clock may differ."""
    assert first.path.read_bytes() == second.path.read_bytes()
    assert timeless(first.progress.events) == timeless(second.progress.events)
    assert first.result is not None and second.result is not None
    assert timeless(first.result.events) == timeless(second.result.events)
    assert first.result.config.rank == second.result.config.rank
    assert first.result.components == second.result.components


def exploding(path: Path, wanted: TrainConfig, draw: int, factor: float) -> TrainingJob:
    """From that draw on the target is ``factor`` times as far away."""
    job = toy_job.job(path, wanted)
    matrix = toy_job.task_of(job).matrix
    return at_draw(job, draw, lambda: matrix.mul_(factor))


# --- going on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stopped_run_ends_as_if_it_had_not_stopped(tmp_path: Path, whole: Whole, name: str):
    wanted = settings(name)
    reference = whole(wanted)
    assert len({event.ranks for event in reference.progress.events}) > 1, "no rank moved"
    path = tmp_path / NAME
    for draw in (9, 14):  # of two a step: the second stop meets a resumed run
        job = stopped(path, wanted, draw)
        assert lora_file.load(path).state, "an early end leaves a usable LoRA"
        assert [file.name for file in checkpoints(path)] == [f"{job.run_hash}.safetensors"]
    resumed = finish(toy_job.job(path, wanted))
    assert resumed.progress.state == "finished"
    assert "Going on after step" in resumed.progress.message
    check_same_end(resumed, reference)
    assert not checkpoints(path), "a finished run needs no checkpoint"


def test_many_moments_fit_into_eight_bits(tmp_path: Path):
    """The toy's own tensors are too small for 8-bit states; these are not."""
    wanted = settings("adamw8bit", rank=RankConfig.fixed(target_rank=8.0), steps=8)

    def job(path: Path) -> TrainingJob:
        made = toy_job.job(path, wanted, width=512)
        assert max(weight.numel() for weight in toy_job.setup_of(made).network.weights()) >= 4096
        return made

    reference = finish(job(tmp_path / "whole" / NAME))
    path = tmp_path / NAME
    first = job(path)
    finish(at_draw(first, 7, first.stop))
    kept = checkpoint.read(checkpoints(path)[0], first.run_hash)
    components = kept.state["trainer"]["optimizer"]["components"]
    assert any(state["state1"].dtype == torch.uint8 for state in components.values())
    check_same_end(finish(job(path)), reference)


def test_an_error_leaves_a_lora_and_a_checkpoint(tmp_path: Path, whole: Whole):
    wanted = settings()
    reference = whole(wanted)
    path = tmp_path / NAME
    job = at_draw(toy_job.job(path, wanted), 12, _raise(ValueError("the dog ate it")))
    with pytest.raises(ValueError, match="the dog ate it"):
        finish(job)
    assert job.progress.state == "failed"
    # Draw 12 is the second of step 6: its first batch must not count.
    assert job.progress.step == 5
    assert lora_file.load(path).metadata["ss_steps"] == "5"
    check_same_end(finish(toy_job.job(path, wanted)), reference)


def test_a_process_that_ends_stops_its_runs_first(tmp_path: Path):
    """By signals in a process of its own: test_kill.py."""
    wanted = settings(steps=5000, keep=KeepConfig(checkpoint_steps=0, checkpoint_minutes=0))
    path = tmp_path / NAME
    job = toy_job.job(path, wanted)
    job.start()
    while job.progress.step < 3:
        assert not job.wait(0.01)
    assert not checkpoints(path), "both intervals are off"
    assert shutdown.stop_all(20)
    assert job.progress.state == "stopped"
    assert lora_file.load(path).metadata["ss_steps"] == str(job.progress.step)
    assert checkpoints(path)
    assert shutdown.stop_all(0), "a job that is over is waited for"


# --- the run's own name -------------------------------------------------------------------------


def test_a_resumed_run_replaces_its_own_unfinished_file(tmp_path: Path, whole: Whole):
    """The node names the next free number, since the stopped run left a LoRA behind."""
    wanted = settings()
    stopped(tmp_path / NAME, wanted, 9)
    resumed = finish(toy_job.job(tmp_path / "cat_00002_.safetensors", wanted))
    assert resumed.path == tmp_path / NAME
    assert resumed.result is not None and resumed.result.path == resumed.path
    assert [file.name for file in tmp_path.glob("*.safetensors")] == [NAME]
    check_same_end(resumed, whole(wanted))


@pytest.mark.parametrize("other", ["another run", "no LoRA"])
def test_a_file_that_is_not_its_own_is_never_replaced(tmp_path: Path, other: str):
    wanted = settings()
    stopped(tmp_path / NAME, wanted, 9)
    if other == "another run":
        foreign = finish(toy_job.job(tmp_path / "other" / NAME, settings(seed=77, steps=3)))
        data = foreign.path.read_bytes()
    else:
        data = b"a photo of the cat"
    (tmp_path / NAME).write_bytes(data)
    second = tmp_path / "cat_00002_.safetensors"
    resumed = finish(toy_job.job(second, wanted))
    assert resumed.progress.events[-1].step == wanted.steps
    assert resumed.path == second and second.is_file()
    assert (tmp_path / NAME).read_bytes() == data


def test_another_name_goes_on_but_leaves_the_first_file(tmp_path: Path):
    wanted = settings()
    first = stopped(tmp_path / NAME, wanted, 9)
    data = first.path.read_bytes()
    other = finish(toy_job.job(tmp_path / "dog_00001_.safetensors", wanted))
    assert "Going on after step" in other.progress.message
    assert other.path.name == "dog_00001_.safetensors"
    assert first.path.read_bytes() == data


def test_how_a_run_is_kept_and_watched_leaves_its_file_alone(tmp_path: Path, whole: Whole):
    """Other intervals and samples after a stop: the same run, the same bytes."""
    plain = settings()
    watched = settings(
        keep=KeepConfig(checkpoint_steps=5, checkpoint_minutes=3.0),
        samples=toy_job.prompts("a cat", "a dog on the moon", every=4),
    )
    reference = whole(plain)
    path = tmp_path / NAME
    stopped(path, plain, 9)
    resumed = finish(toy_job.job(path, watched, strip_path=tmp_path / "strip.png"))
    assert resumed.progress.samples, "nothing was painted"
    check_same_end(resumed, reference)
    assert "checkpoint_steps" not in lora_file.load(path).metadata["lora2.config"]


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"learning_rate": 2e-2}},
        {"config": {"steps": 25}},
        {"data_hash": "another photo"},
        {"base_hash": "another model"},
        {"captions": ("a cat", "a bird")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_a_run_makes_another_run(tmp_path: Path, change: dict[str, Any]):
    path = tmp_path / NAME
    first = stopped(path, settings(), 9)
    options = dict(change)
    second = toy_job.job(path, settings(**options.pop("config", {})), **options)
    assert second.run_hash != first.run_hash
    finish(second)
    assert len({event.step for event in second.progress.events}) == second.config.steps
    assert second.progress.message.startswith("This starts anew"), "it went on from another run"
    assert [file.stem for file in checkpoints(path)] == [first.run_hash], "the other run can go on"


def test_resume_switched_off_starts_anew(tmp_path: Path, whole: Whole):
    wanted = settings()
    path = tmp_path / NAME
    stopped(path, wanted, 9)
    job = toy_job.job(path, settings(keep=KeepConfig(resume=False)))
    finish(job)
    assert job.progress.message == ""
    check_same_end(job, whole(wanted))


# --- accidents ------------------------------------------------------------------------------------


def test_an_explosion_keeps_the_last_good_weights_and_no_checkpoint(tmp_path: Path):
    wanted = settings(steps=70)
    path = tmp_path / NAME
    job = exploding(path, wanted, 2 * 30 + 1, 30.0)
    with pytest.raises(TrainingError, match=r"exploded.*No checkpoint is kept"):
        finish(job)
    assert lora_file.load(path).state
    assert not checkpoints(path)


def test_a_loss_that_is_no_number_keeps_the_step_before(tmp_path: Path):
    path = tmp_path / NAME
    job = exploding(path, settings(), 2 * 7 + 1, float("nan"))
    with pytest.raises(TrainingError, match=r"became nan at step 8.*No checkpoint is kept"):
        finish(job)
    assert lora_file.load(path).metadata["ss_steps"] == "7"
    assert not checkpoints(path), "the one of step 6 would only lead here again"


def test_a_disk_that_is_full_costs_only_the_checkpoint(tmp_path: Path, whole: Whole, caplog):
    wanted = settings()
    reference = whole(wanted)
    size = reference.path.stat().st_size
    path = tmp_path / NAME
    caplog.clear()
    with toy.file_size_limit(size + 5000):  # a checkpoint is several times larger
        job = finish(toy_job.job(path, wanted))
    check_same_end(job, reference)
    told = [r.getMessage() for r in caplog.records if "could not be written" in r.getMessage()]
    assert len(told) == 1, "said once, not at every interval"
    assert str(path.parent / "checkpoints") in told[0] and "File too large" in told[0]
    assert not checkpoints(path), "no half file is left"


def test_a_damaged_checkpoint_is_put_aside(tmp_path: Path, whole: Whole):
    wanted = settings()
    path = tmp_path / NAME
    job = stopped(path, wanted, 9)
    kept = checkpoints(path)[0]
    data = bytearray(kept.read_bytes())
    data[-1000] ^= 1  # a single bit of a weight
    kept.write_bytes(data)
    again = finish(toy_job.job(path, wanted))
    assert "is damaged" in again.progress.message and "starting anew" in again.progress.message
    assert [file.name for file in checkpoints(path)] == [f"{job.run_hash}.safetensors.damaged"]
    assert checkpoints(path)[0].read_bytes() == bytes(data)
    check_same_end(again, whole(wanted))


def test_a_checkpoint_of_other_layers_starts_anew_from_untouched_weights(
    tmp_path: Path, whole: Whole
):
    wanted = settings()
    path = tmp_path / NAME
    stopped(path, wanted, 9, width=32)  # the same settings on a larger model
    again = finish(toy_job.job(path, wanted))
    assert "does not fit this run" in again.progress.message
    check_same_end(again, whole(wanted))


def test_minutes_are_counted_too(tmp_path: Path):
    path = tmp_path / NAME
    keep = KeepConfig(checkpoint_steps=0, checkpoint_minutes=1e-9)
    job = toy_job.job(path, settings(keep=keep))
    seen: list[int] = []
    finish(
        at_draw(
            job, 9, lambda: seen.append(checkpoint.read(checkpoints(path)[0], job.run_hash).step)
        )
    )
    assert seen == [4]


# --- memory ---------------------------------------------------------------------------------------


def hungry(path: Path, until_checkpointed: bool) -> tuple[TrainingJob, list[int]]:
    """Step 6 asks for 4 petabytes, for good or until checkpointing is on; and when it was."""
    on_at: list[int] = []
    job = toy_job.job(
        path, settings(), enable_checkpointing=lambda: on_at.append(job.progress.step)
    )

    def allocate() -> None:
        if job.progress.step == 5 and not (until_checkpointed and on_at):
            torch.empty(10**15)

    toy_job.task_of(job).before_draw = allocate
    return job, on_at


def test_a_lack_of_memory_is_met_by_checkpointing(tmp_path: Path, whole: Whole):
    job, on_at = hungry(tmp_path / NAME, until_checkpointed=True)
    finish(job)
    assert on_at == [5]
    assert job.progress.state == "finished"
    assert "Out of memory in step 6" in job.progress.message
    assert "trying again with gradient checkpointing" in job.progress.message
    check_same_end(job, whole(settings()))


def test_a_second_lack_of_memory_says_what_would_fit(tmp_path: Path, whole: Whole):
    path = tmp_path / NAME
    job, on_at = hungry(path, until_checkpointed=False)
    with pytest.raises(OutOfMemory) as caught:
        finish(job)
    text = str(caught.value)
    assert on_at == [5], "tried again once, no more"
    assert "in step 6 even with gradient checkpointing: 4,000,000.0 GB more were needed" in text
    assert text.count("% less") == 3 and "GB were free" in text
    assert lora_file.load(path).metadata["ss_steps"] == "5"
    assert len(checkpoints(path)) == 1
    # Later, with memory to spare, it goes on with checkpointing on from the start.
    switched: list[bool] = []
    again = toy_job.job(path, settings(), enable_checkpointing=lambda: switched.append(True))
    check_same_end(finish(again), whole(settings()))
    assert switched == [True]


def test_without_a_switch_the_first_lack_ends_the_run(tmp_path: Path):
    job = toy_job.job(tmp_path / NAME, settings())
    at_draw(job, 9, lambda: torch.empty(10**15))
    with pytest.raises(OutOfMemory, match="gradient_checkpointing on"):
        finish(job)


# --- what a checkpoint tells ---------------------------------------------------------------------


def test_the_steps_survive_as_a_few_arrays(tmp_path: Path, whole: Whole):
    events = whole(settings()).progress.events
    packed = pack_events(events)
    assert all(torch.is_tensor(column) for column in packed.values())
    assert unpack_events(packed, events[0].steps) == events
    assert unpack_events(pack_events([]), 5) == []
