"""Every way to compute adapters is W x + b + B Λ A x, and so is its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters import projections
from lora2_pack.tests.core import toy
from torch import Tensor

torch.set_num_threads(1)


@dataclass(frozen=True)
class Parts:
    """What :func:`projections.project` takes beside x: layers of one width with one input."""

    weight: Tensor  # (Σ out, in)
    bias: Tensor | None  # (Σ out,)
    down: Tensor  # (Σ rank, in), Λ folded in
    ups: list[Tensor]  # (rank, out) each

    @property
    def learnt(self) -> list[Tensor]:
        return [self.down, *self.ups]

    @property
    def up(self) -> Tensor:
        """(Σ rank, Σ out), B along the diagonal."""
        return torch.block_diag(*self.ups)

    @property
    def wide(self) -> Tensor:
        """The frozen weights with ΛA below, (Σ out + Σ rank, in)."""
        return torch.cat([self.weight, self.down.detach()])

    def of(self, change: Callable[[Tensor], Tensor]) -> Parts:
        bias = None if self.bias is None else change(self.bias)
        return Parts(change(self.weight), bias, change(self.down), [change(up) for up in self.ups])


def parts(
    inner: int, out: int, ranks: list[int], biased: bool, dtype: torch.dtype = torch.float32
) -> Parts:
    def drawn(*shape: int, seed: int, size: int = 1) -> Tensor:
        return (toy.noise(*shape, seed=seed) / size**0.5).to(dtype)

    bias = drawn(len(ranks) * out, seed=10) if biased else None
    down = drawn(sum(ranks), inner, seed=20, size=inner).requires_grad_()
    ups = [
        drawn(rank, out, seed=40 + n, size=rank).requires_grad_() for n, rank in enumerate(ranks)
    ]
    return Parts(drawn(len(ranks) * out, inner, seed=1, size=inner), bias, down, ups)


def plainly(x: Tensor, given: Parts) -> tuple[Tensor, ...]:
    """The formula, layer by layer, through nothing but autograd."""
    count = len(given.ups)
    weights, downs = given.weight.chunk(count), given.down.split([len(up) for up in given.ups])
    outputs = [
        x @ weight.T + (x @ down.T) @ up
        for weight, down, up in zip(weights, downs, given.ups, strict=True)
    ]
    if given.bias is not None:
        outputs = [y + b for y, b in zip(outputs, given.bias.chunk(count), strict=True)]
    return tuple(outputs)


Way = Callable[[Tensor, Parts], tuple[Tensor, ...]]


def forced(apply: Callable[..., tuple[Tensor, ...]], wide: bool) -> Way:
    def way(x: Tensor, given: Parts) -> tuple[Tensor, ...]:
        weight = given.wide if wide else given.weight
        return apply(x, weight, given.bias, given.down, given.up, len(given.ups))

    return way


_APPLY = {
    "merged": projections._Merged.apply,
    "ranks": projections._ThroughRanks.apply,
    "project": projections.project,
}
# Wide: with ΛA below the frozen weights, of layers that have no bias.
WAYS = {
    name + ", wide" * wide: forced(apply, wide)  # type: ignore[arg-type]
    for name, apply in _APPLY.items()
    for wide in (False, True)
}
project = WAYS["project"]


def may_have_bias(way: str) -> bool:
    return "wide" not in way


def learnt(x: Tensor, given: Parts) -> list[Tensor]:
    return [x, *given.learnt] if x.requires_grad else given.learnt


def value_and_gradients(way, x: Tensor, given: Parts) -> tuple[list[Tensor], list[Tensor]]:
    outputs = way(x, given)
    grads = [toy.noise(*out.shape, seed=50 + n).to(out) for n, out in enumerate(outputs)]
    loss = sum((out * grad).sum() for out, grad in zip(outputs, grads, strict=True))
    found = torch.autograd.grad(loss, learnt(x, given))
    return [out.detach() for out in outputs], list(found)


def in_double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def assert_near(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Each within ``tolerance`` of the largest number of what it should be, or of 1: what is
    multiplied is of that size, and sums may cancel."""
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        apart = float((a.double() - b.double()).abs().max())
        assert apart <= tolerance * max(float(b.abs().max()), 1.0), (a.shape, apart)


