"""Every way to compute adapters is W x + b + B Λ A x, and so is its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters import projections
from lora2_pack.tests.core import toy
from torch import Tensor

torch.set_num_threads(1)

Parts = list[list[Tensor | None]]  # weights, biases, downs, importances, ups


def parts(inner: int, outs: list[int], ranks: list[int], biased: list[bool], dtype=None) -> Parts:
    """Frozen weights in ``dtype``, adapters to learn in fp32, or in fp64 beside fp64."""
    frozen = dtype or torch.float32
    learnt = torch.float64 if frozen == torch.float64 else torch.float32
    weights, biases, downs, scales, ups = [], [], [], [], []
    for n, (out, rank, bias) in enumerate(zip(outs, ranks, biased, strict=True)):
        weights.append((toy.noise(out, inner, seed=n) / inner**0.5).to(frozen))
        biases.append(toy.noise(out, seed=10 + n).to(frozen) if bias else None)
        downs.append((toy.noise(rank, inner, seed=20 + n) / inner**0.5).to(learnt))
        scales.append(toy.noise(rank, seed=30 + n).to(learnt))
        ups.append((toy.noise(out, rank, seed=40 + n) / rank**0.5).to(learnt))
    for tensor in (*downs, *scales, *ups):
        tensor.requires_grad_(True)
    return [weights, biases, downs, scales, ups]


def plainly(x: Tensor, weights, biases, downs, scales, ups) -> tuple[Tensor, ...]:
    """The formula, layer by layer, through nothing but autograd."""
    outputs = []
    for weight, bias, down, scale, up in zip(weights, biases, downs, scales, ups, strict=True):
        y = x @ weight.T + (x @ down.T) @ torch.diag(scale) @ up.T
        outputs.append(y if bias is None else y + bias)
    return tuple(outputs)


def shared(x: Tensor, weights, *rest) -> tuple[Tensor, ...]:
    flat = [tensor for group in (weights, *rest) for tensor in group]
    return projections._ThroughRanks.apply(x, len(weights), *flat)


def alone(x: Tensor, *groups) -> tuple[Tensor, ...]:
    return tuple(projections._through_rank(x, *layer) for layer in zip(*groups, strict=True))


WAYS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "merged": projections._merged,
    "alone": alone,
    "shared": shared,
    "project": projections.project,
}


def learnt(x: Tensor, all_parts: Parts) -> list[Tensor]:
    tensors = [t for group in all_parts[2:] for t in group if t is not None and t.requires_grad]
    return [x, *tensors] if x.requires_grad else tensors


def value_and_gradients(way, x: Tensor, all_parts: Parts) -> tuple[list[Tensor], list[Tensor]]:
    outputs = way(x, *all_parts)
    grads = [toy.noise(*out.shape, seed=50 + n).to(out) for n, out in enumerate(outputs)]
    loss = sum((out * grad).sum() for out, grad in zip(outputs, grads, strict=True))
    found = torch.autograd.grad(loss, learnt(x, all_parts))
    return [out.detach() for out in outputs], list(found)


def in_double(x: Tensor, all_parts: Parts) -> tuple[Tensor, Parts]:
    def copy(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return copy(x), [[copy(tensor) for tensor in group] for group in all_parts]  # type: ignore


def assert_near(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Each within ``tolerance`` of the largest number of what it should be, or of 1: what is
    multiplied is of that size, and sums may cancel."""
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        apart = float((a.double() - b.double()).abs().max())
        assert apart <= tolerance * max(float(b.abs().max()), 1.0), (a.shape, apart)


def assert_is_the_formula(way, x: Tensor, all_parts: Parts, tolerance: float) -> None:
    outputs, grads = value_and_gradients(way, x, all_parts)
    wanted, wanted_grads = value_and_gradients(plainly, *in_double(x, all_parts))
    assert_near(outputs, wanted, tolerance)
    assert_near(grads, wanted_grads, tolerance)
    assert all(out.dtype == x.dtype for out in outputs)
    inputs = learnt(x, all_parts)
    assert all(grad.dtype == one.dtype for grad, one in zip(grads, inputs, strict=True))


