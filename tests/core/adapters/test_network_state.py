"""A saved network goes on in a new one as if nothing had happened."""

from __future__ import annotations

import pytest
import torch
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.tests.core import toy
from torch import nn

torch.set_num_threads(1)


def layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 12), nn.Conv2d(6, 8, 2), nn.Linear(12, 20))
    toy.freeze(model, seed=0)
    return model


def resized(seed: int = 0) -> AdaptiveRankNetwork:
    """A network some steps into a run: weights, ν, ranks and generator have all moved."""
    net = toy.adapt(layers(), "", seed=seed, target_rank=6.0, hysteresis=False)
    optimizer = toy.trained(net)
    toy.resize(net, [3.0, 8.0, 11.0], optimizer)
    toy.random_steps(net, optimizer, 2)
    with torch.no_grad():
        net.log_nu += torch.tensor([0.4, -0.1, 0.2])
    return net


def fresh(**rank) -> AdaptiveRankNetwork:
    return toy.adapt(layers(), "", seed=9, **{"target_rank": 5.0, "hysteresis": False, **rank})


def assert_same(first: AdaptiveRankNetwork, second: AdaptiveRankNetwork) -> None:
    assert first.ranks == second.ranks
    assert torch.equal(first.log_nu, second.log_nu)
    for one, other in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one.lora_down, other.lora_down)
        assert torch.equal(one.lora_up, other.lora_up)
        first.refresh()
        assert torch.equal(one.importance, other.importance)


def test_a_saved_state_makes_a_new_network_the_old_one() -> None:
    old, new = resized(), fresh()
    log_nu, before = new.log_nu, new.weights()
    state = old.state()
    new.load_state(state)
    assert_same(old, new)
    assert new.log_nu is log_nu
    assert not {id(p) for p in before} & {id(p) for p in new.weights()}
    assert all(p.requires_grad for p in new.weights())
    # They go on alike: the same growth draws the same rows, and nothing is shared.
    for net in (old, new):
        toy.resize(net, [9.0, 4.0, 12.0], toy.trained(net))
    assert_same(old, new)
    new.load_state(state)
    assert new.ranks == [3, 8, 11]


def test_a_state_is_a_tree_of_tensors_and_plain_values_and_a_copy() -> None:
    net = resized()
    state = net.state()

    def check_tree(node: object) -> None:
        assert isinstance(node, (dict, torch.Tensor, int, list))
        for child in node.values() if isinstance(node, dict) else ():
            check_tree(child)

    check_tree(state)
    weight = state["layers"]["unet.0"]["down"].clone()
    with torch.no_grad():
        net.layers[0].lora_down.zero_()
    assert torch.equal(state["layers"]["unet.0"]["down"], weight)


def test_a_state_of_other_layers_is_refused_and_nothing_changes() -> None:
    net = fresh()
    before = net.state()
    others = [toy.adapt(toy.Transformer(), target_rank=4).state(), resized().state()]
    del others[1]["layers"]["unet.1"]["up"]
    wrong = resized().state()
    wrong["layers"]["unet.2"]["down"] = wrong["layers"]["unet.2"]["down"][:, 1:]
    short = resized().state()
    short["ranks"] = short["ranks"][:2]
    for state in (*others, wrong, short):
        with pytest.raises(ValueError, match="belongs to other layers"):
            net.load_state(state)
    after = net.state()
    assert before["ranks"] == after["ranks"]
    for name, sides in before["layers"].items():
        assert torch.equal(sides["down"], after["layers"][name]["down"])
