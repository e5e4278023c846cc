"""The running average of A and B."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.adapters.rank_change import RankChange, ResizedWeight
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import OptimizerConfig
from lora2_pack.lora2_core.training.ema import AveragedWeights
from lora2_pack.lora2_core.training.optimizers.make import make_optimizer
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.core import toy, toy_job
from torch import Tensor, nn

torch.set_num_threads(1)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(toy.noise(*shape, seed=9)) for shape in ((3, 4), (5, 2), (1, 1))]


def moved(weights: list[nn.Parameter], step: int) -> None:
    with torch.no_grad():
        for n, weight in enumerate(weights):
            weight.copy_(toy.noise(*weight.shape, seed=10 * step + n))


def averages(average: AveragedWeights, weights: list[nn.Parameter]) -> list[Tensor]:
    with average.swapped(weights):
        return [weight.detach().clone() for weight in weights]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.9999), st.integers(1, 60))
def test_the_average_is_the_weighted_sum_of_all_steps(decay: float, steps: int) -> None:
    """Written out: each step's share is (1 − d) of its own times the decays since."""
    weights = parameters()
    average = AveragedWeights(weights, decay)
    decays = [min(decay, n / (9 + n)) for n in range(steps)]
    wanted = [torch.zeros(w.shape, dtype=torch.float64) for w in weights]
    for step in range(steps):
        moved(weights, step)
        average.update(weights)
        share = 1 - decays[step]
        for later in decays[step + 1 :]:
            share *= later
        for total, weight in zip(wanted, weights, strict=True):
            total += share * weight.detach().double()
    for found, total in zip(averages(average, weights), wanted, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), total, rtol=1e-5, atol=1e-6)


def test_the_random_start_is_forgotten_at_once() -> None:
    weights = parameters()
    average = AveragedWeights(weights, 0.999)
    moved(weights, 1)
    average.update(weights)
    for found, weight in zip(averages(average, weights), weights, strict=True):
        assert torch.equal(found, weight.detach())


def test_weights_that_rest_are_their_average() -> None:
    weights = parameters()
    average = AveragedWeights(weights, 0.99)
    for _ in range(50):
        average.update(weights)
    for found, weight in zip(averages(average, weights), weights, strict=True):
        torch.testing.assert_close(found, weight.detach())


# --- inside and after -------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_weights_are_as_before_bit_by_bit(fails: bool) -> None:
    weights = parameters()
    average = AveragedWeights(weights, 0.9)
    for step in range(5):
        moved(weights, step)
        average.update(weights)
    before = [(w.detach().clone(), w.data_ptr(), id(w)) for w in weights]
    inside = averages(average, weights)
    try:
        with average.swapped(weights):
            assert all(torch.equal(w, a) for w, a in zip(weights, inside, strict=True))
            assert not any(torch.equal(w, b) for w, (b, *_) in zip(weights, before, strict=True))
            if fails:
                raise KeyError("x")
    except KeyError:
        assert fails
    for weight, (values, address, name) in zip(weights, before, strict=True):
        assert torch.equal(weight, values)
        assert (weight.data_ptr(), id(weight)) == (address, name)
        assert weight.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(averages(average, weights), inside, strict=True))


def test_a_wrong_number_of_weights_leaves_them_alone() -> None:
    weights = parameters()
    average = AveragedWeights(weights[:2], 0.9)
    moved(weights, 3)
    before = [weight.detach().clone() for weight in weights]
    with pytest.raises(ValueError), average.swapped(weights):
        raise AssertionError("never inside")
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_the_average_shares_nothing_with_the_weights() -> None:
    weights = parameters()
    average = AveragedWeights(weights, 0.9)
    start = averages(average, weights)
    moved(weights, 1)
    assert all(torch.equal(a, b) for a, b in zip(averages(average, weights), start, strict=True))


