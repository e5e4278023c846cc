"""Blocks whose weights stay in RAM compute what they always did, whoever is asked next."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters import pinning, swapping
from lora2_pack.lora2_core.adapters.frozen import in_eight_bits
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.pinning import ram_for
from lora2_pack.lora2_core.adapters.swapping import (
    BlockSwap,
    bytes_of_weights,
    computes_on,
    is_swapped,
    places_of,
    stays_in_ram,
    weights_to_swap,
)
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.tests.core import toy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

torch.set_num_threads(1)
CPU = torch.device("cpu")
WIDTH = 64  # 64 × 64 numbers are the fewest that are worth it


class Block(nn.Module):
    def __init__(self, wide: int):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q = nn.Linear(WIDTH, wide, bias=False)
        self.to_k = nn.Linear(WIDTH, wide, bias=False)
        self.out = nn.Linear(wide, WIDTH)
        self.small = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x)
        hidden = torch.tanh(self.to_q(rows)) * self.to_k(rows)
        return x + self.out(hidden) + self.small(rows).sum(-1, keepdim=True)


class Model(nn.Module):
    def __init__(self, count: int):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH * (1 + n % 2)) for n in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            run = block.forward
            x = checkpoint(run, x, use_reentrant=False) if torch.is_grad_enabled() else run(x)
        return x


def made(count: int, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(count)
    return Model(count).requires_grad_(False).to(dtype)


def swapped(model: Model) -> BlockSwap:
    swap = BlockSwap(list(model.blocks), CPU)
    swap.move(model)
    return swap


def with_adapters(model: Model) -> AdaptiveRankNetwork:
    targets = find_targets(model, r"\.to_|\.out")
    network = AdaptiveRankNetwork(model, targets, RankConfig.fixed(target_rank=4.0), 1)
    with torch.no_grad():
        for seed, layer in enumerate(network.layers):
            layer.lora_up.copy_(toy.noise(*layer.lora_up.shape, seed=seed) / 10)
    return network


def learnt(model: Model, network: AdaptiveRankNetwork, x: Tensor) -> list[Tensor]:
    network.refresh()
    loss = model(x).float().square().mean()
    loss.backward()
    found = [loss.detach()]
    for layer in network.layers:  # stacks are others where layers are not joined
        stack, place = layer._held
        rows = stack.slots[place].rows
        found += [weight.grad[rows] for weight in (stack.down, stack.up) if weight.grad is not None]
    network.zero_grad()
    return found


# --- what is computed -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("eight", [False, True], ids=["fp32", "fp8"])
def test_gradients_are_those_of_weights_that_are_there(count: int, eight: bool):
    """Step after step, with a look at the model between two steps."""
    plain, other = made(count), made(count)
    for model in (plain, other):
        if eight:
            in_eight_bits(model)
    swap = swapped(other)
    networks = [with_adapters(model) for model in (plain, other)]
    for step in range(3):
        x = toy.noise(2, 5, WIDTH, seed=step)
        found = [learnt(m, n, x) for m, n in zip((plain, other), networks, strict=True)]
        for one, two in zip(*found, strict=True):
            if eight:  # nothing is joined there, swapped or not
                assert torch.equal(one, two)
            else:
                assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)
        with torch.inference_mode():
            looked = [model(x) for model in (plain, other)]
        assert torch.allclose(*looked, rtol=1e-5, atol=1e-6)
    assert len(swap.places) == min(2, count)


@given(
    order=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    learns=st.booleans(),
    kept=st.sets(st.integers(0, 4)),
)
def test_whoever_is_asked_has_its_own_weights(order: list[int], learns: bool, kept: set[int]):
    """Guesses of what comes next may be wrong; and some weights come to stay."""
    model, truth = made(5), made(5)
    swap = swapped(model)
    swap.keep_in_ram([model.blocks[n] for n in kept])
    own = bytes_of_weights(list(truth.blocks))
    for number in order:
        with torch.set_grad_enabled(learns):
            x = toy.noise(1, WIDTH, seed=number)
            assert torch.equal(model.blocks[number](x), truth.blocks[number](x))
    assert [is_swapped(block) for block in model.blocks] == [n in kept for n in range(5)]
    largest = max((own[n] for n in kept), default=0)
    assert [len(place) for place in places_of(model)] == [largest] * min(2, len(kept))
    assert all(map(torch.equal, model.state_dict().values(), truth.state_dict().values()))


def test_passes_fetch_ahead_and_nothing_twice(monkeypatch: pytest.MonkeyPatch):
    """Forward, backward, forward: of five blocks in two places each pass copies what it must."""
    model = made(5)
    swapped(model)
    network = with_adapters(model)
    fetched: list[int] = []
    numbers = {id(block): n for n, block in enumerate(model.blocks)}
    original = swapping._Piece.copy_to

    def copy_to(piece: Any, memory: Tensor) -> None:
        fetched.append(numbers[id(piece.block)])
        original(piece, memory)

    monkeypatch.setattr(swapping._Piece, "copy_to", copy_to)
    x = toy.noise(2, 5, WIDTH)
    for _ in range(3):
        learnt(model, network, x)
    assert fetched == [0, 1, 2, 3, 4, 2, 1, 0, *[2, 3, 4, 2, 1, 0] * 2]
    fetched.clear()
    with torch.no_grad():
        model(x), model(x)
    assert fetched == [2, 3, 4, 0, 1, 2, 3, 4, 0]


# --- where it is ------------------------------------------------------------------------------


def test_what_stays_in_ram_and_what_goes():
    model = made(3)
    names = {name: weight for name, weight in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    swap = swapped(model)
    assert {name: weight for name, weight in model.named_parameters()} == names  # the very same
    for block in model.blocks:
        layers = {name for name, layer in block.named_modules() if stays_in_ram(layer)}
        assert layers == {"to_q", "to_k", "out"}
    assert not stays_in_ram(model.first)
    assert bytes_of_weights(list(model.blocks)) == [4 * 3 * n * WIDTH**2 for n in (1, 2, 1)]
    moved: list[str] = []
    model._apply = lambda fn: moved.extend(n for n, _ in model.named_parameters())  # type: ignore
    swap.move(model)
    assert "blocks.0.to_q.weight" not in moved and "blocks.0.out.bias" in moved
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


def test_shared_learnt_and_small_weights_go_where_the_model_does():
    model = made(2)
    model.blocks[1].to_q.weight = model.blocks[0].to_q.weight
    model.blocks[0].out.weight.requires_grad_(True)
    names = [{n for n, m in b.named_modules() if m in found} for b, found in _found(model)]
    assert names == [{"to_k"}, {"to_k", "out"}]


def _found(model: Model) -> Iterator[tuple[nn.Module, Any]]:
    return zip(model.blocks, weights_to_swap(list(model.blocks)), strict=True)


def test_adapters_are_where_the_layer_computes():
    model = made(2)
    BlockSwap(list(model.blocks), torch.device("meta"))
    assert computes_on(model.blocks[0].to_q).type == "meta"
    assert computes_on(model.first).type == "cpu"
    targets = find_targets(model, r"\.to_q")
    network = AdaptiveRankNetwork(model, targets, RankConfig.fixed(target_rank=4.0), 1)
    assert {weight.device.type for weight in network.weights()} == {"meta"}


def test_layers_that_are_fetched_compute_alone():
    plain, other = made(1), made(1)
    swapped(other)
    groups = [
        [len(group.layers) for groups in with_adapters(m)._groups for group in groups]
        for m in (plain, other)
    ]
    assert sorted(groups[0]) == [1, 2] and sorted(groups[1]) == [1, 1, 1]


SIZES = st.lists(st.integers(1, 40).map(lambda n: 256 * n), max_size=40)


@given(sizes=SIZES, granted=st.integers(0, 5), pinned=st.booleans())
def test_pieces_of_ram_are_whole_and_apart(sizes: list[int], granted: int, pinned: bool):
    with _pinning(granted) as asked:
        pieces = list(ram_for(sizes, pinned))
    assert [len(piece) for piece in pieces] == sizes
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % 16 == 0 and piece.is_contiguous()
        piece.fill_(number)
    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces))
    assert all(size.bit_count() == 1 for size in asked) and (pinned or not asked)


@pytest.mark.parametrize("each", [1, 2], ids=["fp8", "bf16"])
def test_what_pytorch_rounds_up_is_hardly_anything(each: int):
    """SDXL's blocks: PyTorch pins powers of two, and would take twice their size one by one."""
    sizes = [each * n for n in [9_994_240] * 4 + [34_734_080] * 60 + [9_994_240] * 6]
    left, taken = list(sizes), 0
    while left:
        taken, room = taken + (size := pinning._next_size(left)), size
        while left and left[0] <= room:
            room -= left.pop(0)
    assert sum(sizes) <= taken < 1.05 * sum(sizes)
    assert sum(map(pinning._power_of_two, sizes)) > 1.9 * sum(sizes)


