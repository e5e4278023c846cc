"""A run that is stopped goes on exactly; what fails leaves nothing behind; batches add up."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.config.ranks import Prior, RankConfig
from lora2_pack.lora2_core.config.train import OptimizerConfig, TextConfig, TrainConfig
from lora2_pack.lora2_core.training.objective import Prediction
from lora2_pack.lora2_core.training.trainer import StepEvent, Trainer, TrainingError
from lora2_pack.tests.core import toy
from torch import Tensor

torch.set_num_threads(1)

STEPS, CUT = 34, 21  # the guard keeps a state after 20


class Photos(toy.TeacherTask):
    """A task with an order of its own, as photos have: what is drawn hangs on what was."""

    def __init__(self, students: list[toy.Parallel], true_ranks: list[int]):
        super().__init__(students[0], true_ranks)
        self.students, self.left, self.fails_at, self.predicted = students, [], 0, 0

    def draw(self, generator: torch.Generator, size: int) -> Tensor:
        if not self.left:
            self.left = torch.randperm(5, generator=generator).tolist()
        return (1 + 0.1 * self.left.pop()) * super().draw(generator, size)

    def spread(self, generator: torch.Generator, count: int, size: int) -> list[Tensor]:
        return [toy.TeacherTask.draw(self, generator, size) for _ in range(-(-count // size))]

    def predict(self, batch: Tensor) -> Prediction:
        self.predicted += 1
        if self.predicted == self.fails_at:
            raise MemoryError("no room")
        said = super().predict(batch)
        for student in self.students[1:]:
            said = Prediction(said.value + 0.1 * student(batch), said.target)
        return said

    def state(self) -> dict[str, Any]:
        return {"left": list(self.left)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.left = list(state["left"])


def trainer(
    optimizer: OptimizerConfig | None = None, width: int = 16, rank: Any = None, **settings: Any
) -> Trainer:
    """A fresh run over a model and a text encoder, with ranks that move from the first steps."""
    unet, text = toy.Parallel(2, width), toy.Parallel(2, width)
    task = Photos([unet], [1, 5])
    task.students.append(text)
    targets = find_targets(unet, "layers") + find_targets(text, "layers", "te1")
    moving = {"target_rank": 6.0, "hysteresis": False, "rank_learning_rate": 0.08}
    config = TrainConfig(
        **{
            "steps": STEPS,
            "entropy_weight": 0.0,
            "probes": 4,
            "learning_rate": 1e-2,
            "schedule": "cosine",
            "batch_size": 4,
            "rank": RankConfig.balanced(**{**moving, **(rank or {})}),
            "optimizer": optimizer or OptimizerConfig(),
            "text": TextConfig(learning_rate=settings.get("learning_rate", 1e-2)),
            **settings,
        }
    )
    network = AdaptiveRankNetwork({"unet": unet, "te1": text}, targets, config.rank, seed=3)
    return Trainer(network, task, config)


def told(events: list[StepEvent]) -> list[StepEvent]:
    """Events without the one thing that no two runs share."""
    return [dataclasses.replace(event, seconds=0.0) for event in events]


def assert_same(one: Any, other: Any, path: str = "state") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name, part in one.items():
            assert_same(part, other[name], f"{path}.{name}")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    else:
        assert one == other, path


def kept(run: Trainer) -> dict[str, Any]:
    """A copy, as a checkpoint's file is one."""
    return copy.deepcopy(run.state())


def first_steps(run: Trainer, count: int) -> list[StepEvent]:
    return list(run.run(lambda: run.step >= count))


# --- going on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigy"])
def test_a_stopped_run_goes_on_bit_by_bit(name: str, ema: float, accumulation: int) -> None:
    """All of the state, with 8-bit states above and below 4096 numbers, and growing ranks."""
    optimizer = OptimizerConfig(
        name=name, weight_decay=0.01, accumulation=accumulation, clip_norm=0.5, ema=ema
    )
    options: dict[str, Any] = {"width": 16}
    if name == "adamw8bit":
        options = {"width": 640, "batch_size": 1}  # rank 7 is the first in 8 bits
    if name == "prodigy":
        options["learning_rate"] = 1.0
    # A pull that makes every rank grow by 3 % a step, whatever the loss says.
    rank = {"rank_learning_rate": 0.03, "nu_prior": Prior(weight=1.0, mean=0.01, std=0.1)}
    whole, first, second = (trainer(optimizer, rank=rank, **options) for _ in range(3))
    events = list(whole.run())
    begun = first_steps(first, CUT)
    second.load_state(kept(first))
    assert second.step == CUT
    rest = list(second.run())
    assert told(begun) + told(rest) == told(events)
    assert_same(whole.state(), second.state())
    grown = [event.step for event in events if event.resized]
    assert min(grown) < CUT < max(grown) and events[-1].mean_rank > events[0].mean_rank + 2
    with whole.averaged(), second.averaged():
        assert_same(whole.network.state(), second.network.state())


