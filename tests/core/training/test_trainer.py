"""The loop: eq. 14 step by step, what it does to ranks, and how it ends."""

from __future__ import annotations

import itertools
import math
import statistics
from contextlib import suppress

import numpy as np
import pytest
import torch
from lora2_pack.lora2_core import adaptive_rank, lora_file
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.config.ranks import Prior
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.training import objective
from lora2_pack.lora2_core.training.trainer import StepEvent, TrainingError, train
from lora2_pack.tests.core import toy

torch.set_num_threads(1)

TRUE_RANKS = [0, 1, 4, 16] * 2
LOG_TAIL = -math.log(1 - 0.9)


def small(scale: float = 1.0, **rank) -> tuple[AdaptiveRankNetwork, toy.TeacherTask]:
    student = toy.Parallel(3, 16)
    task = toy.TeacherTask(student, [0, 2, 5], scale)
    return toy.adapt(student, "layers", **{"target_rank": 4.0, **rank}), task


def cross(model: toy.Transformer) -> objective.CrossAttentionEntropy:
    return objective.CrossAttentionEntropy([block.attn2 for block in model.blocks])


def setting(net: AdaptiveRankNetwork, **changes) -> TrainConfig:
    plain = {"steps": 5, "entropy_weight": 0.0, "probes": 0, "learning_rate": 1e-2}
    return TrainConfig(rank=net.config, **{**plain, **changes})


def state_of(net: AdaptiveRankNetwork) -> list[torch.Tensor]:
    return [p.detach().clone() for p in [*net.weights(), net.log_nu]]


class Spoiled:
    """A task whose ``at``-th prediction, or its gradient, is multiplied by infinity."""

    def __init__(self, task: toy.TeacherTask, at: int, gradient: bool = False):
        self.task, self.at, self.gradient, self.calls = task, at, gradient, 0
        self.draw, self.spread = task.draw, task.spread
        self.state, self.load_state = task.state, task.load_state

    def predict(self, batch):
        said = self.task.predict(batch)
        self.calls += 1
        if self.calls == self.at:
            if self.gradient:
                said.value.register_hook(lambda grad: grad * math.inf)
            else:
                said = objective.Prediction(said.value * math.inf, said.target)
        return said


# --- eq. 14 -----------------------------------------------------------------------------------


def literal_step(net: AdaptiveRankNetwork, model, task, config: TrainConfig) -> dict:
    """Every term of one step in float64 from the weights as they are, ΔW written out."""
    parts = {}
    nus = np.exp(net.log_nu.detach().double().numpy())
    for target, layer, nu in zip(net.targets, net.layers, nus, strict=True):
        x = np.arange(1, layer.rank + 1)
        f = (1 - np.exp(-nu * (x + 1))) - (1 - np.exp(-nu * x))
        up, down = (t.detach().double().numpy() for t in (layer.lora_up, layer.lora_down))
        parts[target.name] = layer.base.weight.double().numpy() + up @ np.diag(f) @ down
    plain = toy.Transformer(blocks=1).double()
    for name, weight in parts.items():
        plain.get_submodule(name).weight.copy_(torch.from_numpy(weight))
    seen = []
    for name in ("to_q", "to_k"):
        plain.blocks[0].attn2.get_submodule(name).register_forward_hook(
            lambda _m, _a, out: seen.append(out)
        )
    x, context = task.draw(torch.Generator().manual_seed(config.seed ^ 0x5EED), config.batch_size)
    prediction = plain(x.double(), context.double()).numpy()
    loss = np.mean((prediction - x.double().numpy() @ task.matrix.double().numpy()) ** 2)
    rank = config.rank
    penalty = rank.rank_weight * np.abs(nus - LOG_TAIL / rank.target_rank).sum()
    prior = rank.nu_prior.weight * (
        ((nus - rank.nu_prior.mean) ** 2 / (2 * rank.nu_prior.std**2)).sum()
        + len(nus) * np.log(rank.nu_prior.std)
    )
    std = rank.weight_prior.std
    for weight in (w.detach().double().numpy() for w in net.weights()):
        prior += rank.weight_prior.weight * (
            (weight**2 / (2 * std**2)).sum() + weight.size * np.log(std)
        )
    entropy = toy.entropy_in_numpy(*seen, heads=2)
    total = loss + config.entropy_weight * entropy + penalty + prior
    return {"loss": loss, "entropy": entropy, "rank_term": penalty, "total": total}