def test_ram_that_cannot_be_pinned_will_do(caplog: pytest.LogCaptureFixture):
    with _pinning(0), caplog.at_level(logging.WARNING):
        pinning._tell.cache_clear()
        for _ in range(2):  # told once
            assert [len(piece) for piece in ram_for((300, 4), True)] == [300, 4]
    told = "LoRA²: RAM cannot be pinned, so that copies to and from the card take longer: "
    told += "CUDA error: out of "
    assert [record.message for record in caplog.records] == [f"{told}memory"]


@contextmanager
def _pinning(granted: int) -> Iterator[list[int]]:
    """Inside, so many requests for pinned RAM are granted, of the sizes that are given."""
    original, asked = torch.empty, []

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if pin_memory:
            if len(asked) == granted:
                raise RuntimeError("CUDA error: out of memory\nand more")
            asked.append(args[0][0])
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield asked


def test_ram_of_blocks_that_have_left_is_free(monkeypatch: pytest.MonkeyPatch):
    """Though what is pinned at once holds several, and not all of them leave."""
    with _pinning(9) as asked:
        monkeypatch.setattr(swapping, "ram_for", lambda sizes, _pinned: ram_for(sizes, True))
        model, truth = made(8), made(8)
        swap = swapped(model)
        whole, sizes = sum(asked), bytes_of_weights(list(model.blocks))
        swap.keep_in_ram([model.blocks[3]])
    [piece] = swap._pieces
    assert sum(sizes) <= whole and len(asked) > 1
    assert piece.ram.untyped_storage().nbytes() < 2 * sizes[3] < whole / 2
    assert all(map(torch.equal, model.state_dict().values(), truth.state_dict().values()))
    x = toy.noise(1, WIDTH)
    assert torch.equal(model.blocks[3](x), truth.blocks[3](x))


