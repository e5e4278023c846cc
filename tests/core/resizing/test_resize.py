"""Smaller files and sums: what they promise holds, and their bytes are those of our format."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.checks import ConfigError
from lora2_pack.lora2_core.config.load import ORDERS, Limits
from lora2_pack.lora2_core.files import component as factors
from lora2_pack.lora2_core.files import decode
from lora2_pack.lora2_core.files.encode import (
    DOWN,
    UP,
    encode,
    kohya_key,
    to_state,
)
from lora2_pack.lora2_core.lora_file import LoRAFileError
from lora2_pack.lora2_core.resizing.choice import Outline
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.lora2_core.resizing.stream import Planned, write_stream
from lora2_pack.tests.core import toy
from lora2_pack.tests.core.resizing.test_shrink import shrunk
from torch import Tensor

torch.set_num_threads(1)

NAMES = tuple(
    f"input_blocks.4.1.transformer_blocks.0.attn{a}.{layer}"
    for a in (1, 2)
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
)
METADATA = {
    "ss_output_name": "mine", "ss_note": "naïve ☃ \n\t\"quoted\" \x01", "lora2.mean_rank": "5.000",
    "modelspec.trigger_phrase": "sks dog", "modelspec.title": "mine", "kept": "as it is",
}  # fmt: skip
NOTHING = Limits()


def components(seed: int = 0, ranks: tuple[int, ...] = (1, 2, 3, 5, 8, 13, 4, 7)):
    made = [
        toy.component(name, rank, (40, 32), seed=seed + index)
        for index, (name, rank) in enumerate(zip(NAMES, ranks, strict=True))
    ]
    made.append(toy.component("input_blocks.1.0.in_layers.2", 3, (16, 8, 3, 3), seed=seed + 99))
    return made


def written(path: Path, seed: int = 0, **metadata: str) -> Path:
    return lora_file.save(path, components(seed), METADATA | metadata)


def foreign(path: Path, seed: int = 0, alpha: float | None = 2.0) -> Path:
    """The same kind of LoRA as PEFT names it, in fp32, its scale not 1."""
    state: dict[str, Tensor] = {}
    for component in components(seed)[:8]:
        name = f"base_model.model.unet.{component.name}"
        state[f"{name}.lora_A.weight"] = component.lora_down.contiguous()
        state[f"{name}.lora_B.weight"] = component.lora_up.contiguous()
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    safetensors.torch.save_file(state, path, {"ss_network_dim": "8"})
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    """ΔW of every component in float64, by kohya key."""
    from lora2_pack.lora2_core.resizing.source import LoRASource

    with LoRASource(path) as source:
        return {key: toy.exact_delta(source.component(key)) for key in source.keys}


def relative(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Over all components; one that is missing is zero."""
    assert got.keys() <= wanted.keys()
    off = sum(float((got.get(k, 0 * w) - w).square().sum()) for k, w in wanted.items())
    return math.sqrt(off / sum(float(w.square().sum()) for w in wanted.values()))


# --- resizing ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    energy=st.floats(0.05, 0.9999),
    order=st.sampled_from(ORDERS),
    max_rank=st.one_of(st.none(), st.integers(1, 9)),
    kind=st.sampled_from((written, foreign)),
    seed=st.integers(0, 5),
)
def test_what_is_kept_is_what_is_promised(tmp_path_factory, energy, order, max_rank, kind, seed):
    folder = tmp_path_factory.mktemp("resize")
    source = kind(folder / "a.safetensors", seed)
    found = resize_file(
        source, folder / "b.safetensors", Limits(max_rank=max_rank, energy=energy, order=order)
    )
    error = relative(deltas(found.path), deltas(source))
    assert error == pytest.approx(found.error, abs=1e-3)
    if max_rank is None:
        assert found.kept >= energy - 1e-9
    else:
        assert max(found.ranks_after) <= max_rank
    told = {info.key: info.rank for info in lora_file.inspect(found.path)[0]}
    assert sorted(told.values()) == sorted(found.ranks_after)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 50), max_rank=st.integers(1, 12))