# --- fp32 -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(WAYS)),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 40),
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 6), st.booleans()), min_size=1, max_size=3
    ),
    st.booleans(),
    st.booleans(),
)
def test_values_and_gradients_are_those_of_the_formula(
    way: str, lead: list[int], inner: int, layers, x_learns: bool, turned: bool
) -> None:
    """To 1e-5, over any shapes, with x in any layout of memory."""
    outs, ranks, biased = (list(column) for column in zip(*layers, strict=True))
    x = toy.noise(*lead, inner, seed=60)
    if turned and lead:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    x.requires_grad_(x_learns)
    assert_is_the_formula(WAYS[way], x, parts(inner, outs, ranks, biased), 1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("large", [False, True])
def test_the_cheaper_way_is_taken(count: int, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name, function in (("merged", "_merged"), ("alone", "_through_rank")):
        plain = getattr(projections, function)
        monkeypatch.setattr(
            projections, function, lambda *a, n=name, f=plain: taken.append(n) or f(*a)
        )
    inner = 128 if large else 16
    all_parts = parts(inner, [inner] * count, [4] * count, [True] * count)
    x = toy.noise(3, 5, inner).requires_grad_()
    outputs = projections.project(x, *all_parts)
    if not large:
        assert taken == ["merged"]
    elif count == 1:
        assert taken == ["alone"]
    else:
        assert not taken and "ThroughRanks" in type(outputs[0].grad_fn).__name__
    for a, b in zip(outputs, plainly(x, *all_parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- fp64 and bf16 ----------------------------------------------------------------------------


@pytest.mark.parametrize("x_learns", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("way", sorted(WAYS))
def test_gradients_are_those_of_finite_differences(way: str, layers: int, x_learns: bool) -> None:
    outs, ranks, biased = [4, 3, 5][:layers], [2, 3, 1][:layers], [True, False, True][:layers]
    weights, biases, *rest = parts(6, outs, ranks, biased, torch.float64)
    x = toy.noise(2, 3, 6, seed=1).double().requires_grad_(x_learns)

    def of_inputs(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        groups = [list(flat[n * layers : (n + 1) * layers]) for n in range(3)]
        return WAYS[way](x, weights, biases, *groups)

    assert torch.autograd.gradcheck(of_inputs, (x, *(t for group in rest for t in group)))


@pytest.mark.parametrize("layers", [1, 3])
def test_in_bf16_the_error_is_that_of_its_8_bits(layers: int) -> None:
    """To 1 % of the largest number, measured 0.7 %; gradients of A, Λ, B come in fp32."""
    x = toy.noise(2, 7, 24, seed=2).bfloat16().requires_grad_()
    all_parts = parts(24, [16] * layers, [5] * layers, [True] * layers, torch.bfloat16)
    assert not projections._merging_pays(x, all_parts[0], all_parts[2])
    assert_is_the_formula(projections.project, x, all_parts, 0.01)


def test_a_small_update_is_not_lost_in_bf16() -> None:
    """ΔW of a thousandth of W is below its 8 bits: merging would round it away."""
    x = toy.noise(64, 16, seed=3).bfloat16()
    all_parts = parts(16, [16], [4], [False], torch.bfloat16)
    with torch.no_grad():
        all_parts[0][0].fill_(1.0)
        all_parts[4][0] *= 1e-3
        x = x - x.mean(1, keepdim=True)  # so that W x is small and ΔW x is seen
        (with_it,) = projections.project(x, *all_parts)
        all_parts[4][0].zero_()
        (without,) = projections.project(x, *all_parts)
    assert (with_it != without).float().mean() > 0.5


# --- what need not be computed or kept --------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS))
def test_frozen_importances_have_no_gradient_and_change_no_other(way: str) -> None:
    x = toy.noise(2, 5, 12).requires_grad_()
    learning, frozen = (parts(12, [8, 9], [3, 2], [True, False]) for _ in range(2))
    for scale in frozen[3]:
        scale.requires_grad_(False)
    _, with_it = value_and_gradients(WAYS[way], x, learning)
    _, without = value_and_gradients(WAYS[way], x, frozen)
    assert len(with_it) == 7 and len(without) == 5
    assert_near(without, with_it[:3] + with_it[5:], 1e-6)
    assert all(scale.grad is None for scale in frozen[3])


@pytest.mark.parametrize("way", sorted(WAYS))
def test_an_output_that_nobody_uses_adds_nothing(way: str) -> None:
    all_parts, x = parts(12, [8, 9], [3, 2], [True, False]), toy.noise(5, 12).requires_grad_()
    inputs = learnt(x, all_parts)
    for use in (0, 1):
        found, wanted = (
            torch.autograd.grad(
                f(x, *all_parts)[use].square().sum(), inputs, materialize_grads=True
            )
            for f in (WAYS[way], plainly)
        )
        assert_near(list(found), list(wanted), 1e-5)
        assert sum(bool(grad.any()) for grad in found) == 4  # x, and one layer's A, Λ and B


@pytest.mark.parametrize("way", sorted(WAYS))
def test_nothing_of_the_outputs_size_is_kept_for_the_backward_pass(way: str) -> None:
    x = toy.noise(2, 50, 12).requires_grad_()
    all_parts, kept = parts(12, [17, 19], [3, 2], [True, True]), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = WAYS[way](x, *all_parts)
    assert kept and outputs[0].requires_grad
    assert not [shape for shape in kept if len(shape) > 1 and shape[-1] in (17, 19) and 50 in shape]
    assert max(torch.Size(shape).numel() for shape in kept) <= x.numel()


@pytest.mark.parametrize("way", sorted(WAYS))
def test_inputs_and_parameters_are_not_changed(way: str) -> None:
    x, all_parts = toy.noise(2, 5, 12), parts(12, [8, 9], [3, 2], [True, True])
    before = [t.detach().clone() for group in ([x], *all_parts) for t in group]
    WAYS[way](x, *all_parts)
    after = [t.detach() for group in ([x], *all_parts) for t in group]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
