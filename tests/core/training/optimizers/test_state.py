"""What optimizers remember survives a change of rank and an end of the process."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters.rank_change import RankChange, ResizedWeight
from lora2_pack.lora2_core.config.train import OptimizerConfig
from lora2_pack.lora2_core.training.optimizers.make import make_optimizer
from lora2_pack.lora2_core.training.optimizers.state import (
    follow,
    load_optimizer_state,
    optimizer_state,
)
from lora2_pack.tests.core import toy
from lora2_pack.tests.core.stacked import by_component, move
from torch import Tensor, nn

torch.set_num_threads(1)

NAMES = ("adamw", "adamw8bit", "prodigy")
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "prodigy": ("exp_avg", "exp_avg_sq", "s", "p0")}


def made(name: str, *groups: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate = 1.0 if name == "prodigy" else 1e-2
    return make_optimizer(OptimizerConfig(name=name), [(group, rate) for group in groups])


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(toy.noise(*shape, seed=seed))


def walk(optimizer: torch.optim.Optimizer, steps: range, skip: tuple[int, ...] = ()) -> None:
    """Steps whose gradients belong to a step and a place; ``skip``: places without one."""
    weights = [w for group in optimizer.param_groups for w in group["params"]]
    for step in steps:
        for place, weight in enumerate(weights):
            grad = weight.detach() + toy.noise(*weight.shape, seed=100 * step + place)
            weight.grad = None if place in skip else grad
        optimizer.step()


def resized(tensor: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """By hand: of each component rows beyond are left out, new ones are zero."""
    parts = []
    for rows, count in zip(tensor.split(list(old)), new, strict=True):
        kept = rows[:count]
        parts += [kept, tensor.new_zeros(count - len(kept), *tensor.shape[1:])]
    return torch.cat(parts)


def change(optimizer, weight: nn.Parameter, old: Sequence[int], new: Sequence[int]):
    resize = ResizedWeight.of(weight, move(old, new))
    follow(optimizer, RankChange((resize,)))
    return resize.new


def opened(state: dict, number: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """A moment of bitsandbytes in fp32, and the size of a quantization step around each value.

    By the meaning of its format, not by its own functions: a code for each number, and the
    largest of each 256 numbers in a row.
    """
    stored = state[f"state{number}"]
    if stored.dtype == torch.float32:
        return stored.clone(), torch.zeros(shape)
    code, scale = state[f"qmap{number}"], state[f"absmax{number}"]
    of_each = scale.repeat_interleave(256)[: stored.numel()]
    places = stored.flatten().long()
    gaps = torch.maximum(code.diff(prepend=code[:1]), code.diff(append=code[-1:]))
    value = code[places] * of_each
    return value.view(shape), (gaps[places] * of_each).view(shape)


# --- a change of rank -------------------------------------------------------------------------


CHANGES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["adamw", "prodigy"]), CHANGES, st.integers(1, 30))
def test_surviving_rows_keep_everything_and_new_ones_begin_at_zero(
    name: str, changes: list[tuple[int, int]], width: int
) -> None:
    old, new = (list(column) for column in zip(*changes, strict=True))
    weight, other = parameter(sum(old), width), parameter(3, 4, seed=1)
    optimizer = made(name, [weight, other])
    walk(optimizer, range(3))
    before = {k: v for k, v in optimizer.state[weight].items()}
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in before.items()}
    values, others = weight.detach().clone(), copy.deepcopy(optimizer.state[other])
    grown = change(optimizer, weight, old, new)
    assert torch.equal(grown.detach(), resized(values, old, new))
    after = optimizer.state[grown]
    assert set(after) == set(before)
    for moment in MOMENTS[name]:
        wanted = resized(before[moment].view_as(values), old, new)
        assert torch.equal(after[moment].view_as(grown), wanted), moment
        assert after[moment].dtype == before[moment].dtype
        assert after[moment].ndim == before[moment].ndim, moment
    assert after["step"] == before["step"]
    assert weight not in optimizer.state
    for moment in MOMENTS[name]:
        assert torch.equal(optimizer.state[other][moment], others[moment])
    walk(optimizer, range(3, 5))
    assert grown.isfinite().all()


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_surviving_rows_train_on_as_if_nothing_had_happened(name: str) -> None:
    """Cut, a weight walks as its upper rows would have; Prodigy's step size is held for that."""
    whole, cut = parameter(8, 20), parameter(8, 20)
    optimizers = made(name, [whole]), made(name, [cut])
    for optimizer in optimizers:
        walk(optimizer, range(4))
    cut = change(optimizers[1], cut, [5, 3], [4, 1])
    left = [0, 1, 2, 3, 5]
    for step in range(4, 8):
        for optimizer in optimizers:
            if name == "prodigy":
                optimizer.param_groups[0]["growth_rate"] = 1.0
        grad = toy.noise(8, 20, seed=step)
        whole.grad, cut.grad = grad, grad[left].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(whole.detach()[left], cut.detach())


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(20, 15), (15, 20), (20, 30), (20, 3), (3, 20), (1, 40), (16, 15), (15, 16)]),
    st.sampled_from([(), (3, 4), (1, 1)]),
    st.sampled_from([256, 255, 257, 300, 512]),
)
def test_moments_in_8_bits_move_by_a_quantization_step_at_most(
    ranks: tuple[int, int], neighbour: tuple[int, ...], width: int
) -> None:
    """Across 4096 numbers too, where a tensor changes between 8 bits and fp32."""
    pytest.importorskip("bitsandbytes")
    old, new = [ranks[0], *neighbour[:1]], [ranks[1], *neighbour[1:]]
    weight = parameter(sum(old), width)
    optimizer = made("adamw8bit", [weight])
    walk(optimizer, range(3))
    before = dict(optimizer.state[weight])
    grown = change(optimizer, weight, old, new)
    after = optimizer.state[grown]
    small = grown.numel() < 4096
    assert after["state1"].dtype == (torch.float32 if small else torch.uint8)
    assert ("absmax1" in after) == ("qmap1" in after) == (not small)
    assert after["step"] == before["step"] == 3
    for number in (1, 2):
        was, _ = opened(before, number, weight.shape)
        now, step = opened(after, number, grown.shape)
        wanted = resized(was, old, new)
        assert ((now - wanted).abs() <= step * 1.001).all()
        assert (now[wanted == 0] == 0).all()  # new rows begin at zero exactly
        if small:
            assert torch.equal(now, wanted)
        assert wanted.abs().max() > 0
    walk(optimizer, range(3, 6))
    assert grown.isfinite().all()
    assert after["state1"].dtype == optimizer.state[grown]["state1"].dtype


