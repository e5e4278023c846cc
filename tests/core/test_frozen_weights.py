"""Frozen weights in eight bits: values and gradients of what they are cast to, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters import frozen
from lora2_pack.lora2_core.adapters.frozen import (
    EightBits,
    eight_bits,
    in_eight_bits,
    keep_no_inputs,
)
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.config.ranks import RankConfig
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
# Of a dtype, rounding of one number, relative.
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
dtypes = pytest.mark.parametrize("dtype", EPSILON, ids=str)


def _numbers(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(*shape, generator=generator)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(80, 64),
    "linear without bias": lambda: nn.Linear(80, 64, bias=False),
    "3 × 3": lambda: nn.Conv2d(16, 32, 3, padding=1),
    "1 × 1": lambda: nn.Conv2d(64, 64, 1),
    "stride, dilation and groups": lambda: nn.Conv2d(
        32, 64, (3, 5), stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=4
    ),
    "same": lambda: nn.Conv2d(16, 32, (3, 4), padding="same", bias=False),
    "circular": lambda: nn.Conv2d(16, 32, 3, padding=1, stride=2, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(16, 32, 3, padding=(0, 1), padding_mode="reflect"),
}


def _layer(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    return LAYERS[name]().requires_grad_(False).to(dtype)


def _input(layer: Any, dtype: torch.dtype) -> Tensor:
    shape = (2, 5, 80) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 9, 10)
    return _numbers(*shape, seed=2).to(dtype).requires_grad_()


@dtypes
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_cast_weight(name: str, dtype: torch.dtype):
    layer, plain = _layer(name, dtype), _layer(name, torch.float64)
    kept = layer.weight
    in_eight_bits(layer)
    assert layer.weight.dtype == FP8 and not layer.weight.requires_grad
    assert (layer.bias is None) == (plain.bias is None)
    scale = float(kept.float().abs().max()) / 448
    cast = EightBits(layer.weight, layer.forward.scale).cast(dtype)
    assert torch.equal(cast, (layer.weight.double() * layer.forward.scale).to(dtype))
    assert layer.forward.scale == pytest.approx(scale, rel=1e-6)
    bound = (2.0**-4 + EPSILON[dtype]) * kept.double().abs() + 2.0**-10 * scale
    assert ((cast.double() - kept.double()).abs() <= bound).all()
    # The same layer in fp64 with what was cast: all that is left is the type's own rounding.
    plain.weight.copy_(cast)
    if plain.bias is not None:
        plain.bias.copy_(layer.bias)
    x = _input(layer, dtype)
    exact = x.detach().double().requires_grad_()
    found, wanted = layer(x), plain(exact)
    grad = _numbers(*found.shape, seed=3).to(dtype)
    found.backward(grad)
    wanted.backward(grad.double())
    assert x.grad is not None and exact.grad is not None
    assert found.dtype == x.grad.dtype == dtype
    for ours, theirs in ((found, wanted), (x.grad, exact.grad)):
        error = (ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm()
        assert error < 8 * EPSILON[dtype], float(error / EPSILON[dtype])  # measured: 4


@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_as_the_layer_with_the_cast_weight_does(name: str):
    """Bit by bit, forward and backward, whatever the layer's way is; single images, too."""
    layer, plain = _layer(name, torch.float32), _layer(name, torch.float32)
    in_eight_bits(layer)
    plain.weight.copy_(EightBits(layer.weight, layer.forward.scale).cast(torch.float32))
    for x in (_input(layer, torch.float32), _input(layer, torch.float32)[0]):
        grads = []
        for one in (layer, plain):
            out = one(x)
            grads.append(torch.autograd.grad(out, x, torch.ones_like(out))[0])
            with torch.no_grad():
                assert torch.equal(one(x), out)
        assert torch.equal(layer(x), plain(x))
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_of_a_cast_weight_is_kept(name: str):
    layer = _layer(name, torch.bfloat16)
    in_eight_bits(layer)
    saved: list[Tensor] = []
    x = _input(layer, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    theirs = x.untyped_storage().data_ptr()  # padding by reflection keeps what it is given
    [weight] = [one for one in saved if one.untyped_storage().data_ptr() != theirs]
    storage = weight.untyped_storage()
    assert weight.dtype == FP8 and storage.data_ptr() == layer.weight.untyped_storage().data_ptr()
    assert storage.nbytes() == layer.weight.numel()
    assert out.requires_grad


# --- inputs that nobody needs ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LAYERS if "linear" not in name])
@pytest.mark.parametrize("eight", [False, True], ids=["as it is", "fp8"])
def test_a_convolution_keeps_no_input(name: str, eight: bool):
    """And computes bit by bit what it did."""
    layer, plain = _layer(name, torch.float32), _layer(name, torch.float32)
    if eight:
        in_eight_bits(layer)
        plain.weight.copy_(EightBits(layer.weight, layer.forward.scale).cast(torch.float32))
    keep_no_inputs(layer)
    padded = layer.padding_mode != "zeros" or layer.padding == "same"
    for x in (_input(layer, torch.float32), _input(layer, torch.float32)[0]):
        out, saved = _with_what_is_saved(layer, x)
        grads = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (out, plain(x))]
        assert torch.equal(out, plain(x))
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
        held = {one.untyped_storage().data_ptr() for one in saved}
        assert layer.weight.untyped_storage().data_ptr() in held
        assert len(held) == 1 or (padded and len(held) == 2)  # what reflects is kept where it does