def test_one_step_of_paper_mode_is_equation_14(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.Transformer(blocks=1)
    task = toy.TransformerTask(model)
    net = toy.adapt(
        model,
        mode="paper",
        start="target",
        target_rank=7.0,
        rank_weight=0.03,
        nu_prior=Prior(weight=0.01, mean=0.5, std=2.0),
        weight_prior=Prior(weight=0.002, std=3.0),
    )
    with torch.no_grad():
        net.log_nu += torch.linspace(-0.4, 0.4, len(net.targets))
        for layer in net.layers:
            layer.lora_up.normal_(0, 0.1, generator=torch.Generator().manual_seed(8))
    config = setting(net, steps=1, entropy_weight=0.05, batch_size=3, seed=11)
    expected = literal_step(net, model, task, config)
    totals = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda t, *a, **k: (totals.append(t.item()), backward(t, *a, **k))
    )
    (event,) = train(net, task, config, cross(model))
    for name in ("loss", "entropy", "rank_term"):
        assert getattr(event, name) == pytest.approx(expected[name], rel=1e-5), name
    # The task and what regularises ν: their gradients add up.
    assert sum(totals) == pytest.approx(expected["total"], rel=1e-5)


def test_the_balanced_term_is_kappa_times_loss_times_mean_rank_over_target() -> None:
    net, task = small(rank_weight=0.01, controller_gain=0.0)
    events = toy.run(net, task, steps=3, learning_rate=1e-4)
    memory = events[0].loss
    assert events[0].rank_term == pytest.approx(0.01 * events[0].loss, rel=1e-5)
    assert events[1].rank_term == pytest.approx(0.01 * memory, rel=0.05)  # ν moved by 2 %
    memory = 0.98 * memory + 0.02 * events[1].loss
    assert events[2].rank_term == pytest.approx(0.01 * memory, rel=0.05)


def test_without_weight_the_entropy_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = objective.attention_entropy
    monkeypatch.setattr(objective, "attention_entropy", lambda *a: calls.append(1) or plain(*a))
    for weight, expected in ((0.0, 0), (1e-3, 3)):  # two cross-attentions at once, three steps
        model = toy.Transformer(blocks=2)
        net, hooked = toy.adapt(model, target_rank=4), []
        for block in model.blocks:
            block.attn2.to_q.register_forward_pre_hook(
                lambda module, _args, hooked=hooked: hooked.append(len(module._forward_hooks))
            )
        calls.clear()
        events = toy.run(
            net, toy.TransformerTask(model), cross(model), steps=3, entropy_weight=weight
        )
        assert len(calls) == expected
        assert hooked == [1 if weight else 0] * 6
        assert all((event.entropy > 0) == (weight > 0) for event in events)


# --- events, probes, seeds --------------------------------------------------------------------


def test_one_event_a_step() -> None:
    net, task = small()
    events = toy.run(net, task, steps=12, probes=3)
    assert [event.step for event in events] == list(range(1, 13))
    assert {event.steps for event in events} == {12}
    for before, event in itertools.pairwise(events):
        changed = sum(a != b for a, b in zip(before.ranks, event.ranks, strict=True))
        assert event.resized == changed
        assert event.mean_rank == statistics.fmean(event.ranks)
        assert event.seconds > 0
    assert list(events[-1].ranks) == net.ranks


