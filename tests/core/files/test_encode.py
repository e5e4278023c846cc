"""How long a file will be, and what fp16 will cost it, known before there is one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.files.encode import (
    component_shapes,
    encoded_bytes,
    fits_half,
    norms_and_half_errors,
    shapes_of,
)
from lora2_pack.tests.core import toy

torch.set_num_threads(1)


@settings(deadline=None, max_examples=40)
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 120), st.sampled_from((1e-8, 1.0)), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    metadata=st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=300), max_size=5),
)
def test_the_length_of_a_file_is_known_without_its_data(parts, metadata) -> None:
    components = [
        toy.component(f"b.{i}.to_q", rank, (160, 16, 3, 3) if conv else (130, 150), i, scale)
        for i, (rank, scale, conv) in enumerate(parts)
    ]
    state = lora_file.to_state(components)
    shapes = shapes_of(state)
    assert encoded_bytes(shapes, metadata) == len(lora_file.encode(state, metadata))


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("shape", [(24, 16), (24, 8, 3, 3)])
def test_a_component_is_announced_in_the_shapes_that_it_gets(shape, half: bool) -> None:
    component = toy.component(rank=5, shape=shape, up_scale=1.0 if half else 1e-9)
    state = lora_file.to_state([component])
    key = lora_file.kohya_key(component.name)
    expected = component_shapes(key, 5, shape[1:], 24, half)
    assert shapes_of(state) == expected
    assert component_shapes(key, 0, shape[1:], 24) == {}


@settings(deadline=None, max_examples=40)
@given(
    rank=st.integers(1, 20),
    scale=st.sampled_from((1e-7, 1e-4, 1e-3, 1.0, 1e4)),
    seed=st.integers(0, 99),
)
def test_the_error_of_fp16_is_known_for_every_number_of_columns(rank, scale, seed) -> None:
    down, up = lora_file.fold(toy.component(rank=rank, shape=(48, 40), seed=seed, up_scale=scale))
    norms, errors = norms_and_half_errors(down, up)
    for count in range(1, rank + 1):
        exact = up[:, :count].double() @ down[:count].double()
        half = up[:, :count].half().double() @ down[:count].half().double()
        assert float(norms[count - 1]) == pytest.approx(float(exact.norm()), rel=1e-9)
        relative = float((half - exact).norm() / exact.norm())
        assert float(errors[count - 1]) == pytest.approx(relative, rel=1e-3, abs=1e-7)


def test_where_fp16_overflows_it_does_not_do() -> None:
    down, up = lora_file.fold(toy.component(rank=3, up_scale=1e12))
    norms, errors = norms_and_half_errors(down, up)
    assert norms.isfinite().all()
    assert not fits_half(errors).any()
