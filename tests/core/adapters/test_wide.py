"""What attention reads is one product, ΛA below the frozen weights; nobody can tell."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from lora2_pack.lora2_core.adapters import grouping
from lora2_pack.lora2_core.adapters import network as network_module
from lora2_pack.lora2_core.adapters.grouping import ProjectionGroup
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.tests.core import stacked, toy
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

torch.set_num_threads(1)

# Where weights are merged; where they go through their ranks; and where that is the only way.
KINDS = [(16, torch.float32, 1e-5), (96, torch.float32, 1e-5), (32, torch.bfloat16, 0.02)]
TYPES = pytest.mark.parametrize(("width", "dtype", "tolerance"), KINDS)
# Ranks of the 16 layers of two blocks, after one another: up by a few rows, beyond the room of
# the first 32, down, and up again. None is above 16, the width of the narrowest.
PLAN = [[4.0] * 16, [5.0, 3.0] * 8, [16.0, 14.0] * 8, [2.0] * 16, [1.0, 12.0] * 8]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a call saved is worth that outputs lie apart."""
    monkeypatch.setattr(grouping, "_calls_cost", lambda _: True)


def test_on_a_cpu_nothing_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = blocks(16, torch.float32)
    assert not Adapted(model, toy.adapt(model, target_rank=4)).wide()


def blocks(width: int, dtype: torch.dtype) -> toy.Transformer:
    """Two; the second has a bias in one of the three layers that read one input."""
    made = toy.Transformer(2, width, 16)
    made.blocks[1].attn1.to_k = nn.Linear(width, width)
    toy.freeze(made, seed=1)
    return made.to(dtype)


@dataclass
class Adapted:
    model: toy.Transformer
    net: AdaptiveRankNetwork

    def groups(self) -> list[ProjectionGroup]:
        return list(dict.fromkeys(layer.group[0] for layer in self.net.layers))

    def wide(self) -> list[ProjectionGroup]:
        return [group for group in self.groups() if group._beside]

    def asked(self) -> list[Tensor]:
        """What the model says, and the gradients of A, B and ν."""
        for parameter in (*self.net.weights(), self.net.log_nu):
            parameter.grad = None
        layer = self.model.blocks[0].attn1.to_q
        layer = getattr(layer, "base", layer)
        x, context = toy.noise(2, 6, layer.in_features), toy.noise(2, 5, 16)
        out = self.model(x.to(layer.weight.dtype), context.to(layer.weight.dtype))
        out.float().square().mean().backward()
        grads = stacked.by_component(self.net, stacked.grad_of)
        return [out.detach(), *grads, self.net.log_nu.grad]