# --- a change of rank -------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1))
def test_rows_that_stay_keep_their_average_and_new_ones_begin_at_their_weight(
    old: int, new: int, dim: int
) -> None:
    shape = (old, 5) if dim == 0 else (5, old)
    weights = [nn.Parameter(toy.noise(*shape)), nn.Parameter(toy.noise(2, 2, seed=1))]
    average = AveragedWeights(weights, 0.9)
    for step in range(4):
        moved(weights, step)
        average.update(weights)
    before = averages(average, weights)
    resize = ResizedWeight.of(weights[0], dim, new)
    grown, keep = resize.new, min(old, new)
    if new > old:
        with torch.no_grad():
            grown.narrow(dim, old, new - old).fill_(7.0)
    average.follow(RankChange((resize,)))
    first, second = averages(average, [grown, weights[1]])
    assert torch.equal(first.narrow(dim, 0, keep), before[0].narrow(dim, 0, keep))
    assert torch.equal(second, before[1])
    assert (first.narrow(dim, keep, new - keep) == (7.0 if new > old else 0)).all()
    with torch.no_grad():
        grown.fill_(3.0)
    average.update([grown, weights[1]])
    assert first.shape == averages(average, [grown, weights[1]])[0].shape
    assert grown.shape == first.shape


def test_a_network_that_changes_its_ranks_takes_its_average_along() -> None:
    """Surviving rows as if nothing had happened; new ones at what was drawn."""
    model = nn.Sequential(nn.Linear(16, 12), nn.Conv2d(6, 8, 2), nn.Linear(12, 20))
    toy.freeze(model, seed=0)
    net = toy.adapt(model, "", target_rank=6.0, hysteresis=False, growth="random")
    optimizer = make_optimizer(OptimizerConfig(), [(net.weights(), 1e-2)])
    average = AveragedWeights(net.weights(), 0.9)
    for _ in range(3):
        toy.random_steps(net, optimizer, 1)
        average.update(net.weights())
    before, old = averages(average, net.weights()), net.ranks
    average.follow(toy.resize(net, [3.0, 8.0, 11.0], optimizer))
    assert net.ranks == [3, 8, 11] != old
    after = averages(average, net.weights())
    for place, (was, now) in enumerate(zip(before, after, strict=True)):
        layer, dim = place % 3, place // 3
        keep = min(old[layer], net.ranks[layer])
        assert torch.equal(now.narrow(dim, 0, keep), was.narrow(dim, 0, keep))
        weight = net.weights()[place].detach()
        assert now.shape == weight.shape
        new = slice(keep, None) if dim == 0 else (slice(None), slice(keep, None))
        assert torch.equal(now[new], weight[new])
    average.update(net.weights())


# --- an end of the process --------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_a_loaded_average_goes_on_bit_by_bit(cut: int) -> None:
    weights = parameters()
    whole = AveragedWeights(weights, 0.95)
    for step in range(cut):
        moved(weights, step)
        whole.update(weights)
    saved = copy.deepcopy(whole.state())
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    new = AveragedWeights(others, 0.95)
    new.load_state(saved)
    for name in map(str, range(3)):
        saved[name].fill_(99.0)  # the file may go
    for step in range(cut, cut + 15):
        moved(weights, step), moved(others, step)
        whole.update(weights), new.update(others)
    for a, b in zip(averages(whole, weights), averages(new, others), strict=True):
        assert torch.equal(a, b)
    assert new.steps == whole.steps == cut + 15


# --- the file ---------------------------------------------------------------------------------


def test_a_run_saves_the_average_and_not_its_last_weights(tmp_path: Path) -> None:
    """To the 11 bits of the file; the weights of every step come from the same run, watched."""
    settings = toy_job.config(
        steps=12,
        learning_rate=0.05,
        schedule="constant",
        rank=RankConfig.fixed(target_rank=4.0),
        optimizer=OptimizerConfig(ema=0.8),
    )
    job, twin = (toy_job.job(tmp_path / name, settings) for name in ("x.safetensors", "y"))
    assert twin.setup is not None
    net, steps = twin.setup.network, []
    trainer = Trainer(net, twin.setup.task, settings)
    for _event in trainer.run():
        steps.append([w.detach().double().clone() for w in net.weights()])
    wanted = [torch.zeros_like(w) for w in steps[0]]
    for n, weights in enumerate(steps):
        decay = min(0.8, n / (9 + n))
        wanted = [decay * a + (1 - decay) * w for a, w in zip(wanted, weights, strict=True)]
    toy_job.finish(job)
    state, count = lora_file.load(job.path).state, len(net.layers)
    for n, target in enumerate(net.targets):
        delta = toy.stored_delta(state, lora_file.kohya_key(target.name))
        average, last = (side[count + n] @ side[n] for side in (wanted, steps[-1]))
        assert (delta - average).norm() < 2e-3 * average.norm()
        assert (last - average).norm() > 0.05 * average.norm(), "they do not differ"
