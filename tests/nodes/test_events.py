"""Events of trainings: what is new, seldom enough, and the last word always."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lora2_pack.lora2_core.jobs.queue import Entry, JobQueue, Origin
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
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        for line in lines:
            line.step += 1
            announcer.listen(line)
    for line in lines:
        line.state = "finished"
        announcer.listen(line)
    screen.wait_for(lambda: {s[1] for s in screen.seen if s[2] == "finished"} == {"one", "two"})
    times = [seen[0] for seen in screen.seen]
    assert len(times) <= 0.5 / 0.05 + 4
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
