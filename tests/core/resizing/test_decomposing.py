"""Both ways to decompose a component, and what of it fp16 can hold."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.files import component as factors
from lora2_pack.lora2_core.files.encode import (
    fold,
    norms_and_half_errors,
)
from lora2_pack.lora2_core.resizing.choice import Outline
from lora2_pack.tests.core import toy
from lora2_pack.tests.core.resizing.test_resize import relative

# --- decomposing ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    rank=st.integers(1, 40),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    scale=st.sampled_from((1e-8, 1.0, 1e5)),
    repeated=st.booleans(),
    seed=st.integers(0, 9),
)
def test_both_ways_to_decompose_agree(rank, size, scale, repeated, seed):
    component = toy.component("x", rank, size, seed, up_scale=scale)
    if repeated:  # columns that say the same
        component.lora_down[rank // 2 :] = component.lora_down[: rank - rank // 2].clone()
    exact = toy.exact_delta(component)
    quick, values = factors.decompose_quickly(component), factors.singular_values(component)
    assert quick.rank <= min(rank, *size)
    assert relative({"": toy.exact_delta(quick)}, {"": exact}) < 1e-6
    torch.testing.assert_close(values.float(), quick.importance, rtol=1e-4, atol=0)
    wanted = torch.linalg.svdvals(exact)[: quick.rank]
    torch.testing.assert_close(
        quick.importance.double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted[0])
    )


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 20), scale=st.sampled_from((1e-12, 1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6)))
def test_fp16_is_only_foretold_where_it_will_do(rank, scale):
    from lora2_pack.lora2_core.resizing.choice import part_of_values

    component = factors.decompose(toy.component("x", rank, (160, 120), up_scale=scale))
    outline = Outline.of(component)
    part = part_of_values(outline, component.importance.double(), 10**6)
    for kept, half in enumerate(part.half, 1):
        down, up = fold(component.first(kept))
        error = norms_and_half_errors(down, up)[1][-1]
        assert not half or error <= 5e-4
    assert scale not in (1e-3, 1.0) or all(part.half)