@pytest.mark.parametrize(
    ("steps", "probes", "expected"),
    [(12, 3, [1, 4, 8, 12]), (10, 4, [1, 3, 6, 9, 10]), (1, 25, [1]), (5, 0, [])],
)
def test_probes_are_spread_over_the_run(steps: int, probes: int, expected: list[int]) -> None:
    net, task = small()
    events = toy.run(net, task, steps=steps, probes=probes)
    assert [event.step for event in events if event.probe is not None] == expected


def test_probing_changes_nothing_and_is_the_same_for_every_seed() -> None:
    runs = []
    for probes in (0, 6):
        net, task = small()
        toy.run(net, task, steps=6, probes=probes)
        runs.append(state_of(net))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    values = []
    for seed in (1, 1, 2):
        net, task = small()
        values.append(toy.run(net, task, steps=1, probes=1, seed=seed, learning_rate=1e-9)[0].probe)
    assert values[0] == values[1] == values[2]  # the adapters do nothing yet, the draws are fixed


@pytest.mark.parametrize("mode", adaptive_rank.MODES)
def test_a_seed_decides_every_byte_of_the_file(mode: str, tmp_path) -> None:
    def file(seed: int) -> bytes:
        model = toy.Transformer()
        net = toy.adapt(model, seed=seed, mode=mode, target_rank=4.0, max_rank=8)
        toy.run(
            net, toy.TransformerTask(model), cross(model), steps=25, seed=seed, entropy_weight=1e-3
        )
        return lora_file.save(tmp_path / "x.safetensors", net.components(), {"a": "b"}).read_bytes()

    first = file(1)
    assert first == file(1)
    assert first != file(2)


# --- the end ----------------------------------------------------------------------------------


def test_stop_ends_before_the_next_step() -> None:
    net, task = small()
    before = state_of(net)
    assert list(train(net, task, setting(net), stop=lambda: True)) == []
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(net), strict=True))
    seen: list[StepEvent] = []
    for event in train(net, task, setting(net), stop=lambda: len(seen) == 3):
        seen.append(event)
    assert len(seen) == 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(precision: str) -> None:
    net, task = small()
    steps = train(net, Spoiled(task, at=3), setting(net, precision=precision))
    next(steps), next(steps)
    before, ranks = state_of(net), net.ranks
    with pytest.raises(TrainingError, match=r"became inf at step 3.*learning_rate.*0\.01"):
        next(steps)
    assert net.ranks == ranks
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(net), strict=True))


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(
            "fp32",
        ),
        "fp16",
    ],
)
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(precision: str) -> None:
    net, task = small()
    spoiled = Spoiled(task, at=2, gradient=True)
    with suppress(TrainingError):  # ending the run is as good as leaving the step out
        list(train(net, spoiled, setting(net, precision=precision)))
    assert spoiled.calls >= 2
    assert all(value.isfinite().all() for value in state_of(net))


def test_the_message_names_the_term_that_is_not_finite() -> None:
    model = toy.Transformer()
    net = toy.adapt(model, target_rank=4)
    model.blocks[1].attn2.to_k.base.weight[0, 0] = 3e38
    entropy = objective.CrossAttentionEntropy([model.blocks[1].attn2])

    class Detached(toy.TransformerTask):
        def predict(self, batch):
            said = super().predict(batch)
            finite = torch.where(said.value.isfinite(), said.value, 0 * said.target)
            return objective.Prediction(finite, said.target)

    with pytest.raises(TrainingError, match="entropy"):
        toy.run(net, Detached(model), entropy, entropy_weight=1e-3, steps=1)


def test_the_frozen_model_is_bit_identical_after_training() -> None:
    model = toy.Transformer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = toy.noise(2, 6, 16), toy.noise(2, 5, 12)
    output = model(*inputs)
    net = toy.adapt(model, target_rank=4)
    toy.run(net, toy.TransformerTask(model), cross(model), steps=20, entropy_weight=1e-3)
    assert not torch.allclose(model(*inputs), output)
    toy.silence(net)
    assert torch.equal(model(*inputs), output)
    after = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# --- what happens to the ranks ----------------------------------------------------------------