def test_a_decomposition_is_never_worse_than_the_learnt_order(tmp_path_factory, seed, max_rank):
    folder = tmp_path_factory.mktemp("orders")
    source = written(folder / "a.safetensors", seed)
    svd, learnt = (
        resize_file(source, folder / f"{order}.safetensors", Limits(max_rank=max_rank, order=order))
        for order in ORDERS
    )
    wanted = deltas(source)
    best, cut = (relative(deltas(found.path), wanted) for found in (svd, learnt))
    assert best <= cut + 5e-4  # what fp16 rounds
    assert svd.error <= learnt.error + 1e-9


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_a_size_is_met_and_never_exceeded(tmp_path: Path, order: str, share: float):
    made = [toy.component(f"blocks.{i}.attn1.to_q", 24, (160, 160), seed=i) for i in range(12)]
    source = lora_file.save(tmp_path / "a.safetensors", made, METADATA)
    limit = round(source.stat().st_size * share / 1e6, 4)
    found = resize_file(source, tmp_path / "b", Limits(megabytes=limit, order=order))
    assert found.after == found.path.stat().st_size
    assert 0.99 * limit * 1e6 <= found.after <= limit * 1e6


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("limits", [{}, {"max_rank": 13}, {"energy": 1.0}, {"megabytes": 1.0}])
def test_its_own_ranks_are_a_no_op(tmp_path: Path, order: str, limits: dict):
    source = written(tmp_path / "a.safetensors")
    found = resize_file(source, tmp_path / "b.safetensors", Limits(order=order, **limits))
    assert found.path.read_bytes() == source.read_bytes()
    assert found.error == 0 and found.ranks_before == found.ranks_after
    again = resize_file(found.path, source, Limits(order=order, **limits))  # over itself too
    assert again.after == again.before


def test_another_trainer_s_lora_becomes_ours(tmp_path: Path):
    source = foreign(tmp_path / "peft.safetensors")
    found = resize_file(source, tmp_path / "ours.safetensors", NOTHING)
    assert relative(deltas(found.path), deltas(source)) < 5e-4
    state, metadata = lora_file.load(found.path).state, lora_file.load(found.path).metadata
    assert metadata["lora2.format_version"] == "1"
    assert metadata["ss_network_dim"] == "Dynamic"
    key = kohya_key(NAMES[3])
    assert state[key + ".alpha"] == 1 and state[key + ".lora_down.weight"].shape[0] == 5
    assert {info.nu for info in lora_file.inspect(found.path)[0]} == {None}


def test_metadata_is_kept_and_extended(tmp_path: Path):
    source = written(tmp_path / "a.safetensors")
    found = resize_file(source, tmp_path / "small.safetensors", Limits(max_rank=2))
    before, after = (lora_file.load(path).metadata for path in (source, found.path))
    for same in ("ss_note", "modelspec.trigger_phrase", "kept"):
        assert after[same] == before[same]
    told = json.loads(after["lora2.resize"])
    assert told["from"] == "a.safetensors" and told["hash"] == before["sshs_model_hash"]
    assert told["max_rank"] == 2 and told["order"] == "svd"
    assert float(told["kept_energy"]) == pytest.approx(found.kept, abs=1e-6)
    assert after["modelspec.title"] == after["ss_output_name"] == "small"
    ranks = [entry["rank"] for entry in json.loads(after["lora2.components"]).values()]
    assert float(after["lora2.mean_rank"]) == pytest.approx(sum(ranks) / len(ranks), abs=1e-3)
    nus = [info.nu for info in lora_file.inspect(found.path)[0]]
    assert nus == [info.nu for info in lora_file.inspect(source)[0]]


def test_the_bytes_are_those_of_the_format(tmp_path: Path):
    made = [toy.component(f"blocks.{i}.attn1.to_q", 8, (320, 320), seed=i) for i in range(120)]
    state = to_state(made)
    wanted = encode(state, METADATA)
    assert len(wanted) > 0x110000, "the short hash must see tensors"
    planned = [
        Planned(Outline.of(c), c.rank, state[Outline.of(c).key + UP].dtype == torch.float16)
        for c in made
    ]

    def tensors(one: Planned) -> tuple[Tensor, Tensor]:
        return tuple(state[one.outline.key + end] for end in (DOWN, UP))

    size = write_stream(tmp_path / "x", planned, METADATA, tensors)
    assert (tmp_path / "x").read_bytes() == wanted and size == len(wanted)


