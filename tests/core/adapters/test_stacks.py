"""A and B of many components in one tensor each: folded, padded, split, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters import network as network_module
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.stacks import WeightStack
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.tests.core import stacked, toy
from torch import Tensor, nn

torch.set_num_threads(1)

CPU = torch.device("cpu")
RANKS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def stack_of(
    ranks: list[int],
    inner: int = 5,
    out: int = 7,
    dtype: torch.dtype = torch.float32,
    together: int = 1,
) -> WeightStack:
    made = WeightStack(range(len(ranks)), inner, out, ranks, dtype, CPU, together)
    with torch.no_grad():
        made.down.copy_(toy.noise(made.rows, inner))
        made.up.copy_(toy.noise(made.rows, out, seed=1))
    return made


# --- folding ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    RANKS,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from(["learns", "frozen", None]),
)
def test_what_is_folded_is_lambda_a_and_b_and_so_are_its_gradients(
    ranks: list[int], dtype: torch.dtype, importance: str | None
) -> None:
    """Those of plain autograd, bit by bit; gradients in fp32, as the weights are."""
    made, scale = stack_of(ranks, dtype=dtype), None
    if importance is not None:
        scale = toy.noise(made.rows, seed=2).requires_grad_(importance == "learns")
    inputs = [made.down, made.up] + ([scale] if importance == "learns" else [])

    def plainly() -> tuple[Tensor, Tensor]:
        down = made.down if scale is None else made.down * scale[:, None]
        return down.to(dtype), made.up.to(dtype)

    found, wanted = made.folded(scale), plainly()
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)
    grads = [toy.noise(*part.shape, seed=3 + n).to(dtype) for n, part in enumerate(found)]
    one, two = (torch.autograd.grad(parts, inputs, grads) for parts in (found, wanted))
    for a, b in zip(one, two, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


GROUPS = st.integers(1, 3).flatmap(
    lambda count: st.lists(
        st.lists(st.integers(1, 9), min_size=count, max_size=count), min_size=1, max_size=3
    )
)


@settings(deadline=None, max_examples=60)
@given(
    GROUPS,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.lists(st.sampled_from(["grow", "shrink", "keep apart", "become"]), max_size=3),
)
def test_b_of_layers_with_one_input_lies_along_a_diagonal(
    groups: list[list[int]], dtype: torch.dtype, changes: list[str]
) -> None:
    """Of each group; value and gradient are those of plain autograd, bit by bit, whatever has
    become of the rows."""
    ranks, count = [rank for group in groups for rank in group], len(groups[0])
    made = stack_of(ranks, dtype=dtype, together=count)
    for change in changes:
        made.folded(None)  # what is remembered of the rows must not outlast them
        if change == "keep apart":
            made.keep_apart(8)
        elif change == "become":
            ranks = [1 + rank % 5 for rank in ranks]
            made.become([toy.noise(r, 5) for r in ranks], [toy.noise(7, r, seed=r) for r in ranks])
        else:
            ranks = [r + 2 - n % 2 if change == "grow" else -(-r // 2) for n, r in enumerate(ranks)]
            made.take(*made.move_to(ranks))
    rows = [slot.capacity for slot in made.slots]

    def plainly() -> list[Tensor]:
        ups = made.up.to(dtype).split(rows)
        return [torch.block_diag(*ups[n : n + count]) for n in range(0, len(ups), count)]

    found, wanted = made.folded(None)[1], torch.cat(plainly())
    assert found.dtype == dtype and torch.equal(found, wanted)
    assert found.shape == (made.rows, count * 7) and made.ranks == ranks
    grad = toy.noise(*found.shape, seed=3).to(dtype)
    one, two = (torch.autograd.grad(part, made.up, grad)[0] for part in (found, wanted))
    assert one.dtype == torch.float32 and one.any(1).all() and torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_lambda_is_summed_in_fp32(dtype: torch.dtype) -> None:
    """A thousand small parts beside a large one are not lost, as they were in 8 bits."""
    made = stack_of([3], inner=4096, dtype=dtype)
    scale = torch.ones(3, requires_grad=True)
    grad = torch.full((3, 4096), 2.0**-10, dtype=dtype)
    grad[:, 0] = 1.0
    down, _ = made.folded(scale)
    (found,) = torch.autograd.grad(down, scale, grad)
    wanted = (grad.double() * made.down.detach().double()).sum(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_one_component_is_folded_alone_as_with_the_others() -> None:
    made = stack_of([3, 1, 4], dtype=torch.float16)
    made.importance = toy.noise(made.rows, seed=2)
    for place in range(3):
        rows = made.slots[place].rows
        down, up = made.folded_alone(place, torch.float64)
        assert down.dtype == up.dtype == made.dtype == torch.float64  # the next step expects it
        whole = made.folded(made.importance)
        assert torch.equal(down, whole[0][rows]) and torch.equal(up, whole[1][rows])
        made.dtype = torch.float16


# --- rows that are nobody's -------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(RANKS, st.sampled_from([1, 2, 4, 8]))
def test_rows_in_use_are_those_of_ranks_in_their_order(ranks: list[int], numbers: int) -> None:
    made = stack_of(ranks)
    made.keep_apart(numbers)
    with torch.no_grad():
        made.down.copy_(toy.noise(*made.down.shape))
    assert made.padded == any(rank % numbers for rank in ranks)
    used = made.in_use(made.down)
    assert torch.equal(used, torch.cat([made.lora_down(n) for n in range(len(ranks))]))
    assert used is made.down or made.padded
    grads = torch.autograd.grad(used.sum(), made.down)[0]
    assert grads.sum() == used.numel()


@settings(deadline=None, max_examples=30)
@given(RANKS, st.lists(st.sampled_from([1, 5, 7, 10, 35, 64]), min_size=1, max_size=4))
def test_rows_that_lie_apart_stay_where_they_are(ranks: list[int], blocks: list[int]) -> None:
    """Optimizers and averages go on with the very parameters, unless it says that they moved."""
    made, net = stack_of(ranks), toy.adapt(toy.Parallel(2, 16), "layers", target_rank=4.0)
    for numbers in blocks:
        for again in (False, True):
            weights, slots = (made.down, made.up), made.slots
            moved = made.keep_apart(numbers)
            assert not (again and moved) and made.ranks == ranks
            assert all(s.start * width % numbers == 0 for s in made.slots for width in (5, 7))
            if not moved:
                assert made.slots is slots
                assert made.down is weights[0] and made.up is weights[1]
    before = net.weights()
    net.keep_apart(1)
    assert all(a is b for a, b in zip(before, net.weights(), strict=True))


@settings(deadline=None, max_examples=30)
@given(RANKS, RANKS, st.sampled_from([1, 16, 256]))
def test_new_weights_are_what_they_were_given(
    ranks: list[int], others: list[int], numbers: int
) -> None:
    """Also where the stack was padded with other ranks before."""
    made = stack_of((others * len(ranks))[: len(ranks)])
    made.keep_apart(numbers)
    before = made.down
    downs = [toy.noise(rank, 5, seed=rank) for rank in ranks]
    ups = [toy.noise(7, rank, seed=rank + 20) for rank in ranks]
    made.become(downs, ups)
    assert made.ranks == ranks and made.down is not before
    for n, (down, up) in enumerate(zip(downs, ups, strict=True)):
        assert torch.equal(made.lora_down(n), down) and torch.equal(made.lora_up(n), up)
    assert float(made.down.detach().sum()) == pytest.approx(
        sum(float(d.sum()) for d in downs), abs=1e-4
    )
    assert all(slot.start * width % numbers == 0 for slot in made.slots for width in (5, 7))


# --- a network with and without them ----------------------------------------------------------


def model() -> nn.Sequential:
    made = nn.Sequential(
        nn.Linear(16, 12), nn.Conv2d(6, 8, 2), nn.Linear(12, 16), nn.Linear(16, 12)
    )
    toy.freeze(made, seed=0)
    return made


def forward(net_model: nn.Sequential, x: Tensor) -> Tensor:
    """(batch, 6, 5, 16) through layers of three kinds, two of them in one stack."""
    hidden = net_model[1](torch.tanh(net_model[0](x)))
    return net_model[3](torch.tanh(net_model[2](hidden.flatten(2)[..., :12])))


def pair(numbers: int, **rank: Any) -> list[tuple[nn.Sequential, AdaptiveRankNetwork]]:
    """Equal networks; the second keeps components apart, and its spare rows hold junk."""
    found = []
    for padded in (False, True):
        made = model()
        options = {"target_rank": 5.0, "hysteresis": False, **rank}
        net = toy.adapt(made, "", seed=4, **options)
        stacked.randomise(net.layers, 0.3)
        if padded:
            net.keep_apart(numbers)
            spoil(net)
        found.append((made, net))
    return found


@torch.no_grad()
def spoil(net: AdaptiveRankNetwork) -> None:
    """Junk into every row that no rank has."""
    for stack in net.all_stacks:
        assert stack.padded
        for slot in stack.slots:
            for weight in (stack.down, stack.up):
                weight[slot.start + slot.rank : slot.start + slot.capacity] = 3.0


def total(net: AdaptiveRankNetwork) -> Tensor:
    grads = [weight.grad for weight in net.weights() if weight.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def assert_alike(one: AdaptiveRankNetwork, other: AdaptiveRankNetwork, of=stacked.own) -> None:
    parts = stacked.by_component(one, of), stacked.by_component(other, of)
    for a, b in zip(*parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["balanced", "paper", "fixed"])
def test_rows_that_are_nobody_s_are_inert_whatever_they_hold(mode: str) -> None:
    """Outputs, gradients, their norm, Λ, what is saved: as if they were not there."""
    options = {"mode": mode} | ({"start": "target"} if mode == "paper" else {})
    (plain_model, plain), (padded_model, padded) = pair(256, **options)
    x = toy.noise(2, 6, 5, 16)
    for net, made in ((plain, plain_model), (padded, padded_model)):
        net.refresh()
        forward(made, x).square().sum().backward()
    torch.testing.assert_close(forward(plain_model, x), forward(padded_model, x))
    assert_alike(plain, padded, stacked.grad_of)
    torch.testing.assert_close(total(plain), total(padded))
    if mode != "fixed":
        torch.testing.assert_close(plain.log_nu.grad, padded.log_nu.grad, rtol=1e-5, atol=1e-6)
    for stack in padded.all_stacks:
        for weight in (stack.down, stack.up):
            unused = torch.ones(stack.rows, dtype=torch.bool)
            for slot in stack.slots:
                unused[slot.rows] = False
            assert unused.any() and not stacked.grad_of(weight)[unused].any()
            assert not stack.importance[unused].any()
            used = stack.in_use(weight).detach()
            assert (used.square().sum() + weight.detach()[unused].square().sum()).isclose(
                weight.detach().square().sum()
            )
    for one, other in zip(plain.layers, padded.layers, strict=True):
        assert torch.equal(one.importance, other.importance)
    for one, other in zip(plain.components(), padded.components(), strict=True):
        assert torch.equal(one.lora_down, other.lora_down)
        assert torch.equal(one.lora_up, other.lora_up)
        assert torch.equal(one.importance, other.importance)
    one, other = plain.state(), padded.state()
    for name, sides in one["layers"].items():
        assert all(torch.equal(sides[key], other["layers"][name][key]) for key in sides)
    assert one["ranks"] == other["ranks"] == plain.ranks


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(*[st.integers(1, n) for n in (12, 8, 12, 12)]), min_size=1, max_size=4),
    st.sampled_from(["zero", "random"]),
)
def test_a_rank_that_grows_into_spare_rows_begins_as_elsewhere(
    plan: list[tuple[int, ...]], growth: str
) -> None:
    (_, plain), (_, padded) = pair(256, growth=growth)
    for ranks in plan:
        wanted = [float(rank) for rank in ranks]
        for net in (plain, padded):
            toy.resize(net, wanted, torch.optim.SGD(net.weights(), 0.1))
        assert plain.ranks == padded.ranks == list(ranks)
        for a, b in zip(*(stacked.by_component(n) for n in (plain, padded)), strict=True):
            assert torch.equal(a, b)
        if any(stack.padded for stack in padded.all_stacks):
            for stack in padded.all_stacks:
                if stack.padded:
                    with torch.no_grad():
                        for slot in stack.slots:
                            stack.up[slot.start + slot.rank : slot.start + slot.capacity] = 5.0


def test_a_state_goes_from_one_layout_to_the_other() -> None:
    (_, plain), (_, padded) = pair(256)
    toy.resize(plain, [3.0, 8.0, 2.0, 9.0], torch.optim.SGD(plain.weights(), 0.1))
    state = plain.state()
    padded.load_state(state)
    fresh = toy.adapt(model(), "", seed=9, target_rank=5.0, hysteresis=False)
    fresh.load_state(padded.state())
    for net in (padded, fresh):
        assert net.ranks == [3, 8, 2, 9]
        for a, b in zip(*(stacked.by_component(n) for n in (plain, net)), strict=True):
            assert torch.equal(a, b)


# --- several stacks of one shape --------------------------------------------------------------


def split(monkeypatch: pytest.MonkeyPatch, largest: int, make: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(network_module, "_LARGEST_STACK", largest)
        return make()


@pytest.mark.parametrize("largest", [1, 4 * 4 * 16, 400])
def test_a_huge_network_is_split_and_computes_the_same(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, context = toy.noise(2, 6, 16), toy.noise(2, 5, 12)
    outputs, nets = [], []
    for size in (1 << 26, largest):
        made = toy.Transformer()
        net = split(
            monkeypatch, size, lambda made=made: toy.adapt(made, "attn|ff", target_rank=4.0)
        )
        stacked.randomise(net.layers, 0.3)
        toy.resize(net, [float(1 + n % 7) for n in range(18)], torch.optim.SGD(net.weights(), 0.1))
        net.refresh()
        outputs.append(made(x, context))
        outputs[-1].square().sum().backward()
        nets.append(net)
    whole, parts = nets
    assert len(whole.all_stacks) == 3 < len(parts.all_stacks)
    torch.testing.assert_close(*outputs)
    assert_alike(whole, parts)
    assert_alike(whole, parts, stacked.grad_of)
    torch.testing.assert_close(whole.log_nu.grad, parts.log_nu.grad, rtol=1e-5, atol=1e-6)
    assert sorted(c for stack in parts.all_stacks for c in stack.components) == list(range(18))
    for layer, (stack, place) in zip(parts.layers, stacked.places(parts), strict=True):
        group, within = layer.group
        assert group.stack is stack and group.places[within] == place
    if largest == 1:  # every group alone, and none torn apart
        assert len(parts.all_stacks) == len({layer.group[0] for layer in parts.layers}) == 12
    else:
        assert all(
            len({layer.group[0] for layer in parts.layers if layer._held[0] is stack}) == 1
            or 4 * len(stack.components) * 16 <= largest
            for stack in parts.all_stacks
        )
    whole.load_state(parts.state())
    assert_alike(whole, parts)


def test_layers_of_another_type_have_stacks_of_their_own() -> None:
    """Or one half would be folded anew by each of its layers."""
    made = toy.Parallel(4, 16)
    for n in (0, 2):
        made.layers[n].half()
    net = toy.adapt(made, "layers", target_rank=4.0)
    assert [stack.components for stack in net.all_stacks] == [(0, 2), (1, 3)]
    assert [stack.dtype for stack in net.all_stacks] == [torch.float16, torch.float32]
    assert [layer.group[0].takes(toy.noise(3, 16)) for layer in net.layers] == 2 * [False, True]
    assert [layer(toy.noise(3, 16).half()).dtype for layer in net.layers[::2]] == [torch.half] * 2


def test_text_encoders_have_stacks_of_their_own() -> None:
    """Their learning rate may be another, and so may what they are computed in."""
    roots = {"unet": toy.Parallel(2, 16), "te1": toy.Parallel(2, 16).half()}
    targets = [t for root, made in roots.items() for t in find_targets(made, "layers", root)]
    net = AdaptiveRankNetwork(roots, targets, RankConfig.balanced(target_rank=4.0))
    assert [stack.components for stack in net.all_stacks] == [(0, 1), (2, 3)]
    assert [stack.dtype for stack in net.all_stacks] == [torch.float32, torch.float16]
    unet, texts = net.weights(text=False), net.weights(text=True)
    assert [id(w) for w in (*unet, *texts)] == [
        id(w) for stack in net.all_stacks for w in (stack.down, stack.up)
    ]