def _with_what_is_saved(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        return layer(x), saved


def test_only_frozen_convolutions_forget():
    learnt, theirs, frozen_one = (nn.Conv2d(4, 4, 1) for _ in range(3))
    model = nn.Sequential(learnt, theirs.requires_grad_(False), frozen_one.requires_grad_(False))
    theirs.forward = lambda x: x  # type: ignore[method-assign]
    model.append(nn.Linear(4, 4).requires_grad_(False))
    keep_no_inputs(model)
    assert ["forward" in vars(layer) for layer in model] == [False, True, True, False]
    x = _numbers(1, 4, 3, 3)
    assert theirs(x) is x and frozen.computes_in(frozen_one) == torch.float32
    assert not frozen.is_in_eight_bits(frozen_one)


class Model(nn.Module):
    """Layers of every kind: worth it, too small, learnt, and not computed by their own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 64)
        self.first = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.small = nn.Linear(64, 63)
        self.conv = nn.Conv2d(64, 64, 1)
        self.again = nn.Linear(64, 64, bias=False)
        self.again.weight = self.first.weight
        self.theirs = nn.Linear(64, 64)
        self.requires_grad_(False)
        self.learnt = nn.Linear(64, 64)
        self.theirs.forward = lambda x: x @ self.theirs.weight  # type: ignore[method-assign]
        self.broken = nn.Linear(64, 64).requires_grad_(False)
        self.broken.weight[0, 0] = float("nan")


def test_which_weights_are_kept_so():
    model = Model().to(torch.bfloat16)
    names = [name for name, _ in model.named_modules()]
    kinds = [type(module) for module in model.modules()]
    before = frozen_bytes(model)
    assert frozen.largest_cast(model) == 0
    for _ in range(2):  # a second time changes nothing
        in_eight_bits(model)
        assert [name for name, _ in model.named_modules()] == names
        assert [type(module) for module in model.modules()] == kinds
        found = {name for name, p in model.named_parameters() if p.dtype == FP8}
        assert found == {"first.weight", "conv.weight"}
        assert model.again.weight is model.first.weight
        assert frozen_bytes(model) == before - 2 * 4096
        assert frozen.largest_cast(model) == 2 * 4096
    inside = [name for name, module in model.named_modules() if frozen.is_in_eight_bits(module)]
    assert inside == ["first", "conv", "again"]
    assert frozen.computes_in(model.conv) == frozen.computes_in(model.small) == torch.bfloat16
    assert frozen.computes_in(nn.ReLU()) is None


def frozen_bytes(model: nn.Module) -> int:
    """By storage, each once."""
    parts = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(part.nbytes() for part in parts.values())


@effort(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    size=st.floats(-18, 10).map(lambda power: 2.0**power),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_number_is_off_by_a_sixteenth_at_most(seed: int, size: float, dtype: torch.dtype):
    weight = _numbers(70, 70, seed=seed, size=size).clamp_(-6e4, 6e4).to(dtype)
    found = eight_bits(weight)
    assert found is not None
    numbers, scale = found
    largest = float(weight.float().abs().max())
    assert scale == pytest.approx(largest / 448, rel=2**-8)
    back = numbers.double() * scale
    error = (back - weight.double()).abs()
    assert (error <= 1.01 * (weight.double().abs() / 16 + scale * 2.0**-10)).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-3])
def test_one_value_throughout(value: float):
    found = eight_bits(torch.full((64, 64), value))
    assert found is not None
    assert (found.numbers.double() * found.scale).allclose(torch.tensor(value).double(), rtol=1e-6)
    assert value or found.scale == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_has_no_scale(value: float):
    weight = _numbers(64, 64)
    weight[3, 5] = value
    assert eight_bits(weight) is None


@effort(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    largest=st.sampled_from([448.0, 416.0, 400.0, 300.0, 240.0, 3.1, 1.0]),
    scale=st.floats(2**-12, 1.0, width=32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_weight_of_a_file_in_fp8_loses_nothing_more(
    seed: int, largest: float, scale: float, dtype: torch.dtype
):
    """With a scale a tensor, whatever it is, and where the numbers stand for themselves."""
    values = _numbers(70, 64, seed=seed)
    file = (values * (largest / values.abs().max())).to(FP8)
    for factor in (scale, 1.0):
        weight = (file.double() * factor).to(dtype)
        found = eight_bits(weight)
        assert found is not None
        numbers = found.numbers.double()
        # By a power of two at most.
        power = float((numbers.abs().max() / file.double().abs().max()).log2())
        assert power == round(power)
        assert torch.equal(numbers, file.double() * 2.0**power)
        assert found.scale * 2.0**power == pytest.approx(factor, rel=4 * EPSILON[dtype])
        if factor == 1.0:
            assert torch.equal(found.cast(dtype), weight)


class Blocks(nn.Module):
    """Attention's inputs beside each other, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("to_q", "to_k", "to_v")})
        self.conv = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        rows = sum(layer(rows) for layer in self.attn1.values())  # type: ignore[assignment]
        return self.conv(x) + rows.transpose(1, 2).reshape(x.shape)


@dtypes
def test_adapters_learn_as_on_the_cast_weights(dtype: torch.dtype):
    models: dict[str, Any] = {}
    for name in ("eight", "cast"):
        torch.manual_seed(3)
        models[name] = Blocks().requires_grad_(False).to(dtype)
    in_eight_bits(models["eight"])
    for ours, theirs in zip(models["eight"].modules(), models["cast"].modules(), strict=True):
        if frozen.is_in_eight_bits(ours):
            theirs.weight.copy_(ours.forward.weight.cast(dtype))
    config = RankConfig.balanced(target_rank=4.0)
    targets = find_targets(models["cast"], r"attn1|conv")
    networks = {name: AdaptiveRankNetwork(model, targets, config) for name, model in models.items()}
    alone = [len(group.layers) for groups in networks["eight"]._groups for group in groups]
    assert alone == [1] * 4
    assert {stack.dtype for stack in networks["eight"].all_stacks} == {dtype}
    results: dict[str, list[Tensor]] = {}
    for name, network in networks.items():
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for layer in network.layers:
                drawn = torch.randn(layer.lora_up.shape, generator=generator)
                layer.lora_up.copy_(drawn / 8)
        if name == "eight":  # what layers compute with is folded at once, never alone
            for stack in network.all_stacks:
                stack.folded_alone = None  # type: ignore[assignment]
        x = _numbers(1, 64, 6, 6, seed=8).to(dtype).requires_grad_()
        for _ in range(2):
            network.refresh()
            out = models[name](x)
            out.backward(torch.ones_like(out))
        by_component = [
            grad[slot.rows]
            for side in ("down", "up")
            for stack in network.all_stacks
            for _, slot, grad in sorted(
                (component, slot, getattr(stack, side).grad)
                for component, slot in zip(stack.components, stack.slots, strict=True)
            )
        ]
        assert x.grad is not None
        results[name] = [out.detach(), x.grad, network.log_nu.grad, *by_component]  # type: ignore[list-item]
    for ours, theirs in zip(*results.values(), strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 40 * EPSILON[dtype], float(error / EPSILON[dtype])


def test_a_device_that_cannot_keep_it_says_why(monkeypatch: pytest.MonkeyPatch):
    frozen.hold_a_little(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(RuntimeError, match="meta"):
        frozen.hold_a_little(torch.device("meta"), torch.bfloat16)
    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(RuntimeError, match="has no float8_e4m3fn"):
        frozen.hold_a_little(torch.device("cpu"), torch.bfloat16)
