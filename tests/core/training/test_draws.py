"""Batches that are drawn ahead are those that would have been drawn, whatever happens meanwhile."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.config.train import OptimizerConfig
from lora2_pack.lora2_core.training.draws import Draws, to_device, to_host
from lora2_pack.lora2_core.training.objective import Prediction
from lora2_pack.lora2_core.training.trainer import Trainer, TrainingError
from lora2_pack.tests.core import toy
from lora2_pack.tests.core.training.test_trainer_state import (
    Photos,
    assert_same,
    first_steps,
    kept,
    told,
    trainer,
)
from torch import Tensor

torch.set_num_threads(1)
HOST, CARD = torch.device("cpu"), torch.device("cuda")


class Deck(Photos):
    """Photos whose draws fail at will, half done."""

    def __init__(self) -> None:
        super().__init__([toy.Parallel(1, 4)], [1])
        self.broken = False

    def draw(self, generator: torch.Generator, size: int) -> Tensor:
        batch = super().draw(generator, size)
        if self.broken:
            raise MemoryError("no room")
        return batch


def draws() -> Draws:
    return Draws(Deck(), 7, 2)


# --- one after the other ----------------------------------------------------------------------

MOVES = ["next", "look ahead", "look ahead in vain", "next in vain", "note", "go back", "move"]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(MOVES), max_size=25))
def test_looking_ahead_changes_nothing_that_is_drawn(moves: list[str]) -> None:
    """Nor where the draws are said to stand: before the one to come, also where a draw fails, and
    when they are taken back, or on elsewhere."""
    found, plain = draws(), draws()
    noted = plain.position
    for move in moves:
        if move == "next":
            assert torch.equal(found.next(), plain.next())
        elif move == "look ahead":
            found.look_ahead()
        elif move == "note":
            noted = found.position
        elif move == "go back":
            found.position = plain.position = noted
        elif move == "move":
            other = draws()
            other.position = found.position
            found = other
        else:
            _in_vain(found, move)
        assert_same(dict(enumerate(found.position)), dict(enumerate(plain.position)))


def _in_vain(found: Draws, move: str) -> None:
    found.task.broken = True  # type: ignore[attr-defined]
    before = found.position
    if move == "look ahead in vain":
        found.look_ahead()
    elif found._ahead is None:
        with pytest.raises(MemoryError):
            found.next()
        found.position = before  # as the loop forgets a step that has failed
    found.task.broken = False  # type: ignore[attr-defined]


def test_what_was_drawn_ahead_is_not_drawn_again() -> None:
    found = draws()
    found.look_ahead()
    found.task.broken = True  # type: ignore[attr-defined]
    found.look_ahead()
    assert torch.equal(found.next(), draws().next())
    with pytest.raises(MemoryError):
        found.next()


def test_who_interrupts_a_look_ahead_is_heard() -> None:
    found = draws()

    def halt(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    found.task.draw = halt
    with pytest.raises(KeyboardInterrupt):
        found.look_ahead()


# --- in a run ---------------------------------------------------------------------------------


class Record:
    """A run whose draws and predictions can fail, by their number from 1 on."""

    def __init__(self, ahead: bool, accumulation: int = 1, **settings: Any):
        optimizer = OptimizerConfig(accumulation=accumulation, ema=0.9)
        self.run: Trainer = trainer(optimizer, **settings)
        self.run.draws_ahead = ahead
        self.drawn, self.said, self.when = 0, 0, []
        self.fails: Collection[int] = ()  # draws
        self.spoils: Collection[int] = ()  # predictions that are not finite
        self._draw, self._predict = self.run.task.draw, self.run.task.predict
        self.run.task.draw, self.run.task.predict = self.draw, self.predict

    def draw(self, generator: torch.Generator, size: int) -> Tensor:
        self.drawn += 1
        self.when.append(self.run.step)
        batch = self._draw(generator, size)
        if self.drawn in self.fails:
            raise MemoryError("no room")
        return batch

    def predict(self, batch: Tensor) -> Prediction:
        said = self._predict(batch)
        if torch.is_grad_enabled():
            self.said += 1
            if self.said in self.spoils:
                return Prediction(said.value * math.nan, said.target)
        return said


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_that_draws_ahead_is_the_same_run(accumulation: int) -> None:
    plain, ahead = (Record(ahead, accumulation) for ahead in (False, True))
    assert told(list(ahead.run.run())) == told(list(plain.run.run()))
    assert_same(ahead.run.state(), plain.run.state())
    steps = ahead.run.config.steps
    assert ahead.drawn == plain.drawn == accumulation * steps  # none for a step after the last
    assert plain.when == [step for step in range(steps) for _ in range(accumulation)]
    own = [0] * accumulation  # the first of each later step is drawn in the one before it
    for step in range(1, steps):
        own += [step - 1] + [step] * (accumulation - 1)
    assert ahead.when == own


@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_is_saved_and_goes_on_in_the_middle_of_it(
    accumulation: int, first: bool, then: bool
) -> None:
    """Bit for bit, also where one of both processes does not draw ahead."""
    whole, begun, rest = (Record(ahead, accumulation).run for ahead in (False, first, then))
    events = told(list(whole.run()))
    found = told(first_steps(begun, 13))
    assert (begun.draws._ahead is not None) == first
    state = kept(begun)
    rest.load_state(state)
    assert_same(rest.state(), state)
    assert found + told(list(rest.run())) == events
    assert_same(rest.state(), whole.state())
    assert told(list(begun.run())) == events[13:]  # saving has not touched it


def test_a_state_that_is_taken_within_a_step_is_that_of_before_it() -> None:
    """When the batch of the step after it lies ready already, and the step changes nothing yet."""
    whole, run = Record(False).run, Record(True).run
    events = told(list(whole.run()))
    states, plain = [], run._read

    def read(*args: Any) -> Any:
        states.append(copy.deepcopy(run.state()))
        return plain(*args)

    run._read = read
    first_steps(run, 10)
    for step in (0, 4, 9):
        other = Record(True).run
        other.load_state(states[step])
        assert states[step]["step"] == step
        assert told(list(other.run())) == events[step:]
    assert_same(other.state(), whole.state())


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("at", [1, 2, 20])
def test_a_step_that_fails_is_made_once_more_with_its_own_batches(
    at: int, accumulation: int
) -> None:
    """It is found to be not finite only when the next batch has been drawn."""
    plain, run = (Record(ahead, accumulation) for ahead in (False, True))
    events = told(list(plain.run.run()))
    run.spoils = [at * accumulation]
    found = []
    with pytest.raises(TrainingError, match=f"at step {at};"):
        for event in run.run.run():
            found.append(event)
    assert len(found) == run.run.step == at - 1
    assert run.when[-1] == at - 1 and run.run.draws._ahead is None
    assert told(found) + told(list(run.run.run())) == events
    assert_same(run.run.state(), plain.run.state())


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("twice", [False, True])
def test_a_draw_that_fails_ahead_is_an_error_of_its_own_step_only(
    twice: bool, accumulation: int
) -> None:
    """The step before it is done; where the draw then succeeds, nothing has happened."""
    plain, run = (Record(ahead, accumulation) for ahead in (False, True))
    events = told(list(plain.run.run()))
    number = 7 * accumulation + 1  # the first of step 8
    run.fails = [number, number + 1] if twice else [number]
    found = []
    try:
        for event in run.run.run():
            found.append(event)
    except MemoryError:
        assert twice and len(found) == run.run.step == 7
        assert run.when[-2:] == [6, 7]  # ahead, and in its own step
        found += list(run.run.run())
    else:
        assert not twice
    assert told(found) == events
    assert run.drawn == plain.drawn + len(run.fails)
    assert_same(run.run.state(), plain.run.state())


def test_who_computes_on_the_cpu_draws_when_it_is_time() -> None:
    assert trainer().draws_ahead is False


def test_what_is_sent_comes_also_where_no_ram_can_be_pinned(monkeypatch: pytest.MonkeyPatch):
    """Weights that wait in RAM may have all of it: no step ends for that."""
    original, tried = torch.empty, []

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if pin_memory:
            tried.append(args)
            raise RuntimeError("CUDA error: out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    sent: list[Any] = []
    there = SimpleNamespace(shape=(3, 2), dtype=torch.float32, device=CARD, cpu=lambda: "here")
    here = SimpleNamespace(shape=(3, 2), dtype=torch.float32, device=HOST, to=sent.append)
    assert to_host(there)() == "here"  # type: ignore[arg-type, comparison-overlap]
    to_device(here, CARD)  # type: ignore[arg-type]
    assert sent == [CARD] and len(tried) == 2
