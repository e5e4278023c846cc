"""Layers that read one input compute together, and nobody can tell from what comes out."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters import grouping
from lora2_pack.lora2_core.adapters.grouping import groups_of
from lora2_pack.lora2_core.adapters.layers import AdaptiveLoRA, wrap
from lora2_pack.tests.core import stacked, toy
from torch import Tensor, nn

torch.set_num_threads(1)

BLOCK = "unet.input_blocks.4.1.transformer_blocks.0"
CLIP = "text_model.encoder.layers.3"
NAMES = ("to_q", "to_k", "to_v")


def siblings(names: list[str]) -> set[frozenset[str]]:
    return {frozenset(names[place] for place in group) for group in groups_of(names)}


def children(parent: str, *names: str) -> frozenset[str]:
    return frozenset(f"{parent}.{name}" for name in names)


# --- which layers -----------------------------------------------------------------------------


def test_the_layers_of_sdxl_that_share_their_input_are_joined() -> None:
    names = [
        *(f"{BLOCK}.{part}.{n}" for part in ("attn1", "attn2") for n in (*NAMES, "to_out.0")),
        f"{BLOCK}.ff.net.0.proj",
        f"{BLOCK}.ff.net.2",
        "unet.input_blocks.4.1.proj_in",
        "unet.middle_block.1.transformer_blocks.9.attn1.to_k",
        "unet.middle_block.1.transformer_blocks.9.attn1.to_q",
        *(f"te1.{CLIP}.self_attn.{n}_proj" for n in ("k", "v", "q", "out")),
        *(f"te2.{CLIP}.self_attn.{n}_proj" for n in ("k", "v", "q", "out")),
        f"te1.{CLIP}.mlp.fc1",
        f"te1.{CLIP}.mlp.fc2",
    ]
    together = {
        children(f"{BLOCK}.attn1", *NAMES),
        children(f"{BLOCK}.attn2", "to_k", "to_v"),  # the query reads the image
        children("unet.middle_block.1.transformer_blocks.9.attn1", "to_q", "to_k"),
        children(f"te1.{CLIP}.self_attn", "q_proj", "k_proj", "v_proj"),
        children(f"te2.{CLIP}.self_attn", "q_proj", "k_proj", "v_proj"),
    }
    alone = {frozenset([name]) for name in names} - {
        frozenset([name]) for group in together for name in group
    }
    assert siblings(names) == together | alone
    assert len(alone) == 2 + 1 + 2 + 1 + 2 + 2


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["unet.a.attn1", "unet.a.attn2", "unet.b.attn1", "te1.c.self_attn", "te1"]
            ),
            st.sampled_from([*NAMES, "q_proj", "k_proj", "v_proj", "to_out.0", "proj_in"]),
        ),
        unique=True,
    )
)
def test_every_layer_is_in_one_group_with_siblings_only(pairs: list[tuple[str, str]]) -> None:
    names = [f"{parent}.{child}" for parent, child in pairs]
    groups = groups_of(names)
    assert sorted(place for group in groups for place in group) == list(range(len(names)))
    for group in groups:
        found = [names[place].rpartition(".") for place in group]
        assert len({parent for parent, *_ in found}) == 1
        kinds = {child for *_, child in found}
        assert len(group) == 1 or kinds <= {*NAMES} or kinds <= {"q_proj", "k_proj", "v_proj"}
        if len(group) > 1 and found[0][0].endswith("attn2"):
            assert kinds == {"to_k", "to_v"}


class Patched(nn.Linear):
    """As ComfyUI's layers are while a patch waits to be applied on the way."""

    weight_function = (lambda weight: weight,)


def test_only_plain_linear_layers_of_one_shape_are_joined() -> None:
    """Their frozen weights and biases lie in one tensor then."""
    others = {
        "a patch": Patched(8, 8),
        "a convolution": nn.Conv2d(8, 8, 1),
        "another width": nn.Linear(8, 9),
        "another type": nn.Linear(8, 8).half(),
    }
    for other in others.values():
        layers = [wrap(base) for base in (nn.Linear(8, 8), other)]
        names = ["unet.attn1.to_q", "unet.attn1.to_k"]
        assert grouping.joined(names, layers, [4, 4]) == [[0], [1]]
    for biases in ((True, True, True), (False, False, False), (True, True, False)):
        layers = [wrap(nn.Linear(8, 8, bias=bias)) for bias in biases]
        names = ["unet.attn1.to_v", "unet.ff", "unet.attn1.to_q"]
        assert grouping.joined(names, layers, [4, 4, 4]) == [[1], [2, 0]]


