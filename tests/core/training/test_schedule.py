"""The learning rate over a run."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.training.optimizers.make import schedule_factor
from lora2_pack.tests.core import toy

torch.set_num_threads(1)


@given(st.integers(1, 2000))
def test_a_constant_rate_stays(steps: int):
    config = TrainConfig(schedule="constant", steps=steps)
    assert {schedule_factor(config, step) for step in range(1, steps + 1)} == {1.0}


@given(st.integers(1, 2000))
def test_a_cosine_warms_up_and_falls_towards_zero(steps: int):
    config = TrainConfig(schedule="cosine", steps=steps)
    factors = [schedule_factor(config, step) for step in range(1, steps + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert top <= 0.05 * steps
    assert all(a >= b for a, b in itertools.pairwise(factors[top:]))
    assert all(a <= b for a, b in itertools.pairwise(factors[: top + 1]))
    if steps >= 100:
        assert max(factors) > 0.99 and factors[-1] < 0.001
        assert sum(factors) / steps == pytest.approx(0.48, abs=0.01)  # half of what is not warm-up


@pytest.mark.parametrize("steps, factor", [(1, 1.0), (40, 0.5)])
def test_adam_takes_steps_of_that_size(steps: int, factor: float):
    """Adam's first step is the rate itself in every number; ν keeps a rate of its own."""
    moved = {}
    for schedule in ("constant", "cosine"):
        student = toy.Parallel(2, 16)
        task = toy.TeacherTask(student, [2, 4])
        net = toy.adapt(student, "layers", target_rank=4.0)
        old = [weight.detach().clone() for weight in net.weights()], net.log_nu.detach().clone()
        events = toy.run(net, task, steps=steps, schedule=schedule, learning_rate=1e-3, stop_at=1)
        assert len(events) == 1
        sizes = [(a - b).abs().max() for a, b in zip(net.weights(), old[0], strict=True)]
        moved[schedule] = torch.stack(sizes).max().item(), net.log_nu.detach() - old[1]
    assert moved["constant"][0] == pytest.approx(1e-3, rel=0.01)
    assert moved["cosine"][0] == pytest.approx(factor * 1e-3, rel=0.01)
    assert torch.equal(moved["constant"][1], moved["cosine"][1])
    assert moved["cosine"][1].abs().max() > 0