@pytest.mark.parametrize("cut", [1, 19, 20, 21, 28, 33])
def test_a_state_taken_while_the_loop_waits_goes_on_bit_by_bit(cut: int) -> None:
    """As a checkpoint is taken: after the event, before the loop goes on."""
    optimizer = OptimizerConfig(ema=0.9)
    whole, first, second = (trainer(optimizer) for _ in range(3))
    events = list(whole.run())
    for event in first.run():
        if event.step == cut:
            second.load_state(kept(first))
            break
    assert told(list(second.run())) == told(events)[cut:]
    assert_same(whole.state(), second.state())


@pytest.mark.parametrize(
    ("mode", "changes"),
    [("paper", {"max_rank": 12, "rank_learning_rate": 0.08}), ("fixed", {"target_rank": 4.0})],
)
def test_the_other_modes_go_on_bit_by_bit_too(mode: str, changes: dict[str, Any]) -> None:
    def fresh() -> Trainer:
        unet = toy.Parallel(2, 16)
        task = Photos([unet], [1, 5])
        config = TrainConfig(
            steps=16,
            entropy_weight=0.0,
            probes=0,
            learning_rate=1e-2,
            rank=RankConfig.for_mode(mode, **changes),
        )
        network = AdaptiveRankNetwork(unet, find_targets(unet, "layers"), config.rank, seed=3)
        return Trainer(network, task, config)

    whole, first, second = fresh(), fresh(), fresh()
    events = list(whole.run())
    first_steps(first, 9)
    second.load_state(kept(first))
    assert told(list(second.run())) == told(events)[9:]
    assert_same(whole.state(), second.state())


def test_an_earlier_state_can_be_put_back_into_a_run_that_went_on() -> None:
    """Past the step from which ν is held, too: it learns again."""
    run = trainer(OptimizerConfig(ema=0.9))
    first_steps(run, 10)
    saved = kept(run)
    events = list(run.run())
    end = kept(run)
    run.load_state(saved)
    assert told(list(run.run())) == told(events)
    assert_same(run.state(), end)


def test_a_state_in_fp16_keeps_the_scale_of_the_loss() -> None:
    whole, first, second = (trainer(precision="fp16") for _ in range(3))
    events = list(whole.run())
    first_steps(first, CUT)
    first.scaler.update(128.0)
    saved = kept(first)
    second.load_state(saved)
    assert second.scaler.get_scale() == 128.0
    first.load_state(saved)
    assert told(list(first.run())) == told(list(second.run()))
    assert len(events) == STEPS


# --- what fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigy"])
@pytest.mark.parametrize("step", [1, 2, 9])
def test_a_failure_within_a_step_leaves_all_as_after_the_last_one(
    name: str, step: int, precision: str
) -> None:
    """The second of three batches runs out of memory; then the run goes on as if it had not."""
    settings: dict[str, Any] = {"steps": 14, "precision": precision}
    settings["learning_rate"] = 1.0 if name == "prodigy" else 1e-2
    optimizer = OptimizerConfig(name=name, accumulation=3, ema=0.9, clip_norm=1.0)
    whole, run = trainer(optimizer, **settings), trainer(optimizer, **settings)
    probes = sum(event.probe is not None for event in first_steps(whole, step - 1))
    first_steps(run, step - 1)
    before = kept(run)
    measured = (probes + 1) * len(run.fixed_noise.batches)  # once before step 1
    run.task.fails_at = 3 * (step - 1) + measured + 2
    with pytest.raises(MemoryError):
        next(run.run())
    assert run.step == step - 1
    assert_same(run.state(), before)
    weights = [*run.network.weights(), run.network.log_nu]
    assert all(weight.grad is None for weight in weights)
    rest = list(run.run())
    assert [event.step for event in rest] == list(range(step, 15))
    first_steps(whole, 14)
    assert_same(run.state(), whole.state())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_keeps_nothing_of_its_step(precision: str) -> None:
    """Nor of the next try, which comes to the same; and without it the run goes on."""
    optimizer = OptimizerConfig(ema=0.9, clip_norm=1.0, accumulation=2)
    run = trainer(optimizer, precision=precision, probes=0)
    first_steps(run, 7)
    before, matrix = kept(run), run.task.weight.clone()
    run.task.weight *= math.inf
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"became (inf|nan) at step 8"):
            next(run.run())
        assert_same(run.state(), before)
    run.task.weight = matrix
    whole = trainer(optimizer, precision=precision, probes=0)
    events = list(whole.run())
    assert told(list(run.run())) == told(events)[7:]
    assert_same(run.state(), whole.state())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_explosion_puts_the_last_good_weights_back(ema: float) -> None:
    run = trainer(OptimizerConfig(ema=ema), steps=150, probes=0)
    seen, events = {}, []
    with pytest.raises(TrainingError, match=r"exploded.*the LoRA of step 20 was kept.*0\.01"):
        for event in run.run():
            seen[event.step] = copy.deepcopy(run.network.state())
            events.append(event)
            if event.step == 60:
                with torch.no_grad():
                    for weight in run.network.weights():
                        weight.mul_(100)
    assert 61 <= len(events) <= 85
    assert run.step == 20
    assert_same(run.network.state(), seen[20])
    with run.averaged():  # the average holds the explosion: it is gone
        assert_same(run.network.state(), seen[20])