@pytest.mark.parametrize("last", [64, 65])
def test_groups_of_many_ranks_stay_apart(last: int) -> None:
    """Above 192 the zeros beside their B cost more than calls do; a layer alone has none."""
    layers = [wrap(nn.Linear(256, 256)) for _ in range(4)]
    names = ["unet.attn1.to_q", "unet.attn1.to_k", "unet.attn1.to_v", "unet.ff"]
    found = grouping.joined(names, layers, [64, 64, last, 256])
    assert found == ([[0, 1, 2], [3]] if last == 64 else [[0], [1], [2], [3]])


BIASES = [(True, True, True), (False, False, False), (True, False, True), (False, False, True)]


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("wide", [False, True])
def test_joined_weights_are_there_once(biases: tuple[bool, ...], wide: bool) -> None:
    """The layers hold views of the one tensor that computes them, and are what they were."""
    layers = attention(biases=biases, wide=wide)
    whole = layers[0].group[0]._weight
    parts = [layer.base.weight for layer in layers]
    assert torch.equal(torch.cat(parts), whole)
    assert len({p.untyped_storage().data_ptr() for p in (whole, *parts)}) == 1
    for n, layer in enumerate(layers):
        plain = nn.Linear(64, 64, bias=layer.base.bias is not None)
        toy.freeze(plain, seed=n)
        found = layer.base.state_dict()
        assert found.keys() == plain.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in plain.state_dict().items())
        assert not any(p.requires_grad for p in layer.base.parameters())


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("biases", BIASES[2:])
def test_a_layer_without_bias_among_others_adds_none(biases, width: int) -> None:
    layers = attention(width, biases=biases)
    assert [layer.base.bias is not None for layer in layers] == list(biases)
    x = toy.noise(2, 5, width).requires_grad_()
    for layer in layers:
        assert_right(layer, x)


# --- what comes out ---------------------------------------------------------------------------


def attention(
    width: int = 64, rank: int = 2, biases: Sequence[bool] = (True, True, True), wide: bool = False
) -> list[AdaptiveLoRA]:
    """q, k and v of a self-attention, joined; sizes at which they go through their ranks.

    ``wide``: with ΛA below their frozen weights, as those without a bias are.
    """
    layers, biases = [], (False,) * 3 if wide else biases
    for n, bias in enumerate(biases):
        base = nn.Linear(width, width, bias=bias)
        toy.freeze(base, seed=n)
        layers.append(wrap(base))
    names = [f"unet.attn1.{name}" for name in NAMES]
    ranks = [rank, rank + 1, rank]
    assert grouping.joined(names, layers, ranks) == [[0, 1, 2]]
    stack = stacked.held(layers, ranks, attended=wide)
    stacked.randomise(layers, std=1 / width**0.5)
    stack.importance = toy.noise(stack.rows, seed=30).requires_grad_()
    stacked.begin_step(layers)
    return layers


def learns(layer: AdaptiveLoRA) -> list[Tensor]:
    stack, _ = layer._held
    return [stack.down, stack.up, stack.importance]


def by_itself(layer: AdaptiveLoRA, x: Tensor) -> Tensor:
    """W x + b + B Λ A x of this layer, through nothing but autograd."""
    down = (layer.importance[:, None] * layer.lora_down).to(x.dtype)
    return layer.base(x) + x @ down.t() @ layer.lora_up.t().to(x.dtype)


def another_step(layers: list[AdaptiveLoRA]) -> None:
    """Other weights, and importances of their own, as every step has them."""
    stack, _ = layers[0]._held
    with torch.no_grad():
        stack.up.mul_(2)
    stack.importance = stack.importance.detach().clone().requires_grad_()
    stacked.begin_step(layers)


def assert_right(layer: AdaptiveLoRA, x: Tensor) -> None:
    """Value and gradients are those of the layer computed by itself."""
    inputs = learns(layer) + ([x] if x.requires_grad else [])
    outputs = layer(x), by_itself(layer, x)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    found, wanted = (
        torch.autograd.grad(out.square().mean(), inputs, retain_graph=True) for out in outputs
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [16, 64])  # merged, and through the ranks
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_order_gives_each_its_own(order: tuple[int, ...], width: int, wide: bool) -> None:
    layers = attention(width, wide=wide)
    for seed in range(2):
        x = toy.noise(2, 5, width, seed=seed).requires_grad_()
        for place in order:
            assert_right(layers[place], x)


@pytest.mark.parametrize("wide", [False, True])
def test_a_pass_computes_once_for_all(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = grouping.project
    monkeypatch.setattr(grouping, "project", lambda x, *a: calls.append(x) or plain(x, *a))
    layers = attention(wide=wide)
    for x in (toy.noise(5, 64), toy.noise(5, 64, seed=1)):
        for layer in layers:
            layer(x)
        assert len(calls) == 1 and calls[0] is x
        calls.clear()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=14))
