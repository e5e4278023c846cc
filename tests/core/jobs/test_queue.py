"""Many trainings, one after the other; at random: test_queue_at_random.py."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.train import KeepConfig
from lora2_pack.lora2_core.jobs import queue as job_queue
from lora2_pack.lora2_core.jobs import shutdown
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.jobs.progress import ENDED
from lora2_pack.lora2_core.jobs.queue import Entry, JobQueue, Origin, UnknownJob, WrongState
from lora2_pack.lora2_core.jobs.store import JobStore
from lora2_pack.tests.core import toy_job
from lora2_pack.tests.core.toy_job import at_draw, config, finish, prompts

NAME = "cat_00001_.safetensors"
LONG = 100_000  # steps; nobody waits for them


def job(folder: Path, steps: int = 4, **options: Any) -> TrainingJob:
    keep = KeepConfig(checkpoint_steps=0, checkpoint_minutes=0)
    return toy_job.job(folder / NAME, config(steps=steps, keep=keep), **options)


def add(queue: JobQueue, made: TrainingJob, background: bool = True) -> Entry:
    return queue.add(made, Origin(made.path.stem), background)


def until(told: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def training_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("LoRA²")]


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    made = JobQueue(JobStore(tmp_path / "jobs"))
    yield made
    made.close()
    for entry in made.entries():
        if entry.state not in ENDED:
            made.stop(entry.id)
        assert made.wait(entry.id, 60)
    assert not training_threads()


# --- one after the other --------------------------------------------------------------------------


def test_the_order_is_the_order_of_asking(tmp_path: Path, queue: JobQueue):
    order: list[str] = []
    queue.listen(
        lambda entry: order.append(entry.id) if entry.state == "running" else None,
    )
    found = [add(queue, job(tmp_path / str(number))) for number in range(5)]
    assert [entry.id for entry in queue.entries()] == [entry.id for entry in found][::-1]
    for entry in found:
        assert queue.wait(entry.id, 60)
    assert list(dict.fromkeys(order)) == [entry.id for entry in found]
    changes = sum(one != other for one, other in pairwise(order))
    assert changes == 4, "never two at a time"
    assert all(entry.state == "finished" and entry.job.path.is_file() for entry in found)


def test_positions_move_up(tmp_path: Path, queue: JobQueue):
    found = [add(queue, job(tmp_path / str(number), LONG)) for number in range(3)]
    assert [queue.position(entry.id) for entry in found] == [None, 1, 2]
    assert [entry.state for entry in found] == ["running", "queued", "queued"]
    queue.stop(found[1].id)
    assert [queue.position(entry.id) for entry in found] == [None, None, 1]
    queue.stop(found[0].id)
    until(lambda: found[2].state == "running")
    assert queue.position(found[2].id) is None
    assert queue.current() is found[2]


def test_a_queued_one_that_is_stopped_was_never_there(tmp_path: Path, queue: JobQueue):
    add(queue, job(tmp_path / "1", LONG))
    made = job(tmp_path / "2")
    network = weakref.ref(toy_job.setup_of(made).network)
    second = add(queue, made)
    queue.stop(second.id)
    assert queue.wait(second.id, 1) and second.state == "stopped"
    gc.collect()
    assert network() is None, "its model is gone"
    assert not second.job.path.exists() and second.job.result is None
    with pytest.raises(WrongState, match="over already"):
        queue.stop(second.id)


def test_an_error_lets_the_next_one_start(tmp_path: Path, queue: JobQueue):
    def fail() -> None:
        raise MemoryError("the dog ate it")

    first = add(queue, at_draw(job(tmp_path / "1"), 5, fail))
    second = add(queue, job(tmp_path / "2"))
    assert queue.wait(second.id, 60) and second.state == "finished"
    assert first.state == "failed" and first.job.path.is_file()
    assert queue.store is not None
    [error] = [kept.error for kept in queue.store.all() if kept.id == first.id]
    assert error is not None and "memory" in error


def test_without_a_thread_to_spare_it_fails_and_says_so(
    tmp_path: Path, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
):
    made = job(tmp_path)

    def start() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(made._thread, "start", start)
    entry = add(queue, made)
    assert queue.wait(entry.id, 1) and entry.state == "failed"
    assert "thread" in str(entry.job.progress.error)
    other = add(queue, job(tmp_path / "2"))
    assert queue.wait(other.id, 60) and other.state == "finished"


def test_an_unknown_one_is_told_as_such(queue: JobQueue):
    for ask in (queue.find, queue.stop, queue.pause, queue.resume, queue.position, queue.wait):
        with pytest.raises(UnknownJob, match="no such training"):
            ask("nobody")


def test_two_that_were_to_have_the_same_name(tmp_path: Path, queue: JobQueue):
    settings_ = [config(steps=4, seed=seed) for seed in (1, 2)]
    found = [add(queue, toy_job.job(tmp_path / NAME, wanted)) for wanted in settings_]
    assert queue.paths() <= {tmp_path / NAME}
    for entry in found:
        assert queue.wait(entry.id, 60) and entry.state == "finished"
    assert [entry.job.path.name for entry in found] == [NAME, "cat_00002_.safetensors"]
    assert [entry.origin.name for entry in found] == ["cat_00001_", "cat_00002_"]
    runs = [lora_file.load(entry.job.path).metadata["lora2.run"] for entry in found]
    assert runs == [entry.job.run_hash for entry in found]
    assert not queue.paths()


# --- held -----------------------------------------------------------------------------------------


def test_held_within_a_step_and_the_same_in_the_end(tmp_path: Path, queue: JobQueue):
    reference = finish(job(tmp_path / "whole", 40))
    entry = add(queue, job(tmp_path / "held", 40))
    for least in (3, 10, 20):
        until(lambda: entry.job.progress.step >= least)  # noqa: B023
        queue.pause(entry.id)
        at = entry.job.progress.step
        time.sleep(0.2)
        held = entry.job.progress.step
        assert held <= at + 1 and entry.state == "paused"
        time.sleep(0.1)
        assert entry.job.progress.step == held
        with pytest.raises(WrongState, match="this one is paused"):
            queue.pause(entry.id)
        queue.resume(entry.id)
        with pytest.raises(WrongState, match="Only a paused training"):
            queue.resume(entry.id)
    assert queue.wait(entry.id, 60) and entry.state == "finished"
    assert entry.job.path.read_bytes() == reference.path.read_bytes()
    for act in (queue.pause, queue.resume, queue.stop):
        with pytest.raises(WrongState, match="finished"):
            act(entry.id)


def test_stopped_while_held_it_ends_at_once_and_is_saved(tmp_path: Path, queue: JobQueue):
    entry = add(queue, job(tmp_path, LONG))
    until(lambda: entry.job.progress.step >= 3)
    queue.pause(entry.id)
    time.sleep(0.1)
    step = entry.job.progress.step
    queue.stop(entry.id)
    assert queue.wait(entry.id, 10) and entry.state == "stopped"
    assert lora_file.load(entry.job.path).metadata["ss_steps"] == str(step)


def test_what_waits_its_turn_cannot_be_held(tmp_path: Path, queue: JobQueue):
    add(queue, job(tmp_path / "1", LONG))
    second = add(queue, job(tmp_path / "2"))
    for act in (queue.pause, queue.resume):
        with pytest.raises(WrongState, match="queued"):
            act(second.id)


def test_what_is_ending_cannot_be_held(tmp_path: Path, queue: JobQueue):
    made = job(tmp_path, LONG)
    waited, go = threading.Event(), threading.Event()

    def linger() -> None:
        waited.set()
        go.wait(30)

    entry = add(queue, at_draw(made, 5, linger))
    assert waited.wait(30)
    queue.stop(entry.id)
    with pytest.raises(WrongState, match="this one is ending"):
        queue.pause(entry.id)
    go.set()
    assert queue.wait(entry.id, 30) and entry.state == "stopped"


def test_a_run_waits_for_prompts_and_says_so(tmp_path: Path, queue: JobQueue):
    reference = finish(job(tmp_path / "whole", 30))
    busy = threading.Event()
    seen: set[tuple[str, bool]] = set()
    queue.listen(lambda entry: seen.add((entry.state, entry.job.progress.waits)))
    entry = add(queue, job(tmp_path / "polite", 30, busy=busy.is_set))
    until(lambda: entry.job.progress.step >= 3)
    busy.set()
    until(lambda: entry.job.progress.waits)
    step = entry.job.progress.step
    time.sleep(0.2)
    assert entry.job.progress.step == step and entry.state == "running"
    queue.pause(entry.id)
    busy.clear()
    time.sleep(0.2)
    assert (entry.state, entry.job.progress.waits) == ("paused", False)
    assert entry.job.progress.step == step
    queue.resume(entry.id)
    assert queue.wait(entry.id, 60) and entry.state == "finished"
    assert ("running", True) in seen and not entry.job.progress.waits
    assert entry.job.path.read_bytes() == reference.path.read_bytes()


def test_a_run_that_waits_can_be_stopped(tmp_path: Path, queue: JobQueue):
    entry = add(queue, job(tmp_path, LONG, busy=lambda: True))
    until(lambda: entry.job.progress.waits)
    queue.stop(entry.id)
    assert queue.wait(entry.id, 10) and entry.state == "stopped"
    assert not entry.job.path.exists(), "there was no step"


def test_whoever_cannot_be_asked_is_not_waited_for(tmp_path: Path, queue: JobQueue, caplog):
    entry = add(queue, job(tmp_path, busy=lambda: 1 / 0 > 0))
    assert queue.wait(entry.id, 60) and entry.state == "finished"
    assert caplog.text.count("whether a prompt runs cannot be told") == 1


def test_a_prompt_that_waits_for_its_turn_is_not_waited_for(tmp_path: Path, queue: JobQueue):
    """Else the training would wait for the prompt and the prompt for the training."""
    first = add(queue, job(tmp_path / "1", 30, busy=lambda: not queue.prompt_waits()))
    until(lambda: first.job.progress.waits)
    other = add(queue, job(tmp_path / "2"), background=True)
    time.sleep(0.2)
    assert first.job.progress.waits, "one in the background can wait"
    last = add(queue, job(tmp_path / "3"), background=False)
    assert queue.wait(first.id, 60), "both wait for ever"
    assert queue.wait(last.id, 60) and other.state == last.state == "finished"


# --- who watches ----------------------------------------------------------------------------------


def test_whoever_watches_is_told_of_all_and_may_fail(tmp_path: Path, queue: JobQueue, caplog):
    seen: list[tuple[str, int]] = []

    def broken(_entry: Entry) -> None:
        raise ValueError("a watcher's own fault")

    queue.listen(broken)
    queue.listen(lambda entry: seen.append((entry.state, entry.job.progress.step)))
    entry = add(queue, job(tmp_path, 6))
    assert queue.wait(entry.id, 60) and entry.state == "finished"
    assert seen[0] == ("queued", 0) and seen[-1] == ("finished", 6)
    assert [step for _, step in dict.fromkeys(seen)] == [0, 0, *range(1, 7), 6]
    told = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(told) == 1 and told[0].exc_info is not None, "once, not at every step"


def test_what_a_run_tells(tmp_path: Path, queue: JobQueue):
    before = time.time()
    entry = add(queue, job(tmp_path, 6))
    assert queue.wait(entry.id, 60)
    progress = entry.job.progress
    assert "Training" in progress.log[0] and "towards cat_00001_" in progress.log[0]
    assert "Wrote cat_00001_.safetensors" in progress.log[-1]
    assert not any(str(tmp_path) in line for line in progress.log)
    assert before <= progress.started <= time.time()
    assert progress.seconds == pytest.approx(sum(event.seconds for event in progress.events))
    for number in range(300):
        entry.job.progress.tell(f"line {number}", logging.DEBUG)
    assert len(progress.log) == 200 and progress.log[-1] == "line 299"


def test_of_one_that_is_over_only_the_story_is_kept(
    tmp_path: Path, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job_queue, "LISTED", 3)
    monkeypatch.setattr(job_queue, "_WITH_PICTURES", 1)
    wanted = config(steps=6, resolution=512, samples=prompts("a cat", every=2))
    made = [
        toy_job.job(tmp_path / str(n) / NAME, wanted, strip_path=tmp_path / "strip.png")
        for n in range(5)
    ]
    setups = [toy_job.setup_of(one) for one in made]
    gone = [weakref.ref(part) for one in setups for part in (one.network, one.task)]
    found = [add(queue, one) for one in made]
    assert queue.wait(found[-1].id, 120)
    del made, setups
    gc.collect()
    assert not [reference for reference in gone if reference() is not None]
    assert queue.entries() == found[:1:-1]
    with pytest.raises(UnknownJob):
        queue.find(found[0].id)
    assert [len(entry.job.progress.samples) for entry in queue.entries()] == [3, 1, 1]
    for entry in queue.entries():
        result = entry.job.result
        assert result is not None and not result.file.state and result.components
        assert result.file.metadata and len(result.events) == 6
        assert max(entry.job.progress.samples[-1].pictures.shape[1:3]) <= 224
        assert [bool(event.ranks) for event in entry.job.progress.events] == [False] * 5 + [True]
        assert [event.step for event in entry.job.progress.events] == [*range(1, 7)]


def test_a_prompt_that_waited_still_gets_all(tmp_path: Path, queue: JobQueue):
    entry = add(queue, job(tmp_path), background=False)
    assert queue.wait(entry.id, 60)
    assert entry.job.result is not None and entry.job.result.file.state


# --- the end of the process -----------------------------------------------------------------------


def test_the_end_of_the_process_starts_nothing_and_saves_what_runs(tmp_path: Path, queue: JobQueue):
    finished = add(queue, job(tmp_path / "0"))
    assert queue.wait(finished.id, 60)
    found = [add(queue, job(tmp_path / str(number), LONG)) for number in (1, 2, 3)]
    queue.stop(found[2].id)
    until(lambda: found[0].job.progress.step >= 3)
    queue.pause(found[0].id)
    assert shutdown.stop_all(20)
    assert [entry.state for entry in found] == ["stopped"] * 3
    assert lora_file.load(found[0].job.path).state
    assert not found[1].job.path.exists(), "it never began"
    assert not training_threads()
    store = JobStore(tmp_path / "jobs")  # what the next process sees of it
    states = {kept.id: kept.state for kept in store.all()}
    assert states[finished.id] == "finished"
    assert states[found[0].id] == "interrupted"
    assert states[found[2].id] == "stopped", "by a person, before"
    # Whoever caught the signal may live on, and so may the queue.
    again = add(queue, job(tmp_path / "4"))
    assert queue.wait(again.id, 60) and again.state == "finished"


def test_an_interrupted_one_that_goes_on_is_listed_once(
    tmp_path: Path, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
):
    first = add(queue, job(tmp_path, 120))
    until(lambda: first.job.progress.step >= 3)
    assert shutdown.stop_all(20) and first.state == "stopped"
    store = JobStore(tmp_path / "jobs")
    assert [kept.state for kept in store.all()] == ["interrupted"]
    assert first.job.progress.step < 120
    second = add(queue, job(tmp_path, 120))
    assert queue.wait(second.id, 120) and second.state == "finished"
    assert "Going on after step" in second.job.progress.log[0]
    assert [kept.id for kept in store.all()] == [second.id]
    assert second.job.progress.seconds > first.job.progress.seconds
    reference = finish(job(tmp_path / "whole", 120))
    assert second.job.path.read_bytes() == reference.path.read_bytes()