def test_a_resized_state_in_8_bits_is_like_one_that_was_born_so() -> None:
    pytest.importorskip("bitsandbytes")
    small, born = parameter(10, 300), parameter(20, 300)
    optimizer = made("adamw8bit", [small, born])
    walk(optimizer, range(2))
    grown = change(optimizer, small, [10], [20])
    one, other = optimizer.state[grown], optimizer.state[born]
    assert set(one) == set(other)
    for name, value in other.items():
        if torch.is_tensor(value):
            assert one[name].shape == value.shape, name
            assert one[name].dtype == value.dtype, name
    assert one["qmap1"] is other["qmap1"]


@pytest.mark.parametrize(("width", "whole"), [(300, True), (256, True), (300, False)])
def test_many_changes_of_rank_do_not_wear_moments_in_8_bits_out(width: int, whole: bool) -> None:
    """Bit by bit the same where blocks stay whole; else 1 % after 40 changes."""
    pytest.importorskip("bitsandbytes")
    few, many = ([24], [30]) if whole else ([7, 17], [10, 20])
    weight = parameter(24, width)
    optimizer = made("adamw8bit", [weight])
    walk(optimizer, range(5))
    start = [opened(optimizer.state[weight], n, weight.shape)[0] for n in (1, 2)]
    for _ in range(20):
        weight = change(optimizer, change(optimizer, weight, few, many), many, few)
    for number, was in zip((1, 2), start, strict=True):
        now, _ = opened(optimizer.state[weight], number, weight.shape)
        apart = float((now - was).norm() / was.norm())
        print(f"moment {number}, {tuple(weight.shape)}, after 40 changes: {apart:.2e} apart")
        assert apart < (1e-6 if whole else 0.01)