# --- in time ----------------------------------------------------------------------------------


class Streams:
    """Stands in for a GPU's streams: a copy is there when its event has been waited for, and not
    before; no copy begins over what the device may still read."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []
        self.waited = False
        self.inside = False

    def wait_stream(self, _other: Any) -> None:
        self.waited = True

    def record_event(self) -> list[Callable[[], None]]:
        event, self.pending = self.pending, []
        return event

    def wait_event(self, event: list[Callable[[], None]]) -> None:
        while event:
            event.pop()()

    @contextmanager
    def enter(self, _stream: Any) -> Iterator[None]:
        assert self.waited
        self.inside, self.waited = True, False
        yield
        self.inside = False


def test_a_block_waits_for_its_weights_and_a_copy_for_who_reads(monkeypatch: pytest.MonkeyPatch):
    streams = Streams()
    original = swapping._Piece.copy_to

    def copy_to(piece: Any, memory: Tensor) -> None:
        assert streams.inside
        memory.fill_(255)  # NaN, until the copy is there
        streams.pending.append(lambda: original(piece, memory))

    monkeypatch.setattr(swapping._Piece, "copy_to", copy_to)
    monkeypatch.setattr(torch.cuda, "stream", streams.enter)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: streams)
    plain, model = made(5), made(5)
    swapped(model)._stream = streams  # type: ignore[assignment]
    networks = [with_adapters(m) for m in (plain, model)]
    for step in range(2):
        x = toy.noise(2, 5, WIDTH, seed=step)
        found = [learnt(m, n, x) for m, n in zip((plain, model), networks, strict=True)]
        for one, two in zip(*found, strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(plain(x), model(x), rtol=1e-5, atol=1e-6)
