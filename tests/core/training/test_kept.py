"""Which blocks to compute twice, for activations to fit into what is free."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.lora2_core.training.memory import Kept

blocks = st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 10**5)), min_size=1, max_size=6)


@given(st.integers(0, 10**6), blocks, st.integers(0, 10**7))
def test_no_fewer_blocks_would_do(outside: int, sizes: list[tuple[int, int]], room: int) -> None:
    """Blocks keep more than their inputs, as they do; against every choice of so many blocks."""
    sizes = [(inside + inputs, inputs) for inside, inputs in sizes]
    inside, inputs = zip(*sizes, strict=True)
    kept = Kept(outside, inside, inputs)
    twice = kept.fewest_twice(room)
    everything = range(len(sizes))
    if kept.activations(twice) > room:
        assert twice == tuple(everything)
        return
    assert list(twice) == sorted(set(twice)) and set(twice) <= set(everything)
    if not twice:
        return
    for fewer in itertools.combinations(everything, len(twice) - 1):
        saved = sum(inside[n] - inputs[n] for n in fewer)
        ours = sum(inside[n] - inputs[n] for n in twice)
        assert kept.activations(fewer) > room or saved > ours


@given(st.integers(0, 10**6), blocks)
def test_with_enough_room_nothing_is_computed_twice(outside: int, sizes) -> None:
    inside, inputs = zip(*sizes, strict=True)
    kept = Kept(outside, inside, inputs)
    assert kept.fewest_twice(kept.activations(())) == ()
    whole = int(2.3 * outside + sum(inputs) + 2 * max(inside))
    assert abs(kept.activations(range(len(sizes))) - whole) <= 1