def test_no_second_moment_becomes_zero_by_a_large_neighbour() -> None:
    """Adam divides by it: with a first moment that is left, the next step would be huge."""
    pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.zeros(64, 128))
    optimizer = made("adamw8bit", [weight])
    weight.grad = torch.full_like(weight, 1e-4)
    weight.grad[32:] = 1.0  # blocks of its own, until rows move up by half a block
    optimizer.step()
    grown = change(optimizer, weight, [32, 32], [31, 33])
    moment, _ = opened(optimizer.state[grown], 2, grown.shape)
    assert (moment[:63] > 0).all()
    assert (moment[63:] == 0).all()
    grown.grad = torch.zeros_like(grown)
    before = grown.detach().clone()
    optimizer.step()
    assert (grown.detach() - before).abs().max() < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_groups_stays(name: str) -> None:
    weights = [parameter(4, 6, seed=n) for n in range(5)]
    optimizer = made(name, weights[:3], weights[3:])
    walk(optimizer, range(2))
    resizes = tuple(ResizedWeight.of(weights[place], move([4], [5])) for place in (4, 1))
    follow(optimizer, RankChange(resizes))
    first, second = (resize.new for resize in resizes)
    groups = [group["params"] for group in optimizer.param_groups]
    wanted = [[weights[0], first, weights[2]], [weights[3], second]]
    wanted[0][1], wanted[1][1] = second, first
    assert all(
        a is b for g, w in zip(groups, wanted, strict=True) for a, b in zip(g, w, strict=True)
    )
    assert all(w.requires_grad for group in groups for w in group)
    assert set(optimizer.state) == {w for group in groups for w in group}


@pytest.mark.parametrize("name", NAMES)
def test_before_the_first_step_there_is_nothing_to_carry(name: str) -> None:
    optimizer = made(name, [weight := parameter(4, 6)])
    grown = change(optimizer, weight, [4], [6])
    assert grown not in optimizer.state
    walk(optimizer, range(2))
    assert not torch.equal(grown.detach()[:4], parameter(4, 6).detach())


@pytest.mark.parametrize(("old", "new"), [([4], [9]), ([3, 1], [5, 4]), ([1, 3], [6, 2])])
def test_rows_drawn_anew_are_no_way_that_prodigy_has_gone(old: list[int], new: list[int]) -> None:
    pytest.importorskip("prodigyopt")
    zero = nn.Parameter(torch.zeros(4, 6))  # B: Prodigy keeps one 0 for where it began
    optimizer = made("prodigy", [weight := parameter(4, 6), zero])
    walk(optimizer, range(2))
    origin = optimizer.state[weight]["p0"].view(4, 6).clone()
    assert optimizer.state[zero]["p0"].ndim == 0
    for own, began in ((weight, origin), (zero, torch.zeros(4, 6))):
        resize = ResizedWeight.of(own, move(old, new))
        grown = resize.new
        drawn = resized(torch.ones(4, 6), old, new) == 0
        with torch.no_grad():
            grown[drawn] = torch.randn(int(drawn.sum()))
        follow(optimizer, RankChange((resize,)))
        found = optimizer.state[grown]["p0"].view_as(grown)
        assert torch.equal(found[drawn], grown.detach()[drawn]) and found[drawn].all()
        assert torch.equal(found[~drawn], resized(began, old, new)[~drawn])
    walk(optimizer, range(2, 4))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_other_optimizers_take_nothing_of_what_is_drawn(name: str) -> None:
    optimizer = made(name, [weight := parameter(4, 6)])
    walk(optimizer, range(1))
    before = copy.deepcopy(optimizer.state[weight])
    resize = ResizedWeight.of(weight, move([4], [6]))
    with torch.no_grad():
        resize.new[4:].normal_()
    follow(optimizer, RankChange((resize,)))
    after = optimizer.state[resize.new]
    assert set(before) == set(after)
    for key, value in before.items():
        if torch.is_tensor(value):
            wanted = resized(value, [4], [6]) if value.shape == weight.shape else value
            assert torch.equal(after[key], wanted), key


