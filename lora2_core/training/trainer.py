"""The training loop. It knows nothing of ComfyUI, of SDXL or of files.

A :class:`.task.Task` turns a draw of images, noise and timesteps into a prediction and its target;
the loop adds the terms of eq. 14, steps the optimizers, lets ranks follow ν and yields what
happened.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..adapters.network import AdaptiveRankNetwork
from ..adaptive_rank import gaussian_prior
from ..config.train import TrainConfig, rate_to_try
from .draws import Draws, Position, to_host
from .ema import AveragedWeights
from .events import StepEvent, TrainingError
from .last_step import LastStep
from .losses.fixed_noise import FixedNoise
from .losses.guard import LossGuard, ProbeGuard
from .objective import CrossAttentionEntropy, loss_parts
from .optimizers.make import block_of, make_nu_optimizer, make_optimizer, schedule_factor
from .optimizers.state import follow, load_optimizer_state, optimizer_state
from .rank_control import RankControl
from .task import Task

_NOISE_SEED = 0x5EED
_TERMS = ("loss", "class image loss", "attention entropy", "rank term", "gradient")


def train(
    network: AdaptiveRankNetwork,
    task: Task,
    config: TrainConfig,
    entropy: CrossAttentionEntropy | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepEvent]:
    """Train ``network`` in place, one event a step, until done or ``stop()`` is true.

    See :class:`Trainer`.
    """
    yield from Trainer(network, task, config, entropy).run(stop)


class Trainer:
    """A run that can be stopped after any step and go on exactly, also in another process.

    ``config.precision`` must name what the task computes in: fp16 needs its loss scaled.
    ``step``: finished steps. After an exception everything, draws included, is as it was after
    the last finished step.
    """

    def __init__(
        self,
        network: AdaptiveRankNetwork,
        task: Task,
        config: TrainConfig,
        entropy: CrossAttentionEntropy | None = None,
    ):
        self.network, self.task, self.config = network, task, config
        network.keep_apart(block_of(config.optimizer))
        self.entropy = entropy if config.entropy_weight > 0 else None
        self.step = 0
        self.last_step = LastStep()
        self.control = RankControl(network, config.steps)
        self.guard, self.probe_guard = LossGuard(), ProbeGuard()
        self.scaler = self._new_scaler()
        # Not the seed itself: the adapters were drawn from that, number for number.
        self.draws = Draws(task, config.seed ^ _NOISE_SEED, config.batch_size)
        self.draws_ahead = network.log_nu.device.type != "cpu"  # where somebody else computes
        self.probe_every = math.ceil(config.steps / config.probes) if config.probes else 0
        self.fixed_noise = FixedNoise(network, task, config.batch_size)
        self._freeze_from = config.steps - int(config.steps * config.rank.freeze_fraction)
        self._begin()

    def _begin(self) -> None:
        """Optimizers for the parameters that the network has now."""
        network, config = self.network, self.config
        network.log_nu.requires_grad_(True)  # steps that went on further may have frozen it
        self.ranks = tuple(network.ranks)  # made anew only when they change: events keep it
        unet = network.weights(text=False), config.learning_rate
        texts = network.weights(text=True), config.text.learning_rate
        self.optimizer = make_optimizer(config.optimizer, [unet, texts])
        self.rates = tuple(group["lr"] for group in self.optimizer.param_groups)
        self.nu_optimizer = make_nu_optimizer(network.log_nu, config.rank.rank_learning_rate)
        decay = config.optimizer.ema
        self.average = AveragedWeights(network.all_stacks, decay) if decay else None

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[StepEvent]:
        """Go on from ``step`` to the last one, or until ``stop()`` is true.

        Raises TrainingError when the loss is not finite, before that step changes any weight, or
        when it explodes or the loss on fixed noise rises clearly above its start; the network then
        holds the last good weights, or the best.
        """
        while self.step < self.config.steps and not stop():
            before = self.last_step.before = self.draws.position
            try:
                if self.step == 0 and self.probe_every and self.probe_guard.start is None:
                    self.probe_guard.start = self.fixed_noise.loss()
                started = time.perf_counter()
                nu, values = self._gradients(self.step + 1)
                with self.last_step.changing():
                    event = self._change(self.step + 1, started, nu, values)
                    self.step, self.last_step.before = event.step, None
                    # Before the event: who keeps the state then must not miss what it told.
                    exploded = self.guard.exploded(event.step, event.loss, self.network.state)
                    ruined = self.probe_guard.ruined(event, self.network.state)
            except BaseException:
                self._undo(before)
                if self.last_step.abandoned:
                    return
                raise
            yield event
            if ruined:
                self._go_back_to_best(event)
            if exploded:
                self._go_back(event)

    def _undo(self, before: Position) -> None:
        """Forget a step that has failed; ``before``: the draws before it."""
        self._zero_grad()
        scale = self.scaler.state_dict()
        self.scaler = self._new_scaler()  # forgets that gradients were unscaled
        if scale:
            self.scaler.load_state_dict(scale)
        self.draws.position = before
        self.last_step.before = None
        if self.step == 0:
            self.probe_guard = ProbeGuard()
            self._begin()  # the first step makes the optimizers' states, maybe not all

    def _new_scaler(self) -> torch.amp.GradScaler:
        # fp16 gradients of a small loss underflow; the scaler is a no-op for the rest.
        device = self.network.log_nu.device.type
        return torch.amp.GradScaler(device, enabled=self.config.precision == "fp16")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, A and B hold their running averages, if there are any: what is to be saved."""
        average = self.average
        swapped = average.swapped() if average else nullcontext()
        with self.last_step.held(), swapped:
            yield

    def state(self) -> dict[str, Any]:
        """Everything that a later ``load_state`` needs to go on bit by bit.

        Also within a step, until it changes anything: see :class:`.last_step.LastStep`.
        """
        draws = self.last_step.before or self.draws.position
        return {
            "step": self.step,
            "network": self.network.state(),
            "optimizer": optimizer_state(self.optimizer, self.network.all_stacks),
            "nu_optimizer": optimizer_state(self.nu_optimizer),
            "average": self.average.state() if self.average else {},
            "control": self.control.state(),
            "guard": self.guard.state(),
            "probe_guard": self.probe_guard.state(),
            "scaler": self.scaler.state_dict(),
            "generator": draws[0],
            "task": draws[1],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the place of the run that ``state`` was taken from: same settings, same data."""
        self.network.load_state(state["network"])
        self._begin()
        load_optimizer_state(self.optimizer, state["optimizer"], self.network.all_stacks)
        load_optimizer_state(self.nu_optimizer, state["nu_optimizer"])
        if self.average:
            self.average.load_state(state["average"])
        self.control.load_state(state["control"])
        self.guard.load_state(state["guard"])
        self.probe_guard = ProbeGuard()
        if "probe_guard" in state:  # else the checkpoint is older: there is no start to judge by
            self.probe_guard.load_state(state["probe_guard"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.draws.position = state["generator"], state["task"]
        self.step = int(state["step"])

    def _gradients(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Those of a step, in their parameters; and what :meth:`_read` gives."""
        if step > self._freeze_from:
            self.network.log_nu.requires_grad_(False)
        self._set_rates(step)
        terms = self._backward()
        self.network.let_go()  # what layers computed with, before the optimizer needs room
        told = to_host(torch.cat([torch.stack(terms), self.network.log_nu.detach()]))
        if self.draws_ahead and step < self.config.steps:
            self.draws.look_ahead()
        return self._read(told(), step)

    def _change(self, step: int, started: float, nu: Tensor, values: dict[str, float]) -> StepEvent:
        self.scaler.step(self.optimizer)
        if self.network.log_nu.grad is not None:
            self.scaler.step(self.nu_optimizer)
        self.scaler.update()
        self._zero_grad()
        if self.average:
            self.average.update()
        frozen = not self.network.log_nu.requires_grad
        resized = 0 if frozen else self._follow_nu(nu, values["loss"])
        return StepEvent(
            step=step,
            steps=self.config.steps,
            loss=values["loss"],
            prior_loss=values["class image loss"],
            entropy=values["attention entropy"],
            rank_term=values["rank term"],
            gradient=values["gradient"],
            mean_rank=statistics.fmean(self.ranks),
            ranks=self.ranks,
            resized=resized,
            seconds=time.perf_counter() - started,
            probe=self._probe(step),
        )

    def _set_rates(self, step: int) -> None:
        # Of A and B alone: ν has a rate of its own, and is held at the end by freeze_fraction.
        factor = schedule_factor(self.config, step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.network.log_nu.grad = None

    def _follow_nu(self, nu: Tensor, loss: float) -> int:
        """Let ranks and the weight of their term follow a step; returns how many ranks changed."""
        self.network.clamp_nu()
        change = self.network.resize(nu)
        follow(self.optimizer, change)
        if self.average:
            self.average.follow(change)
        self.control.observe(loss, self.network.mean_rank())
        if change.count:
            self.ranks = tuple(self.network.ranks)
        return change.count

    def _backward(self) -> list[Tensor]:
        """Gradients of one step; returns what _TERMS names, on the device."""
        parts = self.config.optimizer.accumulation
        sums = [self._backward_part(parts) for _ in range(parts)]
        terms = [functools.reduce(torch.add, part) for part in zip(*sums, strict=True)]
        rank_term = self.control.term(terms[0])
        regulariser = rank_term + self._priors()
        if torch.is_tensor(regulariser) and regulariser.requires_grad:
            self.scaler.scale(regulariser).backward()
        return [*terms, rank_term.detach().float(), self._gradient_size(terms[0])]

    def _backward_part(self, parts: int) -> list[Tensor]:
        """Forward and backward of one of the batches that make a step; its share of the terms."""
        self.network.refresh()
        batch = self.draws.next()
        with self.entropy.collecting() if self.entropy else nullcontext():
            photos, prior = loss_parts(self.task.predict(batch))
        entropy = self.entropy.value() if self.entropy else torch.zeros_like(photos)
        total = photos + prior + self.config.entropy_weight * entropy
        self.scaler.scale(total if parts == 1 else total / parts).backward()
        terms = [term.detach().float() for term in (photos, prior, entropy)]
        return terms if parts == 1 else [term / parts for term in terms]

    def _gradient_size(self, like: Tensor) -> Tensor:
        """Norm of all gradients before clipping; 0 in fp16, where the scaler skips infinite ones.

        Clips the gradient of A and B where the configuration asks for it.
        """
        limit = self.config.optimizer.clip_norm
        groups = self.optimizer.param_groups
        weights = [weight for group in groups for weight in group["params"]]
        if self.scaler.is_enabled():
            if limit:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(weights, limit)
            return torch.zeros_like(like)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        size = torch.nn.utils.get_total_norm(gradients)
        if limit:
            torch.nn.utils.clip_grads_with_norm_(weights, limit, size)
        nu_gradient = self.network.log_nu.grad
        return size if nu_gradient is None else torch.hypot(size, nu_gradient.norm())

    def _priors(self) -> Tensor | float:
        """The two regularizers of eq. 9; 0 as long as both weights are 0."""
        rank = self.config.rank
        total: Tensor | float = 0.0
        if rank.nu_prior.weight > 0:
            prior = gaussian_prior(self.network.nu, rank.nu_prior.mean, rank.nu_prior.std)
            total = total + rank.nu_prior.weight * prior
        if rank.weight_prior.weight > 0:
            for stack in self.network.all_stacks:  # rows beyond D do not exist, as eq. 9 asks
                for weight in (stack.down, stack.up):
                    prior = gaussian_prior(stack.in_use(weight), 0.0, rank.weight_prior.std)
                    total = total + rank.weight_prior.weight * prior
        return total

    def _read(self, told: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        """ν and what _TERMS names, which came to the host: the one synchronisation of a step."""
        values: dict[str, float] = dict(zip(_TERMS, told[: len(_TERMS)].tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"The {name} became {value} at step {step}; nothing of that step was kept. "
                    f"Lower learning_rate (now {self.config.learning_rate:g}) or set precision to "
                    f"fp32 or bf16 (now {self.config.precision})."
                )
        return told[len(_TERMS) :].exp(), values

    def _go_back(self, event: StepEvent) -> None:
        """Put the last good weights back and say what to change."""
        kept = "nothing good was there to go back to"
        if self.guard.last_good is not None:
            kept = f"the LoRA of step {self._become(*self.guard.last_good)} was kept"
        raise TrainingError(
            f"The loss exploded: the mean of the last 20 steps before step {event.step} is over 5 "
            f"times that of the first 20; {kept}. Lower learning_rate (now "
            f"{self.config.learning_rate:g}), set clip_norm to 1, or use the cosine schedule."
        )

    def _go_back_to_best(self, event: StepEvent) -> None:
        """Put the weights of the least loss on fixed noise back and say which rate to try."""
        kept = "no step was better than the start, so no LoRA is written"
        if self.probe_guard.best is None:
            self.step = 0
        else:
            kept = f"the LoRA of step {self._become(*self.probe_guard.best)} was kept, the best"
        raise TrainingError(
            f"Training does harm: the loss on fixed noise is {event.probe:.4g} after step "
            f"{event.step} and was {self.probe_guard.start:.4g} before the first; {kept}. "
            f"learning_rate is {self.config.learning_rate:g}: try "
            f"{rate_to_try(self.config):g}."
        )

    def _become(self, step: int, state: dict[str, Any]) -> int:
        """Hold the weights of an earlier step; returns its number."""
        self.network.load_state(state)
        self.step = step
        self.average = None  # it holds what has gone wrong
        return step

    def _probe(self, step: int) -> float | None:
        """The loss on fixed noise after a step, where one is due."""
        if not self.probe_every or not (
            step == 1 or step % self.probe_every == 0 or step == self.config.steps
        ):
            return None
        probe = self.fixed_noise.loss()
        if probe is None:  # the step before it is done: it must not be repeated for a curve
            self.probe_every = 0
        return probe

    def least_strength(self) -> float | None:
        """The smallest strength that keeps what the configuration asks for of the gain on fixed
        noise; of the averaged weights, if there are any. None where it cannot be measured."""
        share = self.config.gain_to_keep
        with self.averaged():
            return 1.0 if share == 1 else self.fixed_noise.least_strength(share)
