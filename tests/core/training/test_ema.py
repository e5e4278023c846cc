"""The running average of A and B."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.adapters.rank_change import RankChange
from lora2_pack.lora2_core.adapters.stacks import WeightStack
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import OptimizerConfig
from lora2_pack.lora2_core.training.ema import AveragedWeights
from lora2_pack.lora2_core.training.optimizers.make import make_optimizer
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.core import toy, toy_job
from lora2_pack.tests.core.stacked import by_component
from torch import Tensor, nn

torch.set_num_threads(1)


def stacks() -> list[WeightStack]:
    """Of three and of one component; the rows of the first stack are padded to four each."""
    made = [
        WeightStack(components, *widths, ranks, torch.float32, torch.device("cpu"))
        for components, widths, ranks in (((2, 0, 3), (4, 5), (3, 4, 1)), ((1,), (2, 1), (1,)))
    ]
    made[0].keep_apart(16)
    moved(made, 0)
    return made


def weights_of(made: list[WeightStack]) -> list[nn.Parameter]:
    return [stack.down for stack in made] + [stack.up for stack in made]


@torch.no_grad()
def moved(made: list[WeightStack], step: int) -> None:
    for n, weight in enumerate(weights_of(made)):
        weight.copy_(toy.noise(*weight.shape, seed=10 * step + n))


def averages(average: AveragedWeights) -> list[Tensor]:
    with average.swapped():
        return [weight.detach().clone() for weight in weights_of(list(average.stacks))]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.9999), st.integers(1, 60))
def test_the_average_is_the_weighted_sum_of_all_steps(decay: float, steps: int) -> None:
    """Written out: each step's share is (1 − d) of its own times the decays since."""
    made = stacks()
    average = AveragedWeights(made, decay)
    decays = [min(decay, n / (9 + n)) for n in range(steps)]
    wanted = [torch.zeros(w.shape, dtype=torch.float64) for w in weights_of(made)]
    for step in range(steps):
        moved(made, step)
        average.update()
        share = 1 - decays[step]
        for later in decays[step + 1 :]:
            share *= later
        for total, weight in zip(wanted, weights_of(made), strict=True):
            total += share * weight.detach().double()
    for found, total in zip(averages(average), wanted, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), total, rtol=1e-5, atol=1e-6)


def test_the_random_start_is_forgotten_at_once() -> None:
    made = stacks()
    average = AveragedWeights(made, 0.999)
    moved(made, 1)
    average.update()
    for found, weight in zip(averages(average), weights_of(made), strict=True):
        assert torch.equal(found, weight.detach())


def test_weights_that_rest_are_their_average() -> None:
    made = stacks()
    average = AveragedWeights(made, 0.99)
    for _ in range(50):
        average.update()
    for found, weight in zip(averages(average), weights_of(made), strict=True):
        torch.testing.assert_close(found, weight.detach())


# --- inside and after -------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_weights_are_as_before_bit_by_bit(fails: bool) -> None:
    made = stacks()
    average = AveragedWeights(made, 0.9)
    for step in range(5):
        moved(made, step)
        average.update()
    weights = weights_of(made)
    before = [(w.detach().clone(), w.data_ptr(), id(w)) for w in weights]
    inside = averages(average)
    try:
        with average.swapped():
            assert all(torch.equal(w, a) for w, a in zip(weights, inside, strict=True))
            assert not any(torch.equal(w, b) for w, (b, *_) in zip(weights, before, strict=True))
            assert torch.equal(
                made[0].lora_down(1), inside[0][made[0].slots[1].rows]
            )  # views show it, too
            if fails:
                raise KeyError("x")
    except KeyError:
        assert fails
    for weight, (values, address, name) in zip(weights_of(made), before, strict=True):
        assert torch.equal(weight, values)
        assert (weight.data_ptr(), id(weight)) == (address, name)
        assert weight.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(averages(average), inside, strict=True))


def test_the_average_shares_nothing_with_the_weights() -> None:
    made = stacks()
    average = AveragedWeights(made, 0.9)
    start = averages(average)
    moved(made, 1)
    assert all(torch.equal(a, b) for a, b in zip(averages(average), start, strict=True))


# --- a change of rank -------------------------------------------------------------------------


RANKS = st.lists(st.integers(1, 8), min_size=3, max_size=3)


