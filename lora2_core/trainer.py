"""The training loop. It knows nothing of ComfyUI, of SDXL or of files.

A :class:`Task` turns a draw of images, noise and timesteps into a prediction and its target; the
loop adds the terms of eq. 14, steps the optimizer, lets ranks follow ν and yields what happened.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import TrainConfig
from .network import AdaptiveRankNetwork
from .objective import CrossAttentionEntropy, denoising_loss, gaussian_prior
from .optimizers import make_adam, schedule_factor
from .rank_control import RankControl

_PROBE_DRAWS = 8  # images, noises and timesteps on which the comparable loss is measured
_NOISE_SEED = 0x5EED
_PROBE_SEED = 0x10A2  # the same for every run, so that runs can be compared with each other
_TERMS = ("loss", "attention entropy", "rank term", "total loss", "gradient")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to change."""


class Task(Protocol):
    """What is learnt. ``batch`` is whatever the task itself made in ``draw``."""

    def draw(self, generator: torch.Generator, size: int) -> Any:
        """A random batch of ``size`` images with noise and timesteps."""
        ...

    def spread(self, generator: torch.Generator, count: int, size: int) -> list[Any]:
        """``count`` draws in batches of ``size`` with timesteps spread evenly."""
        ...

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The model's prediction for a batch and its target, same shape."""
        ...


@dataclass(frozen=True)
class StepEvent:
    """One finished step. Losses are unweighted, so they compare between settings."""

    step: int  # 1 … steps
    steps: int
    loss: float  # mean squared error, eq. 11
    entropy: float  # nats, eq. 13; 0 when switched off
    rank_term: float  # as it entered the loss
    mean_rank: float  # integer ranks, plain mean
    ranks: tuple[int, ...]
    resized: int  # components whose rank changed after this step
    seconds: float  # of this step
    probe: float | None  # loss on fixed noise and timesteps, when measured after this step


def train(
    network: AdaptiveRankNetwork,
    task: Task,
    config: TrainConfig,
    entropy: CrossAttentionEntropy | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepEvent]:
    """Train ``network`` in place, one event a step, until done or ``stop()`` is true.

    ``config.precision`` must name what the task computes in: fp16 needs its loss scaled.

    Raises TrainingError when the loss is not finite, before that step changes any weight.
    """
    trainer = _Trainer(network, task, config, entropy)
    yield from trainer.run(stop)