def adapted(
    width: int, dtype: torch.dtype, wide: bool = True, together: bool = True, padded: bool = False
) -> Adapted:
    model = blocks(width, dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not wide:
            patch.setattr(network_module, "ATTENDED", set())
        if not together:
            patch.setattr(grouping, "_MOST_RANKS", 0)
        net = toy.adapt(model, target_rank=4.0, max_rank=16, hysteresis=False, growth="random")
    if padded:
        net.keep_apart(256)
    found = Adapted(model, net)
    assert len(found.groups()) == (10 if together else 16)
    assert len(found.wide()) == ((5 if together else 11) if wide else 0)
    return found


def move_to(found: Adapted, ranks: list[float], std: float) -> None:
    """Other ranks and other weights, as after a step."""
    toy.resize(found.net, ranks, torch.optim.SGD(found.net.weights(), 0.1))
    stacked.randomise(found.net.layers, std)
    found.net.refresh()


def assert_alike(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for n, (a, b) in enumerate(zip(found, wanted, strict=True)):
        size = max(float(b.double().norm()), 1e-6)
        assert float((a.double() - b.double()).norm()) <= tolerance * size, n


@TYPES
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("wide", "together"), [(True, True), (True, False), (False, True)])
def test_whatever_computes_together_is_each_layer_by_itself(
    width: int,
    dtype: torch.dtype,
    tolerance: float,
    wide: bool,
    together: bool,
    padded: bool,
) -> None:
    """Outputs and gradients through every change of ranks, and where nothing is folded."""
    plain = adapted(width, dtype, wide=False, together=False)
    found = adapted(width, dtype, wide, together, padded)
    for n, ranks in enumerate(PLAN):
        for one in (plain, found):
            move_to(one, ranks, 0.1 + 0.01 * n)
        assert found.net.ranks == plain.net.ranks == [int(rank) for rank in ranks]
        wanted = plain.asked()
        assert all(part.any() for part in wanted)
        assert_alike(found.asked(), wanted, tolerance)
        for one in (plain, found):
            one.net.refresh()
            one.net.let_go()
        alone = plain.asked()  # each output is rounded twice then, which bf16 shows
        assert_alike(alone, wanted, 4 * tolerance)
        assert_alike(found.asked(), alone, tolerance)


@TYPES
@pytest.mark.parametrize("padded", [False, True])
def test_what_lies_below_follows_every_step_and_what_is_frozen_stays(
    width: int, dtype: torch.dtype, tolerance: float, padded: bool
) -> None:
    """Bit for bit; it grows by 32 rows at a time, never shrinks, and is there once."""
    before = blocks(width, dtype).state_dict()
    found, most = adapted(width, dtype, padded=padded), {}
    for n, ranks in enumerate([*PLAN, PLAN[0]]):
        move_to(found, ranks, 0.1 + 0.01 * n)
        found.asked()
        for group in found.wide():
            frozen = [layer.base.weight for layer in group.layers]
            out, rows = sum(len(weight) for weight in frozen), group.rows
            assert torch.equal(group._with_down[:out], torch.cat(frozen))
            assert torch.equal(group._with_down[out:], group._down)
            assert len(group._down) == rows == len(group._with_down) - out
            most[group] = max(most.get(group, 0), -(-rows // 32) * 32)
            storages = {weight.untyped_storage() for weight in (*frozen, group._with_down)}
            (size,) = {storage.nbytes() for storage in storages}
            assert len({storage.data_ptr() for storage in storages}) == 1
            assert size == (out + most[group]) * group._down.shape[1] * dtype.itemsize
        after = found.model.state_dict()
        assert [name.replace(".base.", ".") for name in after] == list(before)
        for (name, value), wanted in zip(after.items(), before.values(), strict=True):
            assert value.shape == wanted.shape and torch.equal(value, wanted), name
    assert len({*most.values()}) > 1 or padded
    assert min(most.values()) >= 32


def test_growth_lets_go_of_the_room_that_was_too_small() -> None:
    found = adapted(32, torch.float32)
    large = [group for group in found.wide() if len(group.layers) == 3]  # 12 rows, and then 48
    old = [StorageWeakRef(group._wide.untyped_storage()) for group in large]
    assert len(old) == 1 and not old[0].expired()
    move_to(found, [16.0] * 16, 0.1)
    gc.collect()
    assert old[0].expired() and len(large[0]._wide) == 3 * 32 + 64
    rooms = [group._wide for group in found.wide()]
    spare = [len(g._wide) - len(g._weight) - g.rows for g in found.wide()]
    assert 0 in spare and max(spare) > 0
    found.net.refresh()  # nothing is made anew, also where there is not a row to spare
    assert all(a is group._wide for a, group in zip(rooms, found.wide(), strict=True))


def test_nothing_is_copied_below_weights_of_another_type() -> None:
    """As fp32 below those of a text encoder in fp16 would be, and nobody would read it."""
    found = adapted(32, torch.bfloat16)
    for group in found.groups():
        room = group.room_for(group._down)
        assert (room is None) == (group not in found.wide())
        assert room is None or (room.dtype == torch.bfloat16 and torch.equal(room, group._down))
        assert group.room_for(group._down.float()) is None


@pytest.mark.parametrize("wide", [False, True])
def test_what_is_let_go_of_takes_no_memory(wide: bool) -> None:
    found = adapted(32, torch.bfloat16, wide)
    with torch.no_grad():
        found.net.refresh()
    watched = [weakref.ref(part) for part in found.net.folded()]
    assert len(watched) == 20 and all(ref() is not None for ref in watched)
    found.net.let_go()
    gc.collect()
    assert [ref() for ref in watched] == [None] * 20
    assert not any(part.numel() for part in found.net.folded())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_written_in_place_are_those_that_compute(dtype: torch.dtype) -> None:
    """As a model's saved weights are loaded."""
    found = adapted(96, dtype)
    state = {name: value.clone() for name, value in found.model.state_dict().items()}
    with torch.no_grad():
        for value in found.model.state_dict().values():
            value.zero_()
    stacked.randomise(found.net.layers, 0.1)
    found.net.refresh()
    changed = found.asked()
    found.model.load_state_dict(state)
    found.net.refresh()
    plain = adapted(96, dtype, wide=False, together=False)
    stacked.randomise(plain.net.layers, 0.1)
    plain.net.refresh()
    wanted = plain.asked()
    assert_alike(found.asked(), wanted, 1e-5 if dtype == torch.float32 else 0.02)
    assert not torch.allclose(changed[0], wanted[0])
