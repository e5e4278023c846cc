"""One component's mathematics where numbers are unkind: columns that cancel, sides that differ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.files.component import (
    Component,
    column_energies,
    decompose_quickly,
    singular_values,
    sum_of,
)
from lora2_pack.tests.core import toy

torch.set_num_threads(1)


def opposed(rank: int, seed: int, share: float) -> Component:
    """The second half of the columns takes ``share`` of the first half off again."""
    component = toy.component("x", 2 * rank, (40, 32), seed)
    component.lora_down[rank:] = component.lora_down[:rank]
    component.importance[:] = 1
    component.lora_up[:, rank:] = -share * component.lora_up[:, :rank]
    return component


@settings(deadline=None, max_examples=40)
@given(rank=st.integers(1, 8), seed=st.integers(0, 50), share=st.floats(0.05, 0.95))
def test_energies_tell_the_error_of_every_cut(rank, seed, share):
    for component in (opposed(rank, seed, share), toy.component("x", rank, (40, 32), seed)):
        exact = toy.exact_delta(component)
        energies = column_energies(component)
        total = float(exact.square().sum())
        assert float(energies.sum()) == pytest.approx(total, rel=1e-9)
        for kept in range(component.rank + 1):
            off = toy.exact_delta(component.first(kept)) - exact if kept else -exact
            told = total - float(energies[:kept].sum())
            assert told == pytest.approx(float(off.square().sum()), rel=1e-6, abs=1e-9 * total)


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.3, -0.3), (0.1, 0.2, -0.3)])
def test_what_cancels_holds_nothing(weights: tuple[float, ...]):
    component = toy.component("x", 4, (40, 32))
    total = sum_of("x", [(component, weight) for weight in weights])
    assert not column_energies(total).any()
    assert not singular_values(total).numel()
    assert decompose_quickly(total).rank == 0
    left = sum_of("x", [(component, 1.0), (component, -0.999)])  # a little is no rounding
    assert float(column_energies(left).sum()) > 0
    assert decompose_quickly(left).rank == component.rank


@pytest.mark.parametrize("decades", [4, 8, 12])
def test_sides_that_make_up_for_each_other(decades: int):
    """Rows of A that shrink where columns of B grow: none of them is rounding."""
    component = toy.component("x", 20, (80, 64))
    component.importance[:] = 1
    component.lora_down.mul_(torch.logspace(0, -decades, 20)[:, None])
    component.lora_up.mul_(torch.logspace(-decades, 0, 20))
    exact = toy.exact_delta(component)
    wanted = torch.linalg.svdvals(exact)[:20]
    torch.testing.assert_close(singular_values(component), wanted, rtol=1e-6, atol=0)
    quick = decompose_quickly(component)
    off = toy.exact_delta(quick) - exact
    assert float(off.norm() / exact.norm()) < 1e-6


def test_a_column_of_zeros_on_one_side():
    component = toy.component("x", 5, (40, 32))
    component.lora_up[:, 1] = 0
    component.lora_down[3] = 0
    exact, quick = toy.exact_delta(component), decompose_quickly(component)
    assert quick.rank == 3
    assert float((toy.exact_delta(quick) - exact).norm() / exact.norm()) < 1e-6
