"""What optimizers remember of stacks: by component, whatever the layout of their rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.config.train import OptimizerConfig
from lora2_pack.lora2_core.training.optimizers.make import make_optimizer
from lora2_pack.lora2_core.training.optimizers.state import load_optimizer_state, optimizer_state
from lora2_pack.tests.core import stacked, toy
from torch import Tensor, nn

torch.set_num_threads(1)

NAMES = ("adamw", "adamw8bit", "prodigy")
BLOCK = 256


def network(layers: int = 4, width: int = 48, numbers: int = 1) -> AdaptiveRankNetwork:
    """Layers of one stack and one of another; every number of ranks up to their width."""
    model = nn.Sequential(toy.Parallel(layers, width), nn.Linear(width, 20))
    toy.freeze(model, seed=0)
    net = toy.adapt(model, "", target_rank=10.0, hysteresis=False)
    stacked.randomise(net.layers, 0.1)
    net.keep_apart(numbers)
    return net


def made(name: str, net: AdaptiveRankNetwork) -> torch.optim.Optimizer:
    pytest.importorskip({"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(name, "torch"))
    config: Any = OptimizerConfig(name=name, weight_decay=0.01)
    return make_optimizer(config, [(net.weights(), 1.0 if name == "prodigy" else 1e-2)])


def components(net: AdaptiveRankNetwork, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer_state(optimizer, net.all_stacks))["components"]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.keys() == other[name].keys(), name
        for key, value in values.items():
            found = other[name][key]
            if torch.is_tensor(value):
                assert value.dtype == found.dtype and value.shape == found.shape, (name, key)
                assert torch.equal(value, found), (name, key)
            else:
                assert value == found, (name, key)


def codes_of(
    net: AdaptiveRankNetwork, optimizer: torch.optim.Optimizer
) -> list[tuple[Tensor, ...]]:
    """Codes, rows are ranks, and the scale of each number, of A and B of every component; read
    from the whole state by the meaning of its format. In fp32 a number is its own code."""

    def scale(weight: nn.Parameter, number: int) -> Tensor:
        state = optimizer.state[weight]
        if state[f"state{number}"].dtype == torch.float32:
            return torch.ones(weight.shape)
        return state[f"absmax{number}"].repeat_interleave(BLOCK)[: weight.numel()]

    found = []
    for number in (1, 2):
        for of in (
            lambda weight, n=number: optimizer.state[weight][f"state{n}"],
            lambda weight, n=number: scale(weight, n),
        ):
            found.append([part.clone() for part in stacked.by_component(net, of)])
    return list(zip(*found, strict=True))


# --- 8 bits -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 7, 15, 16]), st.integers(1, 20), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_a_resize_leaves_every_code_and_scale_that_stays(
    plan: list[tuple[int, int, bool]],
) -> None:
    """Those of other components, and of its own rows that survive: bit by bit, however often."""
    net = network(width=64, layers=16, numbers=BLOCK)
    optimizer = made("adamw8bit", net)
    toy.random_steps(net, optimizer, 2)
    assert all(optimizer.state[w]["state1"].dtype == torch.uint8 for w in net.weights()[::2])
    for component, rank, steps in plan:
        if steps:
            toy.random_steps(net, optimizer, 1)
        before, old = codes_of(net, optimizer), net.ranks
        wanted = [float(r) for r in old]
        wanted[component] = float(rank)
        toy.resize(net, wanted, optimizer)
        assert net.ranks == [int(r) for r in wanted]
        for n, (was, now) in enumerate(zip(before, codes_of(net, optimizer), strict=True)):
            keep = min(old[n // 2], net.ranks[n // 2])
            for one, other in zip(was, now, strict=True):
                assert torch.equal(one[:keep], other[:keep])
            grown = [part[keep:] for part in now]
            weight = net.weights()[0]
            for codes, number in ((grown[0], 1), (grown[2], 2)):
                code = optimizer.state[weight][f"qmap{number}"]
                values = code[codes.long()] if codes.dtype == torch.uint8 else codes
                assert not values.any()


@pytest.mark.parametrize("width", [64, 100])
def test_the_whole_of_a_stack_s_8_bits_goes_on_bit_by_bit(width: int) -> None:
    """Saved, loaded, resized and stepped on, with stacks of 8 bits and of fp32."""
    first = network(16, width, BLOCK)
    optimizer = made("adamw8bit", first)
    toy.random_steps(first, optimizer, 3)
    toy.resize(first, [float(3 + n) for n in range(17)], optimizer)
    toy.random_steps(first, optimizer, 2)
    state = copy.deepcopy(optimizer_state(optimizer, first.all_stacks))
    kinds = {value["state1"].dtype for value in state["components"].values()}
    assert torch.uint8 in kinds
    second = network(16, width, BLOCK)
    second.load_state(first.state())
    fresh = made("adamw8bit", second)
    load_optimizer_state(fresh, copy.deepcopy(state), second.all_stacks)
    assert_same(state["components"], components(second, fresh))
    for stack in second.all_stacks:
        for weight in (stack.down, stack.up):
            spare = torch.ones(stack.rows, dtype=torch.bool)
            for slot in stack.slots:
                spare[slot.rows] = False
            for number in (1, 2):
                values = fresh.state[weight][f"state{number}"][spare]
                code = fresh.state[weight].get(f"qmap{number}")
                assert not (values if code is None else code[values.long()]).any()
    for net, own in ((first, optimizer), (second, fresh)):
        toy.random_steps(net, own, 2)
        toy.resize(net, [float(12 - n % 9) for n in range(17)], own)
        toy.random_steps(net, own, 2)
    assert_same(components(first, optimizer), components(second, fresh))
    for a, b in zip(*(stacked.by_component(n) for n in (first, second)), strict=True):
        assert torch.equal(a, b)


def test_8_bits_that_components_share_are_kept_as_numbers() -> None:
    """Without room between components their moments are opened, and closed again when loaded."""
    shared, apart = network(16, 60), network(16, 60, BLOCK)
    optimizer = made("adamw8bit", shared)
    toy.random_steps(shared, optimizer, 3)
    state = copy.deepcopy(optimizer_state(optimizer, shared.all_stacks))
    whole = [optimizer.state[w] for w in shared.weights()]
    assert {one["state1"].dtype for one in whole} == {torch.uint8, torch.float32}
    assert all(v["state1"].dtype == torch.float32 for v in state["components"].values())
    apart.load_state(shared.state())
    fresh = made("adamw8bit", apart)
    load_optimizer_state(fresh, state, apart.all_stacks)
    weight = apart.weights()[0]
    for number in (1, 2):
        code = fresh.state[weight][f"qmap{number}"]
        step = float(code.diff().max())
        for place, (codes, scales) in enumerate(
            (c[2 * number - 2], c[2 * number - 1]) for c in codes_of(apart, fresh)[:32:2]
        ):
            wanted = state["components"][f"{place}.down"][f"state{number}"]
            assert ((code[codes.long()] * scales - wanted).abs() <= step * scales).all()
            assert wanted.any()


# --- other layouts ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(NAMES),
    st.lists(st.integers(1, 8), min_size=3, max_size=3),
    st.sampled_from([8, 32, BLOCK]),
)
def test_moments_in_fp32_go_from_one_layout_to_another_and_back(
    name: str, ranks: list[int], numbers: int
) -> None:
    """Bit by bit, and both go on alike."""
    plain, padded = network(2, 12), network(2, 12, numbers)
    back = network(2, 12)
    first = made(name, plain)
    toy.random_steps(plain, first, 3)
    toy.resize(plain, [float(rank) for rank in ranks], first)
    toy.random_steps(plain, first, 1)
    state = components(plain, first)
    optimizers, before = [first], (plain, first)
    for net in (padded, back):
        net.load_state(before[0].state())
        optimizers.append(made(name, net))
        saved = copy.deepcopy(optimizer_state(before[1], before[0].all_stacks))
        load_optimizer_state(optimizers[-1], saved, net.all_stacks)
        assert_same(state, components(net, optimizers[-1]))
        before = net, optimizers[-1]
    for net, optimizer in zip((plain, padded, back), optimizers, strict=True):
        toy.random_steps(net, optimizer, 2)
    wanted = stacked.by_component(plain)
    for net in (padded, back):
        for a, b in zip(stacked.by_component(net), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert_same(components(plain, first), components(back, optimizers[2]))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_no_stack_is_kept_beside_the_stacks(name: str) -> None:
    net, other = network(2, 12), nn.Parameter(toy.noise(3, 4))
    groups = [([*net.weights(), other], 1.0 if name == "prodigy" else 1e-2)]
    optimizer = make_optimizer(OptimizerConfig(name=name), groups)
    other.grad = toy.noise(3, 4, seed=1)
    toy.random_steps(net, optimizer, 2)
    state = optimizer_state(optimizer, net.all_stacks)
    assert set(state["parameters"]) == {"0"}
    assert set(state["components"]) == {f"{n}.{side}" for n in range(3) for side in stacked.SIDES}
    for n, layer in enumerate(net.layers):
        for side, width in (("down", layer.in_features), ("up", layer.out_features)):
            tensors = [t for t in state["components"][f"{n}.{side}"].values() if torch.is_tensor(t)]
            assert {t.numel() for t in tensors} <= {1, layer.rank * width}
    fresh = make_optimizer(OptimizerConfig(name=name), groups)
    load_optimizer_state(fresh, copy.deepcopy(state), net.all_stacks)
    assert set(fresh.state) == set(optimizer.state)
    for weight, values in optimizer.state.items():
        for key, value in values.items():
            if torch.is_tensor(value) and not key.startswith("qmap"):
                found = fresh.state[weight][key]
                assert torch.equal(found.expand(value.shape) if value.ndim else found, value), key