# --- batches and gradients --------------------------------------------------------------------


def gradients(run: Trainer) -> list[Tensor]:
    """Of all weights and ν, as they are when the first optimizer steps; the run is then over."""
    weights = [*run.network.weights(), run.network.log_nu]
    found: list[Tensor] = []

    def look(*_args: object) -> None:
        found.extend(weight.grad.clone() for weight in weights if weight.grad is not None)

    run.optimizer.register_step_pre_hook(look)
    next(run.run())
    assert len(found) == len(weights)
    return found


class Fixed(toy.TeacherTask):
    """Hands out the rows of one batch, as many as are asked for, in their order."""

    def draw(self, generator: torch.Generator, size: int) -> Tensor:
        rows = toy.noise(12, 3, 16)[self.at : self.at + size]
        self.at += size
        return rows

    at = 0


def fixed(batch_size: int, accumulation: int, **optimizer: Any) -> Trainer:
    student = toy.Parallel(3, 16)
    task = Fixed(student, [1, 3, 5])
    net = toy.adapt(student, "layers", target_rank=4.0)
    with torch.no_grad():
        for n, layer in enumerate(net.layers):
            layer.lora_up.copy_(0.1 * toy.noise(*layer.lora_up.shape, seed=n))
    config = TrainConfig(
        steps=5,
        rank=net.config,
        entropy_weight=0.0,
        probes=0,
        batch_size=batch_size,
        optimizer=OptimizerConfig(accumulation=accumulation, **optimizer),
    )
    return Trainer(net, task, config)


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulated_batches_are_one_large_batch(parts: int) -> None:
    """Gradients of A, B and ν to 1e-5 of the largest, the regularizers' share once and not more."""
    one, many = fixed(12, 1), fixed(12 // parts, parts)
    for a, b in zip(gradients(one), gradients(many), strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
        assert a.abs().max() > 0
    one, many = fixed(12, 1), fixed(12 // parts, parts)
    first, second = next(one.run()), next(many.run())
    for name in ("loss", "prior_loss", "rank_term", "gradient"):
        assert getattr(second, name) == pytest.approx(getattr(first, name), rel=1e-5), name


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_the_gradient_is_clipped_and_told_as_it_was(name: str) -> None:
    plain, clipped, loose = (fixed(4, 1, name=name, clip_norm=limit) for limit in (0.0, 1e-3, 1e3))
    free, held, same = gradients(plain), gradients(clipped), gradients(loose)
    size = torch.stack([grad.norm() for grad in free[:-1]]).norm()
    assert size > 2e-3
    for a, b, c in zip(free[:-1], held[:-1], same[:-1], strict=True):
        torch.testing.assert_close(b, a * (1e-3 / size), rtol=1e-4, atol=1e-12)
        assert torch.equal(a, c)
    assert torch.equal(free[-1], held[-1])  # ν's is not clipped
    told_sizes = [next(fixed(4, 1, name=name, clip_norm=x).run()).gradient for x in (0, 1e-3)]
    assert told_sizes[0] == told_sizes[1]
    assert told_sizes[0] == pytest.approx(math.hypot(size, free[-1].norm()), rel=1e-5)


def test_in_fp16_the_clipped_gradient_is_not_the_scaled_one() -> None:
    """Seen in Adam's first moment, a tenth of it: fused, it takes the scale out itself."""
    runs = []
    for precision in ("fp32", "fp16"):
        plain = fixed(4, 1, clip_norm=1e-3)
        config = dataclasses.replace(plain.config, precision=precision)
        run = Trainer(plain.network, plain.task, config)
        next(run.run())
        runs.append([10 * run.optimizer.state[w]["exp_avg"] for w in run.network.weights()])
    for found in runs:
        size = torch.stack([moment.norm() for moment in found]).norm()
        assert float(size) == pytest.approx(1e-3, rel=1e-3)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-9)