def test_one_component_at_a_time(tmp_path: Path, monkeypatch):
    source = written(tmp_path / "a.safetensors")
    alive: set[int] = set()
    most = 0
    real = factors.component_from_tensors

    class Watched:
        def __init__(self, number: int):
            self.number = number
            alive.add(number)

        def __del__(self):
            alive.discard(self.number)

    count = 0

    def watched(*args, **kwargs):
        nonlocal most, count
        count += 1
        found = real(*args, **kwargs)
        found.lora_down.watcher = Watched(count)
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(decode, "component_from_tensors", watched)
    resize_file(source, tmp_path / "b", Limits(energy=0.9))
    assert 9 < count <= 18 and most <= 2


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_rank": 0}, "max_rank is 0.*1 to 4096"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"megabytes": -1}, "megabytes is -1"),
        ({"order": "best"}, "order is 'best'; choose one of svd, learnt"),
    ],
)
def test_limits_that_cannot_be_meant(limits: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Limits(**limits)


def test_what_cannot_be_cut_is_named(tmp_path: Path):
    state = {f"lora_unet_x.hada_w{n}_{side}": torch.ones(2, 2) for n in (1, 2) for side in "ab"}
    safetensors.torch.save_file(state, tmp_path / "loha.safetensors")
    with pytest.raises(LoRAFileError, match=r"loha\.safetensors holds LoHa, which have no ranks"):
        resize_file(tmp_path / "loha.safetensors", tmp_path / "b", NOTHING)
    source = written(tmp_path / "a.safetensors")
    with pytest.raises(LoRAFileError, match="no room for a single"):
        resize_file(source, tmp_path / "b", Limits(megabytes=0.001))
    data = bytearray(source.read_bytes())
    data[-2:] = b"\xff\x7f"  # not a number
    (tmp_path / "nan.safetensors").write_bytes(data)
    with pytest.raises(LoRAFileError, match=r"nan\.safetensors is damaged: .* not finite"):
        resize_file(tmp_path / "nan.safetensors", tmp_path / "b", Limits(max_rank=1))
    assert not (tmp_path / "b").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path):
    source, target = written(tmp_path / "a.safetensors"), written(tmp_path / "b.safetensors", 7)
    before = target.read_bytes()
    with toy.file_size_limit(1000), pytest.raises(LoRAFileError, match="could not be written"):
        resize_file(source, target, Limits(max_rank=2))
    assert target.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


# --- adding -----------------------------------------------------------------------------------