class _Trainer:
    def __init__(
        self,
        network: AdaptiveRankNetwork,
        task: Task,
        config: TrainConfig,
        entropy: CrossAttentionEntropy | None,
    ):
        self.network, self.task, self.config = network, task, config
        self.entropy = entropy if config.entropy_weight > 0 else None
        self.control = RankControl(network, config.steps)
        self.ranks = tuple(network.ranks)  # made anew only when they change: events keep it
        self.optimizer = make_adam(
            network.weights(),
            config.learning_rate,
            network.log_nu,
            config.rank.rank_learning_rate,
        )
        # fp16 gradients of a small loss underflow; the scaler is a no-op for the rest.
        device = network.log_nu.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=config.precision == "fp16")
        # Not the seed itself: the adapters were drawn from that, number for number.
        self.generator = torch.Generator().manual_seed(config.seed ^ _NOISE_SEED)
        probe_generator = torch.Generator().manual_seed(_PROBE_SEED)
        self.probe_every = math.ceil(config.steps / config.probes) if config.probes else 0
        self.probes = (
            task.spread(probe_generator, _PROBE_DRAWS, config.batch_size) if config.probes else []
        )

    def run(self, stop: Callable[[], bool]) -> Iterator[StepEvent]:
        steps = self.config.steps
        self.network.log_nu.requires_grad_(True)  # an earlier run may have frozen it
        freeze_from = steps - int(steps * self.config.rank.freeze_fraction)
        for step in range(1, steps + 1):
            if stop():
                return
            if step > freeze_from:
                self.network.log_nu.requires_grad_(False)
                self.network.log_nu.grad = None
            yield self._step(step)

    def _step(self, step: int) -> StepEvent:
        started = time.perf_counter()
        # Of A and B alone: ν has a rate of its own, and is held at the end by freeze_fraction.
        factor = schedule_factor(self.config.schedule, step, self.config.steps)
        self.optimizer.param_groups[0]["lr"] = factor * self.config.learning_rate
        nu, values = self._read(self._backward(), step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        frozen = not self.network.log_nu.requires_grad
        resized = 0 if frozen else self._follow_nu(nu, values[0])
        return StepEvent(
            step=step,
            steps=self.config.steps,
            loss=values[0],
            entropy=values[1],
            rank_term=values[2],
            mean_rank=statistics.fmean(self.ranks),
            ranks=self.ranks,
            resized=resized,
            seconds=time.perf_counter() - started,
            probe=self._probe(step),
        )

    def _follow_nu(self, nu: Tensor, loss: float) -> int:
        """Let ranks and the weight of their term follow a step; returns how many ranks changed."""
        self.network.clamp_nu()
        resized = self.network.resize(nu, self.optimizer)
        self.control.observe(loss, self.network.mean_rank())
        if resized:
            self.ranks = tuple(self.network.ranks)
        return resized

    def _backward(self) -> list[Tensor]:
        """One forward and backward pass; returns what _TERMS names, on the device."""
        self.network.refresh_importance()
        batch = self.task.draw(self.generator, self.config.batch_size)
        with self.entropy.collecting() if self.entropy else nullcontext():
            prediction, target = self.task.predict(batch)
        loss = denoising_loss(prediction, target)
        entropy = self.entropy.value() if self.entropy else torch.zeros_like(loss)
        rank_term = self.control.term(loss)
        total = loss + self.config.entropy_weight * entropy + rank_term + self._priors()
        self.scaler.scale(total).backward()
        terms = [loss, entropy, rank_term, total, self._gradient_size(total)]
        return [term.detach().float() for term in terms]

    def _gradient_size(self, total: Tensor) -> Tensor:
        """Norm of all gradients; 0 in fp16, where the scaler itself skips an infinite one."""
        if self.scaler.is_enabled():
            return torch.zeros_like(total)
        parameters = [*self.network.weights(), self.network.log_nu]
        return torch.nn.utils.clip_grad_norm_(parameters, math.inf)  # measures, clips nothing

    def _priors(self) -> Tensor | float:
        """The two regularizers of eq. 9; 0 as long as both weights are 0."""
        rank = self.config.rank
        total: Tensor | float = 0.0
        if rank.nu_prior.weight > 0:
            prior = gaussian_prior(self.network.nu, rank.nu_prior.mean, rank.nu_prior.std)
            total = total + rank.nu_prior.weight * prior
        if rank.weight_prior.weight > 0:
            for weight in self.network.weights():  # rows beyond D do not exist, as eq. 9 asks
                prior = gaussian_prior(weight, 0.0, rank.weight_prior.std)
                total = total + rank.weight_prior.weight * prior
        return total

    def _read(self, terms: list[Tensor], step: int) -> tuple[Tensor, list[float]]:
        """ν and the terms on the host: the one synchronisation of a step."""
        packed = torch.cat([torch.stack(terms), self.network.log_nu.detach()]).cpu()
        values = packed[: len(terms)].tolist()
        for name, value in zip(_TERMS, values, strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"The {name} became {value} at step {step}; nothing of that step was kept. "
                    f"Lower learning_rate (now {self.config.learning_rate:g}) or set precision to "
                    f"fp32 or bf16 (now {self.config.precision})."
                )
        return packed[len(terms) :].exp(), values

    @torch.no_grad()
    def _probe(self, step: int) -> float | None:
        last = step == self.config.steps
        if not self.probes or not (step == 1 or step % self.probe_every == 0 or last):
            return None
        self.network.refresh_importance()
        losses = [denoising_loss(*self.task.predict(batch)) for batch in self.probes]
        return float(torch.stack(losses).mean())