@settings(max_examples=30, deadline=None)
@given(RANKS, RANKS, st.sampled_from([1, 8]))
def test_rows_that_stay_keep_their_average_and_new_ones_begin_at_their_weight(
    old: list[int], new: list[int], multiple: int
) -> None:
    device = torch.device("cpu")
    first = WeightStack((0, 1, 2), 5, 6, old, torch.float32, device)
    first._multiple = multiple
    first.take(*first.move_to(old))
    made = [first, WeightStack((3,), 2, 2, [2], torch.float32, device)]
    average = AveragedWeights(made, 0.9)
    for step in range(4):
        moved(made, step)
        average.update()
    before, slots = averages(average), first.slots
    change = first.move_to(new)
    first.take(*change)
    with torch.no_grad():
        for place, (was, now) in enumerate(zip(old, new, strict=True)):
            first.lora_down(place)[was:now] = 7.0
            first.lora_up(place)[:, was:now] = 8.0
    average.follow(RankChange(change))
    after = averages(average)
    assert [a.shape for a in after] == [w.shape for w in weights_of(made)]
    for place in range(3):
        keep, was = min(old[place], new[place]), slots[place].start
        start = first.slots[place].start
        for n, fill in ((0, 7.0), (2, 8.0)):
            assert torch.equal(after[n][start : start + keep], before[n][was : was + keep])
            assert (after[n][start + keep : start + new[place]] == fill).all()
            padding = after[n][start + new[place] : start + first.slots[place].capacity]
            assert not padding.any()
    assert torch.equal(after[1], before[1]) and torch.equal(after[3], before[3])
    average.update()
    assert [a.shape for a in averages(average)] == [w.shape for w in weights_of(made)]


def test_a_network_that_changes_its_ranks_takes_its_average_along() -> None:
    """Surviving rows as if nothing had happened; new ones at what was drawn."""
    model = nn.Sequential(nn.Linear(16, 12), nn.Conv2d(6, 8, 2), nn.Linear(12, 20))
    toy.freeze(model, seed=0)
    net = toy.adapt(model, "", target_rank=6.0, hysteresis=False, growth="random")
    optimizer = make_optimizer(OptimizerConfig(), [(net.weights(), 1e-2)])
    average = AveragedWeights(net.all_stacks, 0.9)
    for _ in range(3):
        toy.random_steps(net, optimizer, 1)
        average.update()

    def parts() -> list[Tensor]:
        with average.swapped():
            return [part.clone() for part in by_component(net)]

    before, old = parts(), net.ranks
    average.follow(toy.resize(net, [3.0, 8.0, 11.0], optimizer))
    assert net.ranks == [3, 8, 11] != old
    for n, (was, now, weight) in enumerate(zip(before, parts(), by_component(net), strict=True)):
        keep = min(old[n // 2], net.ranks[n // 2])
        assert torch.equal(now[:keep], was[:keep])
        assert now.shape == weight.shape
        assert torch.equal(now[keep:], weight[keep:])
    average.update()


# --- an end of the process --------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_a_loaded_average_goes_on_bit_by_bit(cut: int) -> None:
    made, others = stacks(), stacks()
    others[0]._multiple = 1  # laid out otherwise
    others[0].take(*others[0].move_to(others[0].ranks))
    whole = AveragedWeights(made, 0.95)
    for step in range(cut):
        moved(made, step)
        whole.update()
    saved = copy.deepcopy(whole.state())
    new = AveragedWeights(others, 0.95)
    new.load_state(saved)
    assert set(saved) == {"steps", *map(str, range(8))}
    for name in map(str, range(8)):
        saved[name].fill_(99.0)  # the file may go
    for step in range(cut, cut + 15):
        moved(made, step)
        for old_stack, new_stack in zip(made, others, strict=True):
            new_stack.become(
                [old_stack.lora_down(n) for n in range(len(old_stack.slots))],
                [old_stack.lora_up(n) for n in range(len(old_stack.slots))],
            )
        whole.update(), new.update()
    one, two = whole.state(), new.state()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[str(n)], two[str(n)]) for n in range(8))
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
        steps.append([part.double() for part in by_component(net)])
    wanted = [torch.zeros_like(w) for w in steps[0]]
    for n, weights in enumerate(steps):
        decay = min(0.8, n / (9 + n))
        wanted = [decay * a + (1 - decay) * w for a, w in zip(wanted, weights, strict=True)]
    toy_job.finish(job)
    state = lora_file.load(job.path).state
    for n, target in enumerate(net.targets):
        delta = toy.stored_delta(state, lora_file.kohya_key(target.name))
        average, last = (side[2 * n + 1].t() @ side[2 * n] for side in (wanted, steps[-1]))
        assert (delta - average).norm() < 2e-3 * average.norm()
        assert (last - average).norm() > 0.05 * average.norm(), "they do not differ"
