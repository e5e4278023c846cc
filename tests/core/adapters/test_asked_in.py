"""Layers that are asked in another type than their stack expects: right at once, cheap next time.

As ComfyUI's text encoders are: weights in fp16, computed in fp32.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.stacks import WeightStack
from lora2_pack.tests.core import stacked, toy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

torch.set_num_threads(1)


class Casting(nn.Linear):
    """Computes in the type of its input, whatever it is kept in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class CastingConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(input.dtype)
        return super()._conv_forward(input, weight.to(input.dtype), bias)


class Encoder(nn.Module):
    """q, k and v that compute together, an output, and a convolution."""

    def __init__(self, dtype: torch.dtype, bias: bool = True):
        super().__init__()
        self.attn1 = nn.Module()
        for name in ("to_q", "to_k", "to_v"):
            setattr(self.attn1, name, Casting(16, 16, bias))
        self.out = Casting(16, 16)
        self.conv = CastingConv(3, 4, 3, padding=1)
        toy.freeze(self, seed=0)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        attention = self.attn1
        q, k, v = attention.to_q(x), attention.to_k(x), attention.to_v(x)
        mixed = self.out(torch.tanh(q) * k + v)  # (batch, 9, 16)
        return self.conv(mixed.view(-1, 3, 6, 8))


def encoder(dtype: torch.dtype, bias: bool = True) -> tuple[Encoder, AdaptiveRankNetwork]:
    """``bias``: of q, k and v; those without have ΛA below their frozen weights."""
    model = Encoder(dtype, bias)
    net = toy.adapt(model, "", target_rank=3.0, hysteresis=False)
    stacked.randomise(net.layers, 0.2)
    net.refresh()
    assert {stack.dtype for stack in net.all_stacks} == {dtype}
    return model, net


def value_and_gradients(
    model: Encoder, net: AdaptiveRankNetwork, x: Tensor, checkpointed: bool
) -> list[Tensor]:
    for parameter in (*net.weights(), net.log_nu):
        parameter.grad = None
    out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    out.float().square().mean().backward()
    assert out.dtype == x.dtype and net.log_nu.grad is not None
    return [out.detach(), *stacked.by_component(net, stacked.grad_of), net.log_nu.grad]


def written_out(model: Encoder, net: AdaptiveRankNetwork, x: Tensor) -> list[Tensor]:
    """The same from W + B Λ A in fp64, by plain autograd."""
    plain = Encoder(torch.float64, model.attn1.to_q.base.bias is not None)
    learnt = [part.double().requires_grad_() for part in stacked.by_component(net)]
    log_nu = net.log_nu.detach().double().requires_grad_()
    weights = {}
    for n, (target, layer) in enumerate(zip(net.targets, net.layers, strict=True)):
        scale = torch.exp(-log_nu[n].exp() * torch.arange(layer.rank))
        delta = (learnt[2 * n + 1].t() * scale) @ learnt[2 * n]
        base = layer.base.weight.double()
        weights[f"{target.name}.weight"] = base + delta.view_as(base)
        if layer.base.bias is not None:
            weights[f"{target.name}.bias"] = layer.base.bias.double()
    out = torch.func.functional_call(plain, weights, (x.double(),))
    grads = torch.autograd.grad(out.square().mean(), [*learnt, log_nu])
    return [out.detach(), *grads]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("kept", "asked", "tolerance"),
    [
        (torch.float16, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
        (torch.float32, torch.float64, 1e-6),
        (torch.float32, torch.bfloat16, 0.03),
    ],
)
def test_it_is_right_at_once_and_cheap_from_the_next_step_on(
    kept: torch.dtype,
    asked: torch.dtype,
    tolerance: float,
    checkpointed: bool,
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = []
    plain = WeightStack.folded_alone
    monkeypatch.setattr(WeightStack, "folded_alone", lambda *a: alone.append(a[1]) or plain(*a))
    model, net = encoder(kept, bias)
    x = toy.noise(2, 9, 16).to(asked)
    wanted = written_out(model, net, x)
    for step in range(3):
        found = value_and_gradients(model, net, x, checkpointed)
        for a, b in zip(found, wanted, strict=True):
            assert float((a.double() - b).norm()) <= tolerance * float(b.norm())
        assert len(alone) == ((5 + 5 * checkpointed) if step == 0 else 0)
        assert {stack.dtype for stack in net.all_stacks} == {asked}
        alone.clear()
        net.refresh()


@pytest.mark.parametrize("bias", [False, True])
def test_each_of_two_types_in_turn_is_right(bias: bool) -> None:
    """As when a picture is painted in another precision between two steps."""
    model, net = encoder(torch.float16, bias)
    x = toy.noise(2, 9, 16)
    net.refresh()
    with torch.no_grad():
        model(x.half())  # ΛA of this step lies below; it is another one in the next
    stacked.randomise(net.layers, 0.21)
    wanted = written_out(model, net, x)
    net.refresh()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 0.01), (torch.float32, 1e-5)):
        for _ in range(2):
            found = value_and_gradients(model, net, x.to(dtype), False)
            for a, b in zip(found, wanted, strict=True):
                assert float((a.double() - b).norm()) <= tolerance * float(b.norm())
            net.refresh()
