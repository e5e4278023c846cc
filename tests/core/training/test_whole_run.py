"""Long runs of the tiny base: what stops and goes on ends like what never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora2_pack.tools.tiny_sdxl.training.run import Run, Schedule, read_average
from torch import Tensor, nn

SCHEDULE = Schedule(steps=30, learning_rate=0.05, warm_up=5)
TARGET = torch.tensor([[1.0, -2.0, 3.0]])


class Fit:
    """One matrix that learns a fixed target from inputs that the step's number draws."""

    def __init__(self) -> None:
        self.layer = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def loss(self, step: int) -> Tensor:
        """Squared error on the inputs of a step."""
        inputs = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return (self.layer(inputs) - inputs @ TARGET.T).square().mean()

    def run(self, file: Path, schedule: Schedule = SCHEDULE) -> Run:
        """A run of this fit."""
        return Run(dict(self.layer.named_parameters()), schedule, file)


class Stop(Exception):
    """The machine went away."""


def test_a_run_learns(tmp_path: Path) -> None:
    fit = Fit()
    before = fit.loss(1000).item()
    fit.run(tmp_path / "run.safetensors", Schedule(steps=300, learning_rate=0.05)).train(fit.loss)
    assert fit.loss(1000).item() < 0.01 * before


def test_a_stopped_run_ends_like_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole = Fit()
    whole.run(tmp_path / "whole.safetensors").train(whole.loss)

    def until(step: int) -> Tensor:
        if step == 12:
            raise Stop
        return first.loss(step)

    first, second = Fit(), Fit()
    run = first.run(tmp_path / "parts.safetensors")
    with pytest.raises(Stop):
        run.train(until)
    run.save()
    resumed = second.run(tmp_path / "parts.safetensors")
    assert resumed.step == 12
    resumed.train(second.loss)
    assert (tmp_path / "parts.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()


def test_the_average_is_what_is_read(tmp_path: Path) -> None:
    fit = Fit()
    run = fit.run(tmp_path / "run.safetensors")
    run.train(fit.loss)
    average = read_average(tmp_path / "run.safetensors")["weight"]
    assert not torch.equal(average, fit.layer.weight)
    assert torch.equal(average, run.average["weight"])


def test_a_finished_run_takes_no_more_steps(tmp_path: Path) -> None:
    fit = Fit()
    fit.run(tmp_path / "run.safetensors").train(fit.loss)

    def never(step: int) -> Tensor:
        raise AssertionError(step)

    Fit().run(tmp_path / "run.safetensors").train(never)


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [SCHEDULE.learning_rate_at(step) for step in range(SCHEDULE.steps + 1)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(SCHEDULE.final * SCHEDULE.learning_rate)
