"""Adapters and the network of them: exact deltas, honest memory, lossless resizing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import adaptive_rank
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.rank_change import RankChange
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.data.cache import weights_hash
from lora2_pack.lora2_core.training.optimizers.state import follow
from lora2_pack.tests.core import stacked, toy
from torch import Tensor, nn

torch.set_num_threads(1)

PAPER = {"mode": "paper", "start": "target", "target_rank": 8.0, "growth": "zero"}


def conv(kernel: int | tuple[int, int], **options) -> nn.Conv2d:
    base = nn.Conv2d(6, 8, kernel, **options)
    toy.freeze(base, seed=0)
    return base


# --- which layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        ("attention", 16),
        ("self-attention", 8),
        ("cross-attention", 8),
        (r"blocks\.1.*to_k", 2),
        (r"ff$", 2),
    ],
)
def test_targets_by_preset_and_pattern(selection: str, count: int) -> None:
    targets = find_targets(toy.Transformer(blocks=2), selection)
    assert len(targets) == count
    assert len({target.name for target in targets}) == count


def test_targets_work_on_meta_tensors_and_know_their_shapes() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(4, 6, (3, 2)), nn.LayerNorm(4))
    linear, convolution = find_targets(model, r"^\d")
    assert (linear.out_features, linear.in_features, linear.largest_rank) == (7, 5, 5)
    assert (convolution.out_features, convolution.in_features) == (6, 24)
    assert convolution.parameters_per_rank == 30


@pytest.mark.parametrize(
    ("selection", "text"),
    [("attn1.(", "is not a regular expression"), ("nothing_here", "matches no layer")],
)
def test_bad_targets_are_named(selection: str, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        find_targets(toy.Transformer(), selection)
    assert repr(selection) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_rank": 17}, "max_rank is 17; the largest layer of this model takes rank 16"),
        ({"target_rank": 15.0}, "target_rank is 15; this model can reach a mean rank of 14"),
        ({"target_megabytes": 1.0}, "target_megabytes is 1;.* at ranks 1 to 128 give"),
        ({"target_megabytes": 1e-3}, "target_megabytes is 0.001"),
        (
            {"target_rank": 2.0, "min_rank": 3},
            "target_rank is 2; with min_rank 3 the mean rank is 3",
        ),
    ],
)
def test_ranks_beyond_the_model_are_refused_before_it_is_touched(options, text) -> None:
    model = toy.Transformer()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=text):
        toy.adapt(model, "cross-attention", **options)
    assert [type(module) for module in model.modules()] == before


# --- the network as it starts -----------------------------------------------------------------


def test_only_adapters_and_nu_learn() -> None:
    model = toy.Transformer()
    net = toy.adapt(model, target_rank=4)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    own = [p for p in net.parameters() if p.requires_grad and p is not net.log_nu]
    assert {id(p) for p in own} == {id(p) for p in net.weights()}
    assert len(own) == 2 * len(net.all_stacks) == 6  # 3 of (16, 16), 1 of them, 2 of (12, 16)
    numbers = [layer.rank * (layer.in_features + layer.out_features) for layer in net.layers]
    assert sum(p.numel() for p in own) == sum(numbers)
    stacked.randomise(net.layers)
    net.refresh()
    model(toy.noise(2, 6, 16), toy.noise(2, 5, 12)).square().sum().backward()
    assert all(grad.any(1).all() for grad in stacked.by_component(net, stacked.grad_of))
    assert net.log_nu.grad is not None and net.log_nu.grad.all()


@pytest.mark.parametrize("mode", adaptive_rank.MODES)
def test_every_nu_lies_in_one_fp32_tensor(mode: str) -> None:
    net = toy.adapt(toy.Transformer().half(), mode=mode, target_rank=4)
    assert net.log_nu.shape == (len(net.targets),)
    assert net.log_nu.dtype == net.nu.dtype == torch.float32
    named = [name for name, _ in net.named_parameters() if "nu" in name]
    assert named == ["log_nu"]


@pytest.mark.parametrize(("mode", "rank"), [("balanced", 4), ("paper", 12)])
def test_a_new_network_changes_nothing_until_b_does(mode: str, rank: int) -> None:
    model = toy.Transformer()
    x, context = toy.noise(2, 6, 16), toy.noise(2, 5, 12)
    frozen = model(x, context)
    net = toy.adapt(model, mode=mode, target_rank=4)
    assert min(net.ranks) == rank
    assert torch.equal(model(x, context), frozen)  # B is zero
    stacked.randomise(net.layers)
    net.refresh()
    assert not torch.allclose(model(x, context), frozen)
    toy.silence(net)
    assert torch.equal(model(x, context), frozen)


def test_each_layer_is_held_to_its_own_size_and_starts_there_in_paper_mode() -> None:
    net = toy.adapt(toy.Transformer(blocks=1), mode="paper")
    assert net.ranks == [16, 16, 16, 16, 16, 12, 12, 16]
    assert toy.adapt(toy.Transformer(blocks=1), target_rank=14).ranks == [14] * 5 + [12, 12, 14]


def test_the_start_follows_the_mode() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    literal = toy.adapt(copy.deepcopy(model), "", **{**PAPER, "start": "maximum"})
    std = float(adaptive_rank.init_std(literal.nu[:1], 64))
    drawn = torch.stack([layer.lora_down for layer in literal.layers])
    assert drawn.std().item() == pytest.approx(std, rel=0.03)
    plain = toy.adapt(copy.deepcopy(model), "", target_rank=64)
    drawn = torch.stack([layer.lora_down for layer in plain.layers])
    assert 0.99 / 8 < drawn.abs().max().item() <= 1 / 8
    assert drawn.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.03)
    assert not any(layer.lora_up.any() for net in (literal, plain) for layer in net.layers)


def test_a_seed_decides_every_weight() -> None:
    def first(seed: int) -> Tensor:
        return toy.adapt(toy.Transformer(), seed=seed, target_rank=4).layers[3].lora_down

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_importance_of_the_network_is_that_of_each_component() -> None:
    net = toy.adapt(toy.Transformer(), **PAPER)
    with torch.no_grad():
        net.log_nu += torch.linspace(-0.3, 0.3, len(net.targets))
    net.refresh()
    for layer, nu in zip(net.layers, net.nu, strict=True):
        expected = adaptive_rank.importance(nu, layer.rank, "paper")
        torch.testing.assert_close(layer.importance, expected, rtol=0, atol=0)


def test_components_are_detached_copies_in_the_shape_of_the_layer() -> None:
    model = nn.Sequential(conv(3), nn.Flatten())
    net = toy.adapt(model, "0", target_rank=4)
    (component,) = net.components()
    assert component.lora_down.shape == (4, 6, 3, 3)
    assert component.lora_up.shape == (8, 4, 1, 1)
    assert component.importance.shape == (4,)
    component.lora_down.zero_()
    assert net.layers[0].lora_down.any()
    assert not any(t.requires_grad for t in vars(component).values() if torch.is_tensor(t))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-40, 40), min_size=8, max_size=8))
def test_clamped_nu_spans_every_rank_and_no_more(logs: list[float]) -> None:
    net = toy.adapt(toy.Transformer(blocks=1), target_rank=4, max_rank=12)
    with torch.no_grad():
        net.log_nu.copy_(torch.tensor(logs))
    net.clamp_nu()
    exact = adaptive_rank.expected_rank(net.nu.detach(), 0.9)
    assert (exact > 0.499).all() and (exact < 12.001).all()
    ranks = adaptive_rank.effective_rank(net.nu, 0.9, 99)
    for value, rank in zip(logs, ranks.tolist(), strict=True):
        assert rank == (12 if value < -2 else 1 if value > 1 else rank)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-40, 40), min_size=8, max_size=8), st.integers(1, 14))
def test_no_rank_falls_below_the_smallest(logs: list[float], least: int) -> None:
    net = toy.adapt(toy.Transformer(blocks=1), target_rank=14, min_rank=least, hysteresis=False)
    with torch.no_grad():
        net.log_nu.copy_(torch.tensor(logs))
    net.clamp_nu()
    net.resize(net.nu.detach())
    limits = [min(least, target.largest_rank) for target in net.targets]
    assert all(rank >= limit for rank, limit in zip(net.ranks, limits, strict=True))
    for value, rank, limit in zip(logs, net.ranks, limits, strict=True):
        assert rank == limit or value < 1
    # The least ν that is left is half a rank away from growth.
    exact = adaptive_rank.expected_rank(net.nu.detach(), 0.9)
    assert (exact > torch.tensor(limits) - 0.501).all()


def test_fingerprints_tell_models_apart() -> None:
    first, other = toy.Transformer(), toy.Transformer()
    assert weights_hash(first) == weights_hash(other)
    with torch.no_grad():
        other.blocks[0].ff.bias[3] += 1
    assert weights_hash(first) != weights_hash(other)


# --- resizing ---------------------------------------------------------------------------------


def test_memory_follows_the_rank() -> None:
    model = nn.Sequential(*(nn.Linear(64, 48) for _ in range(3)), nn.Linear(48, 64))
    net = toy.adapt(model, "", target_rank=32, hysteresis=False)
    optimizer = toy.trained(net)

    def held() -> list[int]:
        """Bytes of weights and optimizer state, storages included, by stack."""
        found = []
        for stack in net.all_stacks:
            tensors: list[Tensor] = [stack.down, stack.up]
            for weight in (stack.down, stack.up):
                tensors += [t for t in optimizer.state[weight].values() if t.numel() > 1]
            found.append(sum(t.untyped_storage().nbytes() for t in tensors))
        return found

    per_rank = 3 * 4 * (64 + 48)  # weight and two moments, fp32
    assert held() == [96 * per_rank, 32 * per_rank]
    assert toy.resize(net, [4.0, 48.0, 32.0, 5.0], optimizer).count == 3
    assert net.ranks == [4, 48, 32, 5]
    assert held() == [84 * per_rank, 5 * per_rank]
    assert len(optimizer.state) == 4  # nothing of the old parameters is left


@pytest.mark.parametrize("options", [{"target_rank": 8.0}, PAPER], ids=["balanced", "paper"])
def test_growth_leaves_the_forward_unchanged(options) -> None:
    model = nn.Sequential(conv(3, padding=1), nn.Conv2d(8, 9, 1), nn.Flatten(2), nn.Linear(30, 20))
    net = toy.adapt(model, "", **{**options, "target_rank": 6.0, "hysteresis": False})
    optimizer = toy.trained(net)
    x = toy.noise(2, 6, 5, 6)
    net.refresh()
    before = model(x)
    assert toy.resize(net, [8.0, 7.0, 20.0], optimizer).count == 3
    assert net.ranks == [8, 7, 20]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert all(layer.lora_down[6:].any(1).all() for layer in net.layers)  # new rows can learn


def test_hysteresis_holds_a_rank_until_nu_asks_for_more_than_half_its_root() -> None:
    net = toy.adapt(nn.Sequential(*(nn.Linear(40, 40) for _ in range(4))), "", target_rank=16.0)
    assert toy.resize(net, [14.0, 15.0, 18.0, 19.0], toy.trained(net)).count == 1
    assert net.ranks == [16, 16, 16, 19]


def test_random_growth_draws_new_columns_only() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    net = toy.adapt(model, "0", mode="paper", start="target", target_rank=4.0)
    optimizer = toy.trained(net)
    old = net.layers[0].lora_up.detach().clone()
    toy.resize(net, [60.0], optimizer)
    assert torch.equal(net.layers[0].lora_up[:, :4], old)
    assert net.layers[0].lora_up[:, 4:].std().item() == pytest.approx(0.02, rel=0.1)


def three_layers(rank: float = 6.0) -> AdaptiveRankNetwork:
    model = nn.Sequential(nn.Linear(16, 12), conv(2), nn.Linear(12, 20))
    return toy.adapt(model, "", target_rank=rank, hysteresis=False)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(1, 12)), min_size=1, max_size=5
    )
)
def test_surviving_rows_keep_weights_and_moments(plan: list[tuple[int, int, int]]) -> None:
    net = three_layers()
    optimizer = toy.trained(net)
    for ranks in plan:
        before = toy.snapshot(net, optimizer)
        toy.resize(net, [float(rank) for rank in ranks], optimizer)
        assert net.ranks == list(ranks)
        for old, new in zip(before, toy.snapshot(net, optimizer), strict=True):
            keep = min(len(old["weight"]), len(new["weight"]))
            assert all(torch.equal(old[name][:keep], new[name][:keep]) for name in "mv")
            assert torch.equal(old["weight"][:keep], new["weight"][:keep])
            assert not new["m"][keep:].any() and not new["v"][keep:].any()
            assert torch.equal(old["step"], new["step"])
        toy.random_steps(net, optimizer, 2)


def test_a_change_names_every_weight_that_was_replaced() -> None:
    net = three_layers()
    before = net.weights()
    change = toy.resize(net, [8.0, 6.0, 3.0], toy.trained(net))
    after = net.weights()
    assert change.count == 2
    replaced = [(a, b) for a, b in zip(before, after, strict=True) if a is not b]
    assert [place for place in range(6) if before[place] is after[place]] == [1, 4]
    for told, (old, new) in zip(change.weights, replaced, strict=True):
        assert told.old is old and told.new is new
        assert told.grew == (new.numel() > old.numel())
        assert told.move.new[0].rank == len(new) and told.move.old[0].rank == len(old)
        whole = told.begun(old.detach())
        assert torch.equal(whole, new.detach())
        kept = told.resized(old.detach())
        assert torch.equal(whole[kept != 0], kept[kept != 0]) and kept.shape == new.shape


def test_survivors_of_a_resize_train_on_as_if_nothing_had_happened() -> None:
    untouched, resized = three_layers(), three_layers()
    optimizers_of = [toy.trained(net) for net in (untouched, resized)]
    for ranks in ([8.0, 7.0, 3.0], [4.0, 8.0, 4.0], [9.0, 6.0, 12.0]):
        toy.resize(resized, ranks, optimizers_of[1])
        toy.random_steps(untouched, optimizers_of[0], 2)
        toy.random_steps(resized, optimizers_of[1], 2)
    pairs = zip(*map(toy.snapshot, (untouched, resized), optimizers_of), strict=True)
    for kept, (old, new) in zip((4, 4, 6, 6, 3, 3), pairs, strict=True):
        for name in ("weight", "m", "v"):
            torch.testing.assert_close(old[name][:kept], new[name][:kept], rtol=1e-6, atol=1e-7)


def test_a_resize_to_the_same_rank_changes_nothing_at_all() -> None:
    plain, replaced = three_layers(), three_layers()
    states = []
    for net in (plain, replaced):
        optimizer = toy.trained(net)
        if net is replaced:
            assert toy.resize(net, [6.0] * 3, optimizer).count == 0
            for stack in net.all_stacks:
                sides = stack.move_to(stack.ranks)
                stack.take(*sides)
                follow(optimizer, RankChange(sides))
                assert not any(side.grew or side.new is side.old for side in sides)
        toy.random_steps(net, optimizer, 3)
        states.append(toy.snapshot(net, optimizer))
    for first, second in zip(*states, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
