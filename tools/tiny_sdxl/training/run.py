"""One training run that can stop at any step: weights, their average, Adam's moments, the step.

Everything lies in one safetensors file, and what a step sees depends on its number alone, so a
run that was stopped and went on ends like one that was not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

LINE_SECONDS = 30  # between two lines of the log
SAVE_SECONDS = 120


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn."""

    steps: int
    learning_rate: float  # peak, Adam
    warm_up: int = 100  # steps
    final: float = 0.02  # of the peak, at the end of the cosine
    average: float = 0.998  # decay of the averaged weights, which are the ones kept
    clip: float = 1.0  # largest norm of the gradient

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then a cosine."""
        warm = min(1.0, (step + 1) / self.warm_up)
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.learning_rate * warm * (self.final + (1 - self.final) * fall)


class Run:
    """Named weights in training, resumed from ``file`` if it is there."""

    def __init__(self, weights: Mapping[str, nn.Parameter], schedule: Schedule, file: Path):
        self.weights, self.schedule, self.file = dict(weights), schedule, file
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=schedule.learning_rate)
        self.step = 0
        if file.is_file():
            self._resume()

    def train(self, loss_of_step: Callable[[int], Tensor]) -> None:
        """Go on to the schedule's last step, saving now and then, with a line now and then."""
        told = saved = time.monotonic()
        losses: list[float] = []
        while self.step < self.schedule.steps:
            losses.append(self._one_step(loss_of_step))
            now, last = time.monotonic(), self.step == self.schedule.steps
            if last or now - told > LINE_SECONDS:
                mean = sum(losses) / len(losses)
                pace = (now - told) / len(losses)
                print(f"{self.file.stem}: step {self.step}/{self.schedule.steps}, "
                      f"loss {mean:.4f}, {pace:.2f} s a step", flush=True)  # fmt: skip
                told, losses = now, []
            if last or now - saved > SAVE_SECONDS:
                self.save()
                saved = now

    def _one_step(self, loss_of_step: Callable[[int], Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate_at(self.step)
        loss = loss_of_step(self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), self.schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._follow()
        return loss.item()

    def save(self) -> None:
        """Write the run to its file, whole or not at all."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.weights.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, parameter in self.weights.items():
            if state := self.optimizer.state.get(parameter):
                tensors[f"first.{name}"] = state["exp_avg"]
                tensors[f"second.{name}"] = state["exp_avg_sq"]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, temporary, {"step": str(self.step)})
        os.replace(temporary, self.file)

    def _resume(self) -> None:
        with safe_open(self.file, "pt") as stored:
            self.step = int(stored.metadata()["step"])
            names = set(stored.keys())
            for name, parameter in self.weights.items():
                parameter.data.copy_(stored.get_tensor(f"weight.{name}"))
                self.average[name].copy_(stored.get_tensor(f"average.{name}"))
                if f"first.{name}" in names:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.step)),
                        "exp_avg": stored.get_tensor(f"first.{name}"),
                        "exp_avg_sq": stored.get_tensor(f"second.{name}"),
                    }

    @torch.no_grad()
    def _follow(self) -> None:
        # A young average would remember the random start for long.
        decay = min(self.schedule.average, (1 + self.step) / (10 + self.step))
        for name, parameter in self.weights.items():
            self.average[name].lerp_(parameter, 1 - decay)


def read_average(file: Path) -> dict[str, Tensor]:
    """Return the averaged weights of a run."""
    with safe_open(file, "pt") as stored:
        names = [name for name in stored.keys() if name.startswith("average.")]  # noqa: SIM118
        return {name.removeprefix("average."): stored.get_tensor(name) for name in names}
