"""An explosion is found and undone; losses that only scatter are left alone."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.lora2_core.training.losses.guard import LossGuard

torch.set_num_threads(1)

# Standard deviation of ln(loss), so that two of them span a factor of ten and of twenty.
SPREADS = {"ten": math.log(10) / 2, "twenty": math.log(20) / 2}


def losses(spread: float, steps: int, seed: int, fall: float = 1.0) -> np.ndarray:
    """Lognormal around a mean of 1 that falls exponentially to ``fall``."""
    drawn = np.random.default_rng(seed).lognormal(-(spread**2) / 2, spread, steps)
    return drawn * fall ** (np.arange(steps) / steps)


def states(step: list[int]) -> Any:
    """What a run of its own would keep: a tensor that holds its step."""
    return {"layers": {"w": torch.full((2,), float(step[0]))}, "ranks": [step[0]]}


def feed(guard: LossGuard, values: Any, first: int = 1) -> int | None:
    """The step at which the guard cries out, if it does."""
    for step, loss in enumerate(values, first):
        if guard.exploded(step, float(loss), lambda step=step: states([step])):
            return step
    return None


@pytest.mark.parametrize("fall", [1.0, 0.1])
@pytest.mark.parametrize("spread", SPREADS)
def test_losses_that_only_scatter_are_no_explosion(spread: str, fall: float) -> None:
    """5,000 steps, 40 runs; measured: 0 of 400 (by the mean of 20 in place of the median: 70)."""
    cries = [feed(LossGuard(), losses(SPREADS[spread], 5000, seed, fall)) for seed in range(40)]
    assert sum(cry is not None for cry in cries) == 0


def test_one_wild_loss_is_no_explosion() -> None:
    values = np.ones(200)
    values[[30, 80, 81, 150]] = 1e6
    assert feed(LossGuard(), values) is None


@pytest.mark.parametrize("spread", [0.0, *SPREADS.values()])
@pytest.mark.parametrize("onset", [20, 21, 70, 71, 119, 333])
def test_a_sudden_explosion_is_found_within_a_window(onset: int, spread: float) -> None:
    """Whatever its place between two kept states: what is put back is from before it."""
    for seed in range(10):
        values = losses(spread, 400, seed)
        values[onset:] *= 100
        guard = LossGuard()
        cry = feed(guard, values)
        assert cry is not None and onset < cry <= onset + 20
        step, good = guard.last_good or (None, {})
        assert step is not None and step <= onset
        assert good["ranks"] == [step]
        assert torch.equal(good["layers"]["w"], torch.full((2,), float(step)))


@pytest.mark.parametrize("onset", [71, 120, 170, 171])
def test_a_state_whose_own_step_was_the_bad_one_is_not_put_back(onset: int) -> None:
    """The weights of step s are first seen in the loss of step s + 1."""
    values = np.ones(400)
    values[onset:] = 50.0  # the loss of step onset + 1: step onset has spoiled the weights
    guard = LossGuard()
    assert feed(guard, values) is not None
    step, _ = guard.last_good or (math.inf, None)
    assert step < onset
    assert step >= onset - 100  # and little is lost


def test_an_explosion_that_grows_slowly_is_found() -> None:
    values = losses(SPREADS["ten"], 600, 0)
    values[300:] *= np.exp(np.arange(300) / 20)
    guard = LossGuard()
    cry = feed(guard, values)
    assert cry is not None and 300 < cry < 450
    assert guard.last_good is not None and guard.last_good[0] <= 320


def test_before_a_window_is_full_there_is_neither_verdict_nor_state() -> None:
    guard = LossGuard()
    assert feed(guard, [1.0, *[1e9] * 18]) is None
    assert guard.last_good is None
    assert LossGuard().last_good is None


def test_states_are_copies_and_asked_for_rarely() -> None:
    weight, asked = torch.zeros(3), []

    def state() -> dict[str, Any]:
        asked.append(1)
        return {"w": weight}

    guard = LossGuard()
    for step in range(1, 301):
        guard.exploded(step, 1.0, state)
        weight += 1
    assert len(asked) == 6  # 20, 70, …, 270
    assert guard.last_good is not None
    assert guard.last_good[0] == 270 and torch.equal(
        guard.last_good[1]["w"], torch.full((3,), 269.0)
    )


def test_where_memory_lacks_for_a_state_the_older_one_stays() -> None:
    guard = LossGuard()
    feed(guard, np.ones(60))

    def full() -> Any:
        raise MemoryError("no room")

    for step in range(61, 100):
        assert not guard.exploded(step, 1.0, full)
    assert guard.last_good is not None and guard.last_good[0] == 20
    assert feed(guard, np.ones(5), 100) is None
    assert guard.last_good[0] == 100  # as soon as there is room

    def broken() -> Any:
        raise KeyError("no state")

    with pytest.raises(KeyError):
        guard.exploded(150, 1.0, broken)


def test_a_doubtful_loss_keeps_no_state() -> None:
    """Over twice the start but no explosion yet: what was kept stays."""
    guard = LossGuard()
    feed(guard, [*[1.0] * 100, *[3.0] * 200])
    assert guard.last_good is not None and guard.last_good[0] <= 120


@given(st.integers(0, 400), st.integers(0, 2**20))
def test_a_loaded_guard_goes_on_as_the_old_one(cut: int, seed: int) -> None:
    values = losses(SPREADS["ten"], 500, seed)
    values[430:] *= 100
    whole, first, second = LossGuard(), LossGuard(), LossGuard()
    cry = feed(whole, values)
    assert feed(first, values[:cut]) is None
    saved = first.state()
    json.dumps({"recent": saved["recent"], "start": saved["start"]})  # plain values
    second.load_state(saved)
    assert feed(second, values[cut:], cut + 1) == cry is not None
    one, other = whole.state(), second.state()
    assert one["recent"] == other["recent"] and one["start"] == other["start"]
    assert one["kept"].keys() == other["kept"].keys()
    for name, kept in one["kept"].items():
        assert kept["step"] == other["kept"][name]["step"]
        tensors = (k["good"]["layers"]["w"] for k in (kept, other["kept"][name]))
        assert torch.equal(*tensors)


def test_a_loaded_state_is_a_copy() -> None:
    guard = LossGuard()
    feed(guard, [1.0] * 30)
    saved = guard.state()
    new = LossGuard()
    new.load_state(saved)
    saved["kept"]["0"]["good"]["layers"]["w"].zero_()
    assert new.last_good is not None
    assert torch.equal(new.last_good[1]["layers"]["w"], torch.full((2,), 20.0))
