"""Trainings that are started, stopped, held and let go at random, and the memory they leave."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lora2_pack.lora2_core.config.train import KeepConfig
from lora2_pack.lora2_core.jobs.progress import ENDED
from lora2_pack.lora2_core.jobs.queue import Entry, JobQueue, WrongState
from lora2_pack.lora2_core.jobs.store import JobStore
from lora2_pack.tests.core import toy_job
from lora2_pack.tests.core.jobs.test_queue import LONG, NAME, add, job, training_threads, until
from lora2_pack.tests.core.toy_job import config, finish

JOBS = 100  # in all
_MACHINES = 5
LENGTHS = st.sampled_from([1, 5, 20, LONG])


class Trainings(RuleBasedStateMachine):
    """A person without patience, in front of real trainings of a toy model."""

    memory: list[int]  # bytes of the process after each machine
    count = 0  # of trainings, in all machines

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.queue = JobQueue(JobStore(Path(self.folder.name) / "jobs"))
        self.queue.listen(self.watch)
        self.added: list[Entry] = []
        self.started: list[str] = []
        self.beside: list[str] = []  # what ran while another one did
        self.held: dict[str, int] = {}  # by id, the step at which it was held
        self.busy = False

    def watch(self, entry: Entry) -> None:
        if entry.state == "running" and entry.id not in self.started:
            self.started.append(entry.id)
        if entry.state in ("running", "paused"):  # told by its own thread or by this one
            others = [e for e in self.added if e is not entry and e is not self.queue.current()]
            self.beside += [e.id for e in others if e.state in ("running", "paused")]
        raise RuntimeError("a watcher that always fails")

    @initialize(lengths=st.lists(LENGTHS, min_size=8, max_size=8), background=st.booleans())
    def start_some(self, lengths: list[int], background: bool) -> None:
        for steps in lengths:  # Hypothesis tries machines without some of the rules
            self.start(steps, background)

    @precondition(lambda self: len(self.added) < JOBS // _MACHINES)
    @rule(steps=LENGTHS, background=st.booleans())
    def start(self, steps: int, background: bool) -> None:
        path = Path(self.folder.name) / str(len(self.added)) / NAME
        keep = KeepConfig(checkpoint_steps=7, checkpoint_minutes=0)
        made = toy_job.job(path, config(steps=steps, keep=keep), busy=lambda: self.busy)
        self.added.append(add(self.queue, made, background))
        Trainings.count += 1

    def act(self, number: int, what: Callable[[str], None], fits: tuple[str, ...]) -> Entry | None:
        """Do it to one of them; refused only when it does not fit the state, before or after."""
        if not self.added:
            return None
        entry = self.added[number % len(self.added)]
        before = entry.state
        try:
            what(entry.id)
        except WrongState:
            assert before not in fits or entry.state not in fits or entry.job.stopping
            return None
        return entry

    @rule(number=st.integers(0, 99))
    def stop(self, number: int) -> None:
        if entry := self.act(number, self.queue.stop, ("queued", "running", "paused")):
            self.held.pop(entry.id, None)

    @rule(number=st.integers(0, 99))
    def pause(self, number: int) -> None:
        if entry := self.act(number, self.queue.pause, ("running",)):
            self.held[entry.id] = entry.job.progress.step

    @rule(number=st.integers(0, 99))
    def resume(self, number: int) -> None:
        if entry := self.act(number, self.queue.resume, ("paused",)):
            self.held.pop(entry.id, None)

    @rule(busy=st.booleans())
    def prompt(self, busy: bool) -> None:
        self.busy = busy

    @rule(seconds=st.sampled_from([0.0, 0.02, 0.1]))
    def look(self, seconds: float) -> None:
        time.sleep(seconds)
        assert not self.beside, "never two at a time"
        for entry in self.added:
            step = entry.job.progress.step
            if entry.id in self.held:
                assert step <= self.held[entry.id] + 1
                # Held within its last step there is nothing left to hold.
                assert entry.state == "paused" or step == entry.job.config.steps
        order = [entry.id for entry in self.added]
        started = [order.index(id) for id in list(self.started)]
        assert started == sorted(started), "first come, first served"
        assert [entry.id for entry in self.queue.entries()] == order[::-1]

    def teardown(self) -> None:
        self.busy = False
        for entry in self.added:
            if entry.state == "paused":
                self.queue.resume(entry.id)
            if entry.job.config.steps == LONG and entry.state not in ENDED:
                if entry.state == "running":
                    until(lambda: entry.job.progress.step > 0 or entry.job.stopping)  # noqa: B023
                self.queue.stop(entry.id)
            assert self.queue.wait(entry.id, 60), "a deadlock"
        assert not training_threads()
        for entry in self.added:
            assert entry.state in ("finished", "stopped"), entry.job.progress.error
            assert entry.job.path.is_file() == (entry.job.progress.step > 0)
        self.folder.cleanup()
        self.added.clear()
        gc.collect()
        Trainings.memory.append(psutil.Process().memory_info().rss)


def test_whatever_is_done_to_them(tmp_path: Path):
    logging.disable(logging.ERROR)  # a failing watcher each
    Trainings.memory, Trainings.count = [], 0
    try:
        for number in range(3):  # what is loaded late is there before memory is looked at
            finish(job(tmp_path / str(number), 20))
        run_state_machine_as_test(
            Trainings,
            settings=settings(
                max_examples=_MACHINES,
                stateful_step_count=120,
                deadline=None,
                phases=[Phase.generate],  # threads never do the same twice: nothing to shrink
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        logging.disable(logging.NOTSET)
    # Hypothesis may begin more machines than it counts.
    most = len(Trainings.memory) * JOBS // _MACHINES
    assert JOBS // 4 <= Trainings.count <= most, "too few to prove anything"
    assert Trainings.memory[-1] <= 1.05 * Trainings.memory[0]


def test_a_hundred_leave_no_memory_behind(tmp_path: Path):
    queue = JobQueue(JobStore(tmp_path / "jobs"))
    memory: list[int] = []
    for number in range(JOBS):
        entry = add(queue, job(tmp_path / str(number)))
        assert queue.wait(entry.id, 60) and entry.state == "finished"
        if number % 20 == 19:
            gc.collect()
            memory.append(psutil.Process().memory_info().rss)
    assert max(memory) <= 1.05 * memory[0]