weights = st.lists(st.sampled_from((1.0, 0.5, -0.7, 1.3, 1e-3)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=20)
@given(weights=weights, kinds=st.lists(st.booleans(), min_size=4, max_size=4))
def test_a_sum_is_the_sum_of_the_patches(tmp_path_factory, weights, kinds):
    folder = tmp_path_factory.mktemp("merge")
    sources = [
        ((foreign if kind else written)(folder / f"{i}.safetensors", 10 * i), weight)
        for i, (weight, kind) in enumerate(zip(weights, kinds, strict=False))
    ]
    found = merge_files(sources, folder / "sum.safetensors", NOTHING)
    wanted: dict[str, Tensor] = {}
    for path, weight in sources:
        for key, delta in deltas(path).items():
            wanted[key] = wanted.get(key, 0) + weight * delta
    assert relative(deltas(found.path), wanted) < 1e-5
    for info in lora_file.inspect(found.path)[0]:
        assert info.rank <= min(info.in_features, info.out_features)


def test_strengths_commute_with_a_sum(tmp_path: Path):
    a, b = written(tmp_path / "a", 1), written(tmp_path / "b", 2)
    once = merge_files([(a, 0.5), (b, 0.25)], tmp_path / "once", NOTHING)
    first = merge_files([(a, 1.0), (b, 0.5)], tmp_path / "first", NOTHING)
    halved = merge_files([(first.path, 0.5)], tmp_path / "halved", NOTHING)
    assert relative(deltas(halved.path), deltas(once.path)) < 1e-5


def test_a_sum_within_limits(tmp_path: Path):
    sources = [(written(tmp_path / f"{i}", 10 * i), 1.0) for i in range(3)]
    whole = merge_files(sources, tmp_path / "whole", NOTHING)
    cut = merge_files(sources, tmp_path / "cut", Limits(energy=0.95))
    assert cut.kept >= 0.95 and cut.after < whole.after
    assert relative(deltas(cut.path), deltas(whole.path)) == pytest.approx(cut.error, abs=1e-3)


def test_a_sum_tells_of_what_it_is(tmp_path: Path):
    a, b = written(tmp_path / "a", 1), written(tmp_path / "b", 2)
    found = merge_files([(a, 1.0), (b, 1.0)], tmp_path / "sum", NOTHING)
    told = json.loads(lora_file.load(found.path).metadata["lora2.merge"])
    assert [one["name"] for one in told["from"]] == ["a", "b"]
    assert lora_file.load(found.path).metadata["modelspec.trigger_phrase"] == "sks dog"


def test_what_cannot_be_added_is_named(tmp_path: Path):
    a = written(tmp_path / "a")
    other = [toy.component(NAMES[0], 2, (48, 32))]
    b = lora_file.save(tmp_path / "b", other, METADATA)
    with pytest.raises(LoRAFileError, match=r"b was trained for another architecture than .*a:"):
        merge_files([(a, 1.0), (b, 1.0)], tmp_path / "c", NOTHING)
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    named = {
        f"{layer}.lora_A.weight": torch.ones(1, 32),
        f"{layer}.lora_B.weight": torch.ones(40, 1),
    }
    safetensors.torch.save_file(named, tmp_path / "d")
    with pytest.raises(LoRAFileError, match="names its layers as diffusers does"):
        merge_files([(a, 1.0), (tmp_path / "d", 1.0)], tmp_path / "c", NOTHING)
    assert not (tmp_path / "c").exists()


def test_diffusers_names_of_sdxl_are_the_same_layers(tmp_path: Path):
    deep = "transformer_blocks.9.attn1.to_q"
    ours = [toy.component(f"input_blocks.7.1.{deep}", 2, (40, 32))]
    a = lora_file.save(tmp_path / "a", ours, METADATA)
    name = f"unet.down_blocks.2.attentions.0.{deep}"
    state = {
        f"{name}.lora_A.weight": torch.randn(3, 32),
        f"{name}.lora_B.weight": torch.randn(40, 3),
    }
    safetensors.torch.save_file(state, tmp_path / "b")
    found = merge_files([(a, 1.0), (tmp_path / "b", 1.0)], tmp_path / "c", NOTHING)
    [info] = lora_file.inspect(found.path)[0]
    assert (info.key, info.rank) == (kohya_key(ours[0].name), 5)


# --- in memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [written, foreign])
@pytest.mark.parametrize("order", ORDERS)
def test_a_state_is_cut_as_a_file_is(tmp_path: Path, kind, order: str):
    source = kind(tmp_path / "a.safetensors", 3)
    state = dict(lora_file.load(source).state) | {"else": torch.ones(3)}
    for limits in (Limits(max_rank=2, order=order), Limits(energy=0.9, order=order)):
        small = shrunk(state, limits)
        assert small.keys() <= state.keys() and small["else"] is state["else"]
        safetensors.torch.save_file(
            {k: v for k, v in small.items() if k != "else"}, tmp_path / "small.safetensors"
        )
        wanted = resize_file(source, tmp_path / "b.safetensors", limits)
        assert relative(deltas(tmp_path / "small.safetensors"), deltas(wanted.path)) < 2e-3
    assert shrunk(state, NOTHING) == state
    size = sum(t.nbytes for t in state.values()) / 2e6
    small = shrunk(state, Limits(megabytes=size, order=order))
    assert sum(t.nbytes for t in small.values()) <= size * 1e6 + 16