def test_any_calls_with_any_inputs_are_right(calls: list[tuple[int, int]]) -> None:
    """Other inputs in between, the same layer twice, passes left half way."""
    layers = attention(16)
    inputs = [toy.noise(3, 16, seed=n) for n in range(2)]
    inputs.append(inputs[0].clone())  # equal, but another one
    for place, which in calls:
        x = inputs[which]
        torch.testing.assert_close(layers[place](x), by_itself(layers[place], x))


@pytest.mark.parametrize("wide", [False, True])
def test_an_input_of_another_kind_goes_the_plain_way(wide: bool) -> None:
    layers = attention(wide=wide)
    for layer in layers:
        layer.base.double()
    x = toy.noise(4, 64).double()
    for layer in layers:  # the group has joined fp32 weights, which are no longer the layer's
        out = layer(x)
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, by_itself(layer, x))


@pytest.mark.parametrize("wide", [False, True])
def test_the_gradient_of_a_pass_is_that_of_separate_layers(wide: bool) -> None:
    layers = attention(wide=wide)
    together, apart = toy.noise(2, 5, 64), toy.noise(2, 5, 64)
    for x in (together.requires_grad_(), apart.requires_grad_()):
        q, k, v = (layer(x) if x is together else by_itself(layer, x) for layer in layers)
        nn.functional.scaled_dot_product_attention(q, k, v).square().sum().backward()
    assert together.grad is not None and apart.grad is not None
    torch.testing.assert_close(together.grad, apart.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "wide"), [(16, False), (64, False), (64, True)])
def test_a_model_may_change_what_it_is_given_in_place(width: int, wide: bool) -> None:
    """Before its neighbours are asked for: theirs, and every gradient, stay what they are."""
    layers, x = attention(width, wide=wide), toy.noise(2, 5, width).requires_grad_()
    found, wanted = [], []
    for layer in layers:
        for out, kept in ((layer(x), found), (by_itself(layer, x), wanted)):
            out += 1
            out.mul_(out.detach().sign())
            kept.append(out)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    inputs = [*learns(layers[0]), x]
    grads = (
        torch.autograd.grad(sum(out.square().mean() for out in outputs), inputs)
        for outputs in (found, wanted)
    )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- what is left behind ----------------------------------------------------------------------


class Halted(RuntimeError):
    pass


def halfway(layers: list[AdaptiveLoRA], x: Tensor) -> None:
    with pytest.raises(Halted):
        layers[0](x)
        raise Halted


@pytest.mark.parametrize("wide", [False, True])
def test_a_pass_that_was_interrupted_leaves_nothing_wrong(wide: bool) -> None:
    """The next one, with the same input and other weights, computes anew."""
    layers, x = attention(wide=wide), toy.noise(4, 64)
    halfway(layers, x)
    another_step(layers)
    for layer in layers:
        assert_right(layer, x)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nor_when_the_next_one_asks_in_another_order(order: tuple[int, ...]) -> None:
    """What lay ready was computed with weights and importances that are no longer there."""
    layers, x = attention(), toy.noise(4, 64)
    halfway(layers, x)
    another_step(layers)
    for place in order:
        assert_right(layers[place], x)


@pytest.mark.parametrize("new_step", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_look_without_gradients_takes_none_from_the_pass_after_it(order, new_step: bool) -> None:
    layers, x = attention(), toy.noise(4, 64)
    with torch.no_grad():
        layers[0](x)
    if new_step:
        another_step(layers)
    for place in order:
        assert_right(layers[place], x)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize(("width", "wide"), [(16, False), (64, False), (64, True)])
def test_nothing_is_kept_alive_after_a_whole_pass(width: int, wide: bool, learns: bool) -> None:
    layers = attention(width, wide=wide)
    x = toy.noise(3, width).requires_grad_(learns)
    outputs = [layer(x) for layer in layers]
    watched = [weakref.ref(tensor) for tensor in (x, *outputs)]
    sum(out.sum() for out in outputs).backward()
    del x, outputs
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4


def test_a_real_network_keeps_nothing_of_its_input_after_a_pass() -> None:
    model = toy.Transformer()
    net = toy.adapt(model, target_rank=4)
    x, context = toy.noise(2, 6, 16), toy.noise(2, 5, 12)
    model(x, context).sum().backward()
    watched = weakref.ref(x), weakref.ref(context)
    del x, context
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    groups = {layer.group[0] for layer in net.layers}
    assert len(groups) == 10  # a block: q k v, out; q, k v, out
    assert not any(group._ready or group._asked for group in groups)