def test_importance_of_the_network_is_one_call_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = adaptive_rank.importance_at
    monkeypatch.setattr(
        adaptive_rank,
        "importance_at",
        lambda *a: calls.append(torch.is_grad_enabled()) or plain(*a),
    )
    net, task = small()
    calls.clear()
    for event in train(net, task, setting(net, steps=40, probes=4)):
        extra = (event.resized > 0) + (event.probe is not None)  # without gradients
        first = event.step == 1  # what the loss is to be judged by
        assert calls == [False] * first + [True] + [False] * extra
        calls.clear()


@pytest.mark.parametrize(("mode", "fraction"), [("balanced", 0.2), ("paper", 0.5)])
def test_nu_is_held_at_the_end(mode: str, fraction: float) -> None:
    net, task = small(mode=mode, freeze_fraction=fraction, max_rank=16)
    nus, steps = [net.log_nu.detach().clone()], 20
    events = []
    for event in train(net, task, setting(net, steps=steps)):
        nus.append(net.log_nu.detach().clone())
        events.append(event)
    held = int(steps * fraction)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(nus)]
    assert moved == [True] * (steps - held) + [False] * held
    assert {event.ranks for event in events[-held:]} == {events[-1].ranks}
    assert all(event.resized == 0 for event in events[-held:])


@pytest.mark.parametrize("options", [{"hysteresis": False}, {"mode": "paper", "max_rank": 16}])
def test_ranks_are_the_quantile_of_nu_one_step_late(options) -> None:
    net, task = small(freeze_fraction=0.0, **options)
    for _ in train(net, task, setting(net, steps=1)):
        pass  # log ν has moved once and stands away from a rounding edge
    nu = net.nu.detach().clone()
    for event in train(net, task, setting(net, steps=30)):
        expected = adaptive_rank.effective_rank(nu, 0.9, net.max_ranks)
        assert list(event.ranks) == expected.tolist()
        nu = net.nu.detach().clone()


def test_a_second_run_learns_ranks_again() -> None:
    net, task = small()
    toy.run(net, task, steps=10)
    before = net.log_nu.detach().clone()
    toy.run(net, task, steps=10)
    assert not torch.equal(before, net.log_nu)


@pytest.mark.parametrize(
    ("target", "start", "left"),
    [(4.0, "maximum", 0.15), (6.0, "maximum", 0.1), (6.0, "target", 0.1), (14.0, "target", 0.1)],
)
def test_ranks_find_what_each_layer_needs_within_the_budget(
    target: float, start: str, left: float
) -> None:
    net, events = toy.teacher_run(TRUE_RANKS, steps=300, target_rank=target, start=start)
    orders = rank_order(TRUE_RANKS), rank_order(net.ranks)
    assert np.corrcoef(*orders)[0, 1] > 0.8  # Spearman's ρ
    assert events[0].mean_rank == (24 if start == "maximum" else target)
    assert events[-1].mean_rank == pytest.approx(target, rel=0.4)
    assert statistics.fmean(event.loss for event in events[-20:]) < left * events[0].loss


def rank_order(values: list[int]) -> np.ndarray:
    """The place of each value among all, ties in the middle of theirs."""
    array = np.asarray(values)
    return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])


def test_a_tenfold_loss_leaves_the_rank_path_alone_in_balanced_mode_only() -> None:
    def path(mode: str, scale: float) -> np.ndarray:
        options = {"mode": mode, "max_rank": 24}
        if mode == "paper":
            options["rank_weight"] = 1e-2
        _, events = toy.teacher_run(TRUE_RANKS, steps=200, scale=scale, **options)
        return np.array([event.ranks for event in events])

    plain, louder = path("balanced", 1.0), path("balanced", 10**0.5)
    assert np.abs(plain - louder).max() <= 2
    assert np.abs(plain[-1] - plain[0]).max() > 2  # the path is one
    assert np.abs(path("paper", 1.0)[-1] - path("paper", 10**0.5)[-1]).max() > 5