# --- an end of the process --------------------------------------------------------------------


def assert_tree(node: object) -> None:
    assert isinstance(node, (dict, list, Tensor, int, float, str, bool, type(None))), type(node)
    if isinstance(node, dict):
        assert all(isinstance(key, str) for key in node)
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        assert_tree(child)


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_optimizer_goes_on_bit_by_bit(name: str, resize: bool) -> None:
    """Two groups, sizes on both sides of 4096, and a weight that has had no gradient yet."""
    weights = [parameter(20, 300), parameter(5, 7, seed=1), parameter(14, 300, seed=2)]
    optimizer = made(name, weights[:2], [weights[2], parameter(2, 2, seed=3)])
    walk(optimizer, range(6), skip=(3,))
    if resize:
        weights[0] = change(optimizer, weights[0], [12, 8], [5, 4])  # to fp32
        weights[2] = change(optimizer, weights[2], [6, 8], [9, 8])
        walk(optimizer, range(6, 8), skip=(3,))
    saved = copy.deepcopy(optimizer_state(optimizer))
    assert_tree(saved)
    assert set(saved["parameters"]) == {"0", "1", "2"}
    groups = [
        [nn.Parameter(w.detach().clone()) for w in g["params"]] for g in optimizer.param_groups
    ]
    fresh = made(name, *groups)
    load_optimizer_state(fresh, saved)
    places = [p for group in fresh.param_groups for p in group["params"]]
    for place, values in saved["parameters"].items():
        for key, value in values.items():
            found = fresh.state[places[int(place)]][key]
            if torch.is_tensor(value):
                assert found.dtype == value.dtype and torch.equal(found, value), key
                assert found.data_ptr() != value.data_ptr(), key  # a file's memory may go
            else:
                assert type(found) is type(value) and found == value, key
    for steps in (range(8, 12),):
        walk(optimizer, steps), walk(fresh, steps)
    olds = [w for group in optimizer.param_groups for w in group["params"]]
    for old, new in zip(olds, places, strict=True):
        assert torch.equal(old, new)
        for key, value in optimizer.state[old].items():
            if torch.is_tensor(value):
                assert torch.equal(value, fresh.state[new][key]), key
    for old, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {
            k: v for k, v in new.items() if k != "params"
        }


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_can_be_resized(name: str) -> None:
    first, second = parameter(20, 300), parameter(20, 300)
    old, new = made(name, [first]), made(name, [second])
    walk(old, range(3))
    with torch.no_grad():
        second.copy_(first)
    load_optimizer_state(new, copy.deepcopy(optimizer_state(old)))
    first, second = (change(o, w, [12, 8], [9, 17]) for o, w in ((old, first), (new, second)))
    walk(old, range(3, 6)), walk(new, range(3, 6))
    assert torch.equal(first, second)


def test_a_state_of_other_groups_is_refused() -> None:
    one = made("adamw", [parameter(3, 4)])
    two = made("adamw", [parameter(3, 4)], [parameter(3, 4)])
    walk(two, range(1))
    with pytest.raises((ValueError, IndexError)):
        load_optimizer_state(one, optimizer_state(two))


def test_a_network_that_grows_tells_prodigy_where_its_new_rows_begin() -> None:
    """Else the size of freshly drawn rows counts as way, and the step size follows it."""
    pytest.importorskip("prodigyopt")
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 20))
    toy.freeze(model, seed=0)
    net = toy.adapt(model, "", target_rank=4.0, hysteresis=False, growth="random")
    optimizer = made("prodigy", net.weights())
    walk(optimizer, range(3))
    toy.resize(net, [9.0, 7.0], optimizer)
    assert net.ranks == [9, 7]
    origins = by_component(net, lambda weight: optimizer.state[weight]["p0"])
    for origin, weight in zip(origins, by_component(net), strict=True):
        assert torch.equal(origin[4:], weight[4:])
        assert weight[4:].any()
