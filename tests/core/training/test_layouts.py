"""A run with room between its components is the run without, and one goes on as the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core.adapters.rank_change import apart
from lora2_pack.lora2_core.config.ranks import Prior
from lora2_pack.lora2_core.config.train import OptimizerConfig
from lora2_pack.lora2_core.training.trainer import StepEvent, Trainer
from lora2_pack.tests.core import stacked
from lora2_pack.tests.core.adapters.test_stacks import spoil
from lora2_pack.tests.core.training.test_trainer_state import trainer
from torch import Tensor

torch.set_num_threads(1)

GROWING = {"rank_learning_rate": 0.03, "weight_prior": Prior(weight=1e-3, std=2.0)}
GROWING["nu_prior"] = Prior(weight=1.0, mean=0.01, std=0.1)


def run(name: str, padded: bool) -> Trainer:
    """Adapters of a model and a text encoder; where rows are spare, they hold junk."""
    optimizer: Any = OptimizerConfig(name=name, weight_decay=0.1, clip_norm=0.2, ema=0.9)
    made = trainer(optimizer, rank=GROWING, learning_rate=1.0 if name == "prodigy" else 1e-2)
    stacked.randomise(made.network.layers, 0.2)
    if padded:
        made.network.keep_apart(256)
        spoil(made.network)
    made._begin()  # averages and optimizers of these weights
    return made


def parts(made: Trainer) -> list[Tensor]:
    """A and B of every component and their averages, and ν."""
    with made.averaged():
        averages = [part.clone() for part in stacked.by_component(made.network)]
    return [*averages, *stacked.by_component(made.network), made.network.log_nu.detach()]


def assert_alike(one: Trainer, other: Trainer) -> None:
    assert one.network.ranks == other.network.ranks
    for a, b in zip(parts(one), parts(other), strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(a.norm())


def assert_told_alike(events: list[StepEvent], others: list[StepEvent]) -> None:
    for one, other in zip(events, others, strict=True):
        assert one.ranks == other.ranks
        for name in ("loss", "rank_term", "gradient"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-5), name


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_rows_that_are_nobody_s_change_no_run(name: str) -> None:
    """Losses, norms, clipping, priors, decay, averages and resizes are those without them."""
    plain, padded = run(name, padded=False), run(name, padded=True)
    events = list(plain.run())
    assert_told_alike(events, list(padded.run()))
    assert sum(event.resized for event in events) > 8
    assert_alike(plain, padded)
    one, other = plain.state(), padded.state()
    for name, sides in one["optimizer"]["components"].items():
        found = other["optimizer"]["components"][name]
        for key, value in sides.items():
            if torch.is_tensor(value) and value.ndim:
                assert found[key].shape == value.shape == sides[key].shape
                assert float((found[key] - value).norm()) <= 1e-4 * float(value.norm()), key
    assert other["average"].keys() == one["average"].keys()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_a_run_goes_on_in_the_other_layout(name: str, padded: bool) -> None:
    whole, first, second = run(name, padded), run(name, padded), run(name, not padded)
    events = list(whole.run())
    list(first.run(lambda: first.step >= 17))
    second.load_state(copy.deepcopy(first.state()))
    assert_alike(first, second)
    assert_told_alike(events[17:], list(second.run()))
    assert_alike(whole, second)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigy"])
def test_a_run_makes_room_where_an_optimizer_remembers_blocks(name: str) -> None:
    """And nowhere else, where it would only take memory; a loaded run has that room, too."""
    optimizer: Any = OptimizerConfig(name=name)
    rate = 1.0 if name == "prodigy" else 1e-2
    made, other = (trainer(optimizer, width=20, learning_rate=rate) for _ in range(2))
    other.load_state(copy.deepcopy(made.state()))
    for one in (made, other):
        for stack in one.network.all_stacks:
            assert stack.padded == (name == "adamw8bit")
            for width in (stack.down.shape[1], stack.up.shape[1]):
                assert apart(stack.slots, width, 256 if name == "adamw8bit" else 1)