def assert_is_the_formula(way, x: Tensor, given: Parts, tolerance: float) -> None:
    outputs, grads = value_and_gradients(way, x, given)
    wanted, wanted_grads = value_and_gradients(plainly, in_double(x), given.of(in_double))
    assert_near(outputs, wanted, tolerance)
    assert_near(grads, wanted_grads, tolerance)
    assert all(out.dtype == x.dtype for out in outputs)
    inputs = learnt(x, given)
    assert all(grad.dtype == one.dtype for grad, one in zip(grads, inputs, strict=True))


# --- fp32 -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(WAYS)),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 40),
    st.integers(1, 30),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_values_and_gradients_are_those_of_the_formula(
    way: str,
    lead: list[int],
    inner: int,
    out: int,
    ranks: list[int],
    biased: bool,
    x_learns: bool,
    turned: bool,
) -> None:
    """To 1e-5, over any shapes, with x in any layout of memory."""
    x = toy.noise(*lead, inner, seed=60)
    if turned and lead:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    x.requires_grad_(x_learns)
    given = parts(inner, out, ranks, biased and may_have_bias(way))
    assert_is_the_formula(WAYS[way], x, given, 1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ["project", "project, wide"])
def test_the_cheaper_way_is_taken(name: str, count: int, large: bool) -> None:
    inner = 128 if large else 16
    given = parts(inner, inner, [4] * count, may_have_bias(name))
    x = toy.noise(3, 5, inner).requires_grad_()
    outputs = WAYS[name](x, given)
    way = "ThroughRanks" if large else "Merged"
    assert all(way in type(out.grad_fn).__name__ for out in outputs)
    for a, b in zip(outputs, plainly(x, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- fp64 and bf16 ----------------------------------------------------------------------------


@pytest.mark.parametrize("x_learns", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("way", sorted(WAYS))
def test_gradients_are_those_of_finite_differences(way: str, layers: int, x_learns: bool) -> None:
    biased = layers != 2 and may_have_bias(way)
    given = parts(6, 4, [2, 3, 1][:layers], biased, torch.float64)
    x = toy.noise(2, 3, 6, seed=1).double().requires_grad_(x_learns)

    def of_inputs(x: Tensor, down: Tensor, *ups: Tensor) -> tuple[Tensor, ...]:
        return WAYS[way](x, replace(given, down=down, ups=list(ups)))

    assert torch.autograd.gradcheck(of_inputs, (x, *given.learnt))


@pytest.mark.parametrize("way", ["merged", "ranks", "ranks, wide"])
def test_numbers_beside_the_diagonal_have_a_gradient_as_all_others(way: str) -> None:
    """Who puts zeros there also takes the gradient of what is not zero alone."""
    given = parts(6, 4, [2, 3], False, torch.float64)
    up = toy.noise(5, 8, seed=4).double().requires_grad_()
    apply = {"merged": projections._Merged, "ranks": projections._ThroughRanks}[way[:6].strip(",")]
    x = toy.noise(3, 6, seed=1).double().requires_grad_()

    def of_inputs(x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        weight = replace(given, down=down).wide if "wide" in way else given.weight
        return apply.apply(x, weight, None, down, up, 2)  # type: ignore[return-value]

    whole = x @ given.weight.T + x @ given.down.T @ up
    for a, b in zip(of_inputs(x, given.down, up), whole.chunk(2, -1), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(of_inputs, (x, given.down, up))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", ["project", "project, wide"])
def test_in_bf16_the_error_is_that_of_its_8_bits(name: str, layers: int) -> None:
    """To 1 % of the largest number."""
    x = toy.noise(2, 7, 24, seed=2).bfloat16().requires_grad_()
    given = parts(24, 16, [5] * layers, may_have_bias(name), torch.bfloat16)
    assert not projections._merging_pays(x, given.down, given.up)
    assert_is_the_formula(WAYS[name], x, given, 0.01)


@pytest.mark.parametrize("name", ["project", "project, wide"])
def test_a_small_update_is_not_lost_in_bf16(name: str) -> None:
    """ΔW of a thousandth of W is below its 8 bits: merging would round it away."""
    x = toy.noise(64, 16, seed=3).bfloat16()
    given = parts(16, 16, [4], False, torch.bfloat16)
    with torch.no_grad():
        given.weight.fill_(1.0)
        given.ups[0].mul_(1e-3)
        x = x - x.mean(1, keepdim=True)  # so that W x is small and ΔW x is seen
        (with_it,) = WAYS[name](x, given)
        given.ups[0].zero_()
        (without,) = WAYS[name](x, given)
    assert (with_it != without).float().mean() > 0.5


# --- what need not be computed or kept --------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS))
def test_an_output_that_nobody_uses_adds_nothing(way: str) -> None:
    given = parts(12, 8, [3, 2], may_have_bias(way))
    x = toy.noise(5, 12).requires_grad_()
    inputs = learnt(x, given)
    for use, rows in ((0, slice(0, 3)), (1, slice(3, 5))):
        found, wanted = (
            torch.autograd.grad(f(x, given)[use].square().sum(), inputs, materialize_grads=True)
            for f in (WAYS[way], plainly)
        )
        assert_near(list(found), list(wanted), 1e-5)
        assert found[0].any() and found[2 + use].any() and not found[3 - use].any()
        others = found[1].clone()
        others[rows] = 0
        assert found[1][rows].any() and not others.any()


@pytest.mark.parametrize("ranks", [[3], [3, 2]])
@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_model_may_change_an_output_in_place(way: str, ranks: list[int]) -> None:
    """As residual sums do; no other output and no gradient is touched by that."""
    given = parts(12, 8, ranks, may_have_bias(way))
    x = toy.noise(2, 5, 12).requires_grad_()

    def changed(function) -> tuple[Tensor, ...]:
        first, *others = function(x, given)
        first += 1
        first *= 2
        return (first, *others)

    found, grads = value_and_gradients(lambda *_: changed(WAYS[way]), x, given)
    wanted, wanted_grads = value_and_gradients(lambda *_: changed(plainly), x, given)
    assert_near(found, wanted, 1e-5)
    assert_near(grads, wanted_grads, 1e-5)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_rows_of_zeros_are_inert(way: str) -> None:
    """Outputs and gradients of rows in use, to rounding: sums are longer by zeros."""
    x = toy.noise(4, 12).requires_grad_()
    given = parts(12, 8, [3, 2], may_have_bias(way))
    counts = [8, 4]  # rows of each slot

    def padded(tensor: Tensor, count: int) -> Tensor:
        out = tensor.new_zeros(count, tensor.shape[1])
        out[: len(tensor)] = tensor.detach()
        return out

    downs = given.down.split([3, 2])
    down = torch.cat([padded(a, n) for a, n in zip(downs, counts, strict=True)]).requires_grad_()
    ups = [padded(a, n).requires_grad_() for a, n in zip(given.ups, counts, strict=True)]
    plain, plain_grads = value_and_gradients(WAYS[way], x, given)
    found, grads = value_and_gradients(WAYS[way], x, replace(given, down=down, ups=ups))
    assert_near(found, plain, 1e-6)
    used = torch.cat([grads[1][:3], grads[1][8:10]])
    assert_near([grads[0], used, grads[2][:3], grads[3][:2]], plain_grads, 1e-6)
    assert not any(
        grad.any() for grad in (grads[1][3:8], grads[1][10:], grads[2][3:], grads[3][2:])
    )


@pytest.mark.parametrize("way", ["merged", "project", "ranks"])
def test_nothing_of_the_outputs_size_is_kept_for_the_backward_pass(way: str) -> None:
    x = toy.noise(2, 50, 12).requires_grad_()
    given, kept = parts(12, 17, [3, 2], True), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = WAYS[way](x, given)
    assert kept and outputs[0].requires_grad
    wide = (17, 34)
    assert not [shape for shape in kept if len(shape) > 1 and shape[-1] in wide and 50 in shape]
    assert not [shape for shape in kept if 100 in shape and shape[-1] > 5]
    assert max(torch.Size(shape).numel() for shape in kept) <= x.numel()


def test_a_wide_product_keeps_its_outputs_and_nothing_beside() -> None:
    """Those that attention keeps; ΛA x lies behind them in the same memory."""
    x, given, kept = toy.noise(2, 50, 12).requires_grad_(), parts(12, 17, [3, 2], False), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    weight, up = given.wide, given.up
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = projections._ThroughRanks.apply(x, weight, None, given.down, up, 2)
    wanted = (x, weight, given.down, up, outputs[0], outputs[1])
    assert set(kept) == {tensor.untyped_storage().data_ptr() for tensor in wanted}
    assert outputs[0].untyped_storage().nbytes() == 4 * 100 * (34 + 5)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_inputs_and_parameters_are_not_changed(way: str) -> None:
    x, given = toy.noise(2, 5, 12), parts(12, 8, [3, 2], may_have_bias(way))
    tensors = [x, given.weight, given.bias, *given.learnt]
    before = [t.detach().clone() for t in tensors if t is not None]
    value_and_gradients(WAYS[way], x, given)
    after = [t.detach() for t in tensors if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
