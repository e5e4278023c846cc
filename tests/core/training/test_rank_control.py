"""The rank term and its controller: today's numbers without groups, one κ for each with them."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import adaptive_rank
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.training.rank_control import RankControl
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.core import toy
from torch import Tensor

torch.set_num_threads(1)

HALVES = (("self", 4.0), ("cross", 9.0))


def control(steps: int = 100, blocks: int = 2, **rank) -> RankControl:
    return RankControl(toy.adapt(toy.Transformer(blocks=blocks), **rank), steps)


class OneBudget:
    """The controller for one budget, step by step as it is described, in plain numbers."""

    def __init__(self, control: RankControl, steps: int):
        self.net, self.config = control.network, control.config
        self.weight = self.net.rank_weights[0]
        self.target = self.net.budget.targets[0]
        self.gain = self.config.controller_gain / steps
        self.kappa = self.level = self.config.rank_weight
        self.memory: float | None = None

    def term(self, loss: Tensor) -> Tensor:
        mean = (self.weight * (math.log(10) / self.net.nu)).sum()
        size = loss if self.memory is None else self.memory
        return self.kappa * size * (mean / (self.weight.sum() * self.target))

    def observe(self, loss: float, mean_rank: float) -> None:
        self.memory = loss if self.memory is None else 0.98 * self.memory + (1 - 0.98) * loss
        excess = max(-1.0, min(1.0, mean_rank / self.target - 1))
        first = self.config.rank_weight
        if 1 + 30 * excess > -3:  # else it pulls up with all its strength already
            self.level = self.level * math.exp(self.gain * excess)
            self.level = max(first / 1e3, min(first * 1e3, self.level))
        self.kappa = self.level * max(-3.0, min(3.0, 1 + 30 * excess))


@settings(deadline=None, max_examples=25)
@given(
    path=st.lists(st.tuples(st.floats(1e-3, 10), st.floats(1, 16)), min_size=1, max_size=30),
    megabytes=st.booleans(),
)
def test_one_budget_gives_the_very_numbers_of_the_formula(path, megabytes: bool) -> None:
    options = {"target_megabytes": 0.02} if megabytes else {"target_rank": 5.0}
    steered = control(**options)
    plain = OneBudget(steered, 100)
    for loss, mean in path:
        with torch.no_grad():
            steered.network.log_nu.add_(0.01 * math.sin(mean))
        given = torch.tensor(loss)
        assert float(steered.term(given).detach()) == float(plain.term(given).detach())
        steered.observe(loss, [mean])
        plain.observe(loss, mean)
        assert steered.kappas == [plain.kappa]
        assert steered.loss_mean == plain.memory


def test_the_gradient_without_groups_is_that_of_one_budget() -> None:
    steered = control(target_rank=5.0)
    plain = OneBudget(steered, 100)
    gradients = []
    for term in (steered.term, plain.term):
        steered.network.log_nu.grad = None
        term(torch.tensor(0.7)).backward()
        gradients.append(steered.network.log_nu.grad)
    assert torch.equal(*gradients)
    assert (gradients[0] < 0).all()  # a larger ν means a smaller rank


def test_paper_and_fixed_modes_steer_nothing() -> None:
    literal = control(mode="paper", target_rank=3.0, rank_weight=0.01)
    nu = literal.network.nu.detach().double()
    expected = 0.01 * float((nu - adaptive_rank.nu_for_rank(3.0, 0.9)).abs().sum())
    for _ in range(3):
        assert literal.term(torch.tensor(5.0)).item() == pytest.approx(expected, rel=1e-6)
        literal.observe(5.0, literal.network.mean_rank())
    assert float(control(mode="fixed").term(torch.tensor(5.0))) == 0


# --- groups -----------------------------------------------------------------------------------


def test_a_component_belongs_to_the_first_group_that_it_is_in() -> None:
    net = toy.adapt(toy.Transformer(blocks=2), "attn|ff", target_rank=6.0, group_targets=HALVES)
    wanted = {".attn1.": 4.0, ".attn2.": 9.0}
    for target, rank in zip(net.targets, net.budget.per_component().tolist(), strict=True):
        assert rank == next((r for part, r in wanted.items() if part in target.name), 6.0)
    assert net.budget.targets == (4.0, 9.0, 6.0)
    assert net.budget.shares == pytest.approx((8 / 18, 8 / 18, 2 / 18))
    start = [min(r, t.largest_rank) for t, r in zip(net.targets, net.ranks, strict=True)]
    assert start == net.ranks == [4, 4, 4, 4, 9, 9, 9, 9, 6] * 2
    assert net.mean_rank() == pytest.approx((4, 9, 6))


def test_a_group_of_all_leaves_no_rest() -> None:
    net = toy.adapt(toy.Transformer(), "self-attention", group_targets=(("self", 3.0),))
    assert net.budget.targets == (3.0,)
    assert set(net.ranks) == {3}


def test_equal_targets_for_groups_make_the_term_of_one() -> None:
    alone = control(target_rank=5.0)
    groups = control(target_rank=5.0, group_targets=(("self", 5.0), ("cross", 5.0)))
    with torch.no_grad():
        for steered in (alone, groups):
            steered.network.log_nu += torch.linspace(-1, 1, 16)
    loss = torch.tensor(0.3)
    assert groups.term(loss).item() == pytest.approx(alone.term(loss).item(), rel=1e-6)


def test_every_group_is_measured_by_its_own_target() -> None:
    steered = control(rank_weight=0.01, group_targets=HALVES)
    steered.observe(0.5, (4.4, 8.1))
    gain = steered.gain
    above, below = math.exp(gain * 0.1), math.exp(-gain * 0.1)
    assert steered.kappas == pytest.approx([0.01 * above * 3, 0.01 * below * -2])
    steered.observe(0.5, (4.0, 9.0))
    assert steered.kappas == pytest.approx([0.01 * above, 0.01 * below])
    nu, parts = steered.network.nu.detach(), []
    for group, (mark, target) in enumerate(((".attn1.", 4.0), (".attn2.", 9.0))):
        mine = torch.tensor([mark in t.name for t in steered.network.targets])
        mean = float((math.log(10) / nu[mine]).mean())
        parts.append(0.5 * steered.kappas[group] * mean / target)  # half of the components each
    expected = 0.5 * sum(parts)
    assert float(steered.term(torch.tensor(9.9)).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wanted", [(3.0, 10.0), (10.0, 3.0)])
def test_groups_end_near_their_own_targets(wanted: tuple[float, float]) -> None:
    model = toy.Transformer(blocks=2, width=32, context_width=24)
    net = toy.adapt(model, group_targets=tuple(zip(("self", "cross"), wanted, strict=True)))
    toy.run(net, toy.TransformerTask(model), steps=300, batch_size=4, learning_rate=5e-3)
    ranks = [
        [rank for t, rank in zip(net.targets, net.ranks, strict=True) if mark in t.name]
        for mark in (".attn1.", ".attn2.")
    ]
    assert [statistics.fmean(found) for found in ranks] == pytest.approx(wanted, rel=0.2)


def test_a_fixed_mode_takes_the_rank_of_each_group() -> None:
    net = toy.adapt(toy.Transformer(), mode="fixed", target_rank=2.0, group_targets=HALVES)
    assert net.ranks == [4, 4, 4, 4, 9, 9, 9, 9] * 2


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ((("mid", 3.0),), "group_targets names 'mid', but no adapted layer is in it"),
        ((("self", 3.0), ("self", 4.0)), "'self', but no adapted layer .* an earlier group"),
        ((("cross", 15.5),), r"group_targets cross is 15\.5; .* mean rank of 14 at most"),
    ],
)
def test_groups_that_cannot_be_are_named(groups, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        toy.adapt(toy.Transformer(), group_targets=groups)


# --- going on ---------------------------------------------------------------------------------


def test_a_loaded_control_goes_on_exactly() -> None:
    first = control(group_targets=HALVES)
    for step in range(7):
        first.observe(0.1 * step + 0.3, (4.0 + step, 9.0 - step))
    state = json.loads(json.dumps(first.state()))
    second = control(group_targets=HALVES)
    second.load_state(state)
    for step in range(7):
        for steered in (first, second):
            steered.observe(0.2 * step, (3.0 + step, 8.0))
        assert second.state() == first.state()
        loss = torch.tensor(0.4)
        assert torch.equal(second.term(loss), first.term(loss))
    assert state != first.state()  # what was handed out is a copy


def test_a_state_of_other_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="steers 2 groups of ranks and this run 1"):
        control(target_rank=5.0).load_state(control(group_targets=HALVES).state())


# --- anti-windup ------------------------------------------------------------------------------


@pytest.mark.parametrize("unreached", [100, 10_000])
def test_kappa_comes_back_from_a_target_out_of_reach(unreached: int) -> None:
    """However long the mean was held below its target, the way back is as long."""
    steps = 100
    steered = control(steps, target_rank=10.0)
    first = steered.kappas[0]
    for _ in range(unreached):
        steered.observe(1.0, [1.0])
    assert 0 > steered.kappas[0] >= -3 * first
    waited = 0
    while steered.kappas[0] < first:
        steered.observe(1.0, [13.0])
        waited += 1
    # From a thousandth, with the factor 3, at an excess of 0.3.
    assert waited <= math.ceil(math.log(1e3 / 3) / (steered.gain * 0.3)) + 1


def test_a_limit_that_is_lifted_is_answered_within_bounded_steps() -> None:
    """Twice the rank is asked for that layers may take; then they may, and take far more."""
    student = toy.Parallel(6, 24)
    task = toy.TeacherTask(student, [24] * 6)
    net = toy.adapt(student, "layers", target_rank=12.0, max_rank=24)
    limits, bounds = net.budget.max_ranks.clone(), net._log_nu_bounds
    net.budget.max_ranks.fill_(6)
    net._log_nu_bounds = (bounds[0] + math.log(4), bounds[1])
    config = TrainConfig(
        rank=net.config, steps=400, batch_size=8, learning_rate=1e-2, entropy_weight=0, probes=0
    )
    trainer = Trainer(net, task, config)
    control, first = trainer.control, trainer.control.kappas[0]
    events = trainer.run()
    assert {next(events).mean_rank for _ in range(150)} <= {12.0, 6.0}
    assert -3 * first <= control.kappas[0] < 0
    net.budget.max_ranks.copy_(limits)
    net._log_nu_bounds = bounds
    with torch.no_grad():
        net.log_nu.copy_(bounds[0])
    answers = [(next(events).mean_rank, control.kappas[0]) for _ in range(60)]
    assert answers[0][0] == 24
    assert all(kappa > 0 for _, kappa in answers)  # it pushes down at once
    assert statistics.fmean(mean for mean, _ in answers[-10:]) == pytest.approx(12, rel=0.2)
    assert answers[-1][1] > answers[0][1] > first / 1e3
