"""Where rows go when ranks change, against going through them one by one."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters.rank_change import (
    ResizedWeight,
    RowMove,
    Slot,
    apart,
    slots_of,
)
from lora2_pack.tests.core import toy
from torch import Tensor, nn

torch.set_num_threads(1)

RANKS = st.integers(1, 20)
PAIRS = st.lists(st.tuples(RANKS, RANKS), min_size=1, max_size=6)
MULTIPLES = st.sampled_from([1, 3, 8, 16])


@dataclass(frozen=True)
class Row:
    """One row of a stack, told by itself."""

    component: int
    place: int  # within the slot
    used: bool


def rows_of(slots: tuple[Slot, ...]) -> list[Row]:
    return [
        Row(component, place, place < slot.rank)
        for component, slot in enumerate(slots)
        for place in range(slot.capacity)
    ]


def moved(tensor: Tensor, move: RowMove, fill: float) -> Tensor:
    """Row by row: a rank that both have stays; all else begins."""
    old = {row: n for n, row in enumerate(rows_of(move.old)) if row.used}
    found = []
    for row in rows_of(move.new):
        number = old.get(row) if row.used else None
        found.append(torch.full_like(tensor[0], fill) if number is None else tensor[number])
    return torch.stack(found)


def a_move(pairs: list[tuple[int, int]], multiple: int) -> RowMove:
    old, new = zip(*pairs, strict=True)
    return RowMove(slots_of(old, multiple), slots_of(new, multiple))


# --- slots ------------------------------------------------------------------------------------


@given(st.lists(RANKS, min_size=1, max_size=8), MULTIPLES)
def test_slots_lie_one_below_the_other_each_as_small_as_it_can_be(
    ranks: list[int], multiple: int
) -> None:
    slots, start = slots_of(ranks, multiple), 0
    for slot, rank in zip(slots, ranks, strict=True):
        assert (slot.start, slot.rank) == (start, rank)
        assert slot.capacity == next(n for n in range(rank, 99) if n % multiple == 0)
        assert slot.rows == slice(start, start + rank)
        start += slot.capacity
    if multiple == 1:
        assert start == sum(ranks)


@given(
    st.lists(RANKS, min_size=1, max_size=6),
    st.integers(1, 40),
    st.sampled_from([1, 4, 6, 16]),
    st.booleans(),
)
def test_slots_are_apart_when_no_block_is_in_two(
    ranks: list[int], width: int, numbers: int, made_so: bool
) -> None:
    multiple = numbers // math.gcd(numbers, width) if made_so else 1
    slots = slots_of(ranks, multiple)
    owner = [row.component for row in rows_of(slots) for _ in range(width)]
    blocks = [set(owner[n : n + numbers]) for n in range(0, len(owner), numbers)]
    assert apart(slots, width, numbers) == all(len(block) == 1 for block in blocks)
    assert apart(slots, width, numbers) or not made_so


# --- moves ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(PAIRS, MULTIPLES, st.integers(1, 5), st.sampled_from([0.0, 7.0]))
def test_rows_that_stay_keep_what_they_hold_and_the_others_begin(
    pairs: list[tuple[int, int]], multiple: int, width: int, fill: float
) -> None:
    """Zeros that are no rank never become one: what they hold is nobody's."""
    move = a_move(pairs, multiple)
    old = nn.Parameter(toy.noise(len(rows_of(move.old)), width))
    weight = ResizedWeight.of(old, move)
    assert torch.equal(weight.new.detach(), moved(old.detach(), move, 0))
    assert weight.new.requires_grad and weight.old is old
    assert weight.new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()
    state = toy.noise(*old.shape, seed=1)
    assert torch.equal(weight.resized(state, fill), moved(state, move, fill))
    codes = torch.randint(0, 256, old.shape, dtype=torch.uint8)
    assert torch.equal(weight.resized(codes, 3), moved(codes, move, 3))
    assert weight.resized(codes, 3).dtype == torch.uint8
    assert weight.grew == any(was < now for was, now in pairs)


@settings(deadline=None)
@given(PAIRS, MULTIPLES)
def test_what_begins_begins_where_the_new_weight_is(
    pairs: list[tuple[int, int]], multiple: int
) -> None:
    move = a_move(pairs, multiple)
    weight = ResizedWeight.of(nn.Parameter(toy.noise(len(rows_of(move.old)), 3)), move)
    with torch.no_grad():
        weight.new.copy_(toy.noise(*weight.new.shape, seed=2))
    state = toy.noise(*weight.old.shape, seed=1)
    stays = moved(torch.ones(weight.old.shape), move, 0) == 1
    wanted = torch.where(stays, moved(state, move, 0), weight.new.detach())
    found = weight.begun(state)
    assert torch.equal(found, wanted) and not found.requires_grad


@given(PAIRS, MULTIPLES)
def test_neighbours_that_stay_are_one_piece(pairs: list[tuple[int, int]], multiple: int) -> None:
    """So a change of one rank among hundreds copies a few large pieces."""
    move = a_move(pairs, multiple)
    for pieces in (move.rows, move.capacities):
        assert sum(count for _, count in pieces) == len(rows_of(move.new))
        assert all(count > 0 for _, count in pieces)
        for (start, count), (after, _) in itertools.pairwise(pieces):
            assert start is None or after != start + count
    same = a_move([(rank, rank) for rank, _ in pairs], 1)
    assert same.rows == same.capacities == ((0, sum(rank for rank, _ in pairs)),)


@settings(deadline=None)
@given(PAIRS, st.sampled_from([1, 2, 4]), st.sampled_from([3, 4, 6, 10]), st.integers(1, 9))
def test_scales_go_where_their_blocks_go(
    pairs: list[tuple[int, int]], multiple: int, numbers: int, width: int
) -> None:
    """Every number that stays has the scale that it had; the last block may be a part of one."""
    multiple = math.lcm(multiple, numbers // math.gcd(numbers, width))
    move = a_move(pairs, 1 if len(pairs) == 1 else multiple)
    weight = ResizedWeight.of(nn.Parameter(torch.zeros(len(rows_of(move.old)), width)), move)
    count = weight.old.numel()
    scales = torch.arange(1.0, 1 + -(-count // numbers))
    found = weight.blocks(scales, numbers)
    assert len(found) == -(-weight.new.numel() // numbers)

    def by_number(of: Tensor, like: Tensor) -> Tensor:
        return of.repeat_interleave(numbers)[: like.numel()].view_as(like)

    was, now = by_number(scales, weight.old), by_number(found, weight.new)
    stays = moved(torch.ones(weight.old.shape), move, 0) == 1
    assert torch.equal(now[stays], moved(was, move, 0)[stays])
