"""Events of trainings: what is new, seldom enough, and the last word always."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core.jobs.progress import Progress
from lora2_pack.lora2_core.jobs.queue import Entry, JobQueue, Origin
from lora2_pack.lora2_core.jobs.sampling import SampleEvent
from lora2_pack.lora2_core.jobs.saving import TrainedLoRA
from lora2_pack.lora2_core.training.trainer import StepEvent
from lora2_pack.nodes.screen.events import Announcer
from lora2_pack.nodes.screen.trainings import JobList, Told, news_of
from lora2_pack.nodes.screen.watch import JobWatch
from lora2_pack.tests.core import toy_job
from lora2_pack.tests.core.shown import HOST, Held, a_queue, check


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    with a_queue(tmp_path) as found:
        yield found


def test_an_event_tells_what_is_new_and_no_more(queue: JobQueue, tmp_path: Path):
    held = Held(tmp_path / "a", draw=21, samples=toy_job.prompts("a cat", every=4))
    entry = queue.add(held.job, Origin("cat"))
    assert held.there.wait(60)
    watch = JobWatch(held.job)
    event, told = news_of(entry, watch, None, HOST, Told())
    check(event, "lora2.progress")
    assert [point[0] for point in event["points"]] == list(range(1, event["job"]["step"] + 1))
    assert len(event["ranks"]) == 16 and event["sample"] == 8
    again, told = news_of(entry, watch, None, HOST, told)
    check(again, "lora2.progress")
    assert again["points"] == [] and "ranks" not in again and again["sample"] is None
    held.go.set()
    assert queue.wait(entry.id, 60)
    last, _ = news_of(entry, watch, None, HOST, told)
    check(last, "lora2.progress")
    assert last["job"]["state"] == "finished" and last["points"][-1][0] == 24
    assert last["sample"] == 24


PARTS = {field.name for field in dataclasses.fields(Progress)}


def move_between_reads(progress: Progress, move: Callable[[], None]) -> None:
    """From here on ``move()`` comes after every read of a part of ``progress``."""
    moving = False

    class Moving(Progress):
        def __getattribute__(self, name: str) -> Any:
            nonlocal moving
            value = super().__getattribute__(name)
            if name in PARTS and not moving:
                moving = True
                move()
                moving = False
            return value

    progress.__class__ = Moving


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedLoRA:
    path = tmp_path_factory.mktemp("trained") / "cat.safetensors"
    result = toy_job.finish(toy_job.job(path, toy_job.config(steps=1))).result
    assert result is not None
    return result


@pytest.mark.parametrize("steps", range(1, 13))
def test_an_event_is_of_one_moment(tmp_path: Path, trained: TrainedLoRA, steps: int):
    """A step, its picture and at last the end, wherever they fall between two reads of the job."""
    job = toy_job.job(tmp_path / "cat.safetensors", toy_job.config(steps=steps))
    entry, watch, progress = Entry(job, Origin("cat"), True), JobWatch(job), job.progress
    plain = StepEvent(0, steps, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, (), 0, 0.01, None)
    picture = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)

    def move() -> None:
        if progress.state == "finished":
            return
        step = progress.step + 1
        ranks = tuple(step + n for n in range(16))
        mean = statistics.fmean(ranks)
        progress.add(
            dataclasses.replace(plain, step=step, loss=1 / step, mean_rank=mean, ranks=ranks)
        )
        progress.samples.append(SampleEvent(step, ("a cat",), picture))
        if step == steps:
            progress.result, progress.state = trained, "finished"

    progress.state = "running"
    move_between_reads(progress, move)
    told, points = Told(), []
    for _ in range(3):
        event, told = news_of(entry, watch, None, HOST, told)
        shown, points = event["job"], points + event["points"]
        assert points[-1][:2] == [shown["step"], shown["loss"]]
        assert [point[0] for point in points] == list(range(1, shown["step"] + 1))
        assert shown["mean_rank"] == pytest.approx(statistics.fmean(told.ranks), rel=1e-4)
        assert told.step == shown["step"] and told.sample == shown["samples"] <= shown["step"]
        if shown["state"] == "finished":
            assert told.step == told.sample == steps and shown["file"] == "cat.safetensors"
        if shown["file"] is None:
            assert min(told.ranks) == shown["step"], "ranks of another step"
    assert shown["step"] == steps, "it never moved"


class Line:
    """An entry as the announcer sees it."""

    def __init__(self, id: str, state: str = "running"):
        self.id, self.state, self.step = id, state, 0


class Screen:
    """What arrives, and when."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, str, str, int]] = []

    def tell(self, entry: Line) -> dict[str, Any]:
        return {"id": entry.id, "state": entry.state, "step": entry.step}

    def send(self, event: dict[str, Any]) -> None:
        self.seen.append((time.monotonic(), event["id"], event["state"], event["step"]))

    def wait_for(self, arrived: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not arrived():
            assert time.monotonic() < end, self.seen
            time.sleep(0.005)


def test_events_are_few_and_nothing_final_is_lost():
    screen = Screen()
    announcer = Announcer(screen.tell, screen.send, interval=0.05)
    lines = [Line("one"), Line("two")]

    def told(line: Line) -> int:
        return sum(seen[1] == line.id for seen in screen.seen)

    started = time.monotonic()
    # As long as a machine takes that has much else to do.
    while time.monotonic() < started + 0.5 or min(map(told, lines)) < 3:
        assert time.monotonic() < started + 10, screen.seen
        for line in lines:
            line.step += 1
            announcer.listen(line)
    seconds = time.monotonic() - started
    for line in lines:
        line.state = "finished"
        announcer.listen(line)
    screen.wait_for(lambda: {s[1] for s in screen.seen if s[2] == "finished"} == {"one", "two"})
    times = [seen[0] for seen in screen.seen]
    assert len(times) <= seconds / 0.05 + 4
    assert min(b - a for a, b in itertools.pairwise(times)) >= 0.049
    for line in lines:  # both had their turns, and the last word was the last
        mine = [seen for seen in screen.seen if seen[1] == line.id]
        assert len(mine) >= 4 and mine[-1][2:] == ("finished", line.step)


def test_a_change_of_state_goes_before_steps():
    screen = Screen()
    announcer = Announcer(screen.tell, screen.send, interval=0.1)
    lines = [Line(f"job {n}") for n in range(5)]
    for line in lines:
        announcer.listen(line)
    screen.wait_for(lambda: len(screen.seen) == 5)
    for line in lines:
        announcer.listen(line)
    lines[4].state = "paused"
    announcer.listen(lines[4])
    screen.wait_for(lambda: len(screen.seen) == 10)
    # The slot that was free at once may have taken a step; the next one is the change's.
    assert "paused" in [seen[2] for seen in screen.seen[5:7]]


def test_nothing_is_remembered_of_jobs_that_are_over():
    screen = Screen()
    announcer = Announcer(screen.tell, screen.send, interval=0.0)
    alive = Line("alive")
    announcer.listen(alive)
    for number in range(300):
        line = Line(f"job {number}", "queued")
        for state in ("queued", "running", "finished"):
            line.state = state
            announcer.listen(line)
        assert announcer._states.keys() == {"alive"}
    screen.wait_for(lambda: len({s[1] for s in screen.seen if s[2] == "finished"}) == 300)


def test_an_error_costs_one_message():
    screen = Screen()

    def send(event: dict[str, Any]) -> None:
        if event["step"] == 0:
            raise OSError("gone")
        screen.send(event)

    announcer = Announcer(screen.tell, send, interval=0.01)
    line = Line("one")
    announcer.listen(line)
    time.sleep(0.1)
    line.step = 1
    announcer.listen(line)
    screen.wait_for(lambda: bool(screen.seen))


def test_listening_costs_a_training_nothing(queue: JobQueue, tmp_path: Path):
    jobs = JobList(queue, HOST)
    announcer = Announcer(jobs.news, lambda event: None)
    entry = Entry(toy_job.job(tmp_path / "cat.safetensors", toy_job.config()), Origin("cat"), True)
    started = time.perf_counter()
    for _ in range(1000):
        announcer.listen(entry)
    assert time.perf_counter() - started < 0.5  # half a thousandth of a second each, at worst
