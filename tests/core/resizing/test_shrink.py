"""Limits of size that hold for the whole, whatever lies beside the factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.checks import ConfigError
from lora2_pack.lora2_core.config.load import ORDERS, Limits
from lora2_pack.lora2_core.files.write import write_beside_others
from lora2_pack.lora2_core.lora_file import LoRAFile, LoRAFileError
from lora2_pack.lora2_core.resizing.measure import measure_file
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.lora2_core.resizing.shrink import left_whole, shrink
from lora2_pack.lora2_core.resizing.source import LoRASource
from lora2_pack.tests.core import toy
from torch import Tensor

torch.set_num_threads(1)

PREFIX = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_"


def pair(layer: str, rank: int, width: int = 64, out: int = 80, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{layer}.lora_down.weight": torch.randn(rank, width, generator=generator),
        f"{PREFIX}{layer}.lora_up.weight": torch.randn(out, rank, generator=generator),
        f"{PREFIX}{layer}.alpha": torch.tensor(float(rank)),
    }


def dora() -> dict[str, Tensor]:
    """Three layers whose magnitudes take about as much as a column."""
    state: dict[str, Tensor] = {}
    for seed, layer in enumerate("qkv"):
        state |= pair(layer, 8, 64, 800, seed)
        state[f"{PREFIX}{layer}.dora_scale"] = torch.rand(800, 1)
    return state


def save(path: Path, state: dict[str, Tensor]) -> Path:
    safetensors.torch.save_file(state, path)
    return path


def shrunk(state: dict[str, Tensor], limits: Limits) -> dict[str, Tensor]:
    return shrink(LoRAFile(state, {}), limits).state


def patch(path: Path, key: str) -> Tensor:
    with LoRASource(path) as source:
        return toy.exact_delta(source.component(key))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("megabytes", [0.015, 0.02, 0.03])
def test_magnitudes_of_a_dora_count(tmp_path: Path, order: str, megabytes: float):
    source = save(tmp_path / "a.safetensors", dora())
    limits = Limits(megabytes=megabytes, order=order)
    found = resize_file(source, tmp_path / "b.safetensors", limits)
    assert found.after == found.path.stat().st_size <= megabytes * 1e6
    state = lora_file.load(found.path).state
    for layer in "qkv":
        key = f"{PREFIX}{layer}"
        assert (f"{key}.dora_scale" in state) == (f"{key}.lora_up.weight" in state)
    small = shrunk(dora(), limits)
    assert len(safetensors.torch.save(small)) <= megabytes * 1e6


def test_what_a_dora_could_be_cut_to_counts_its_magnitudes(tmp_path: Path):
    source = save(tmp_path / "a.safetensors", dora())
    told = measure_file(source).cut_bytes
    found = resize_file(source, tmp_path / "b.safetensors", Limits(energy=0.99, order="svd"))
    assert told == pytest.approx(found.after, rel=0.05)  # its metadata has a line on the cut


def test_tensors_of_other_kinds_count():
    other = {"lora_unet_x.hada_w1_a": torch.ones(100, 50)}  # 20 kB
    state = pair("q", 8) | other
    small = shrunk(state, Limits(megabytes=0.0215))
    assert len(safetensors.torch.save(small)) <= 21_500
    assert small["lora_unet_x.hada_w1_a"] is other["lora_unet_x.hada_w1_a"]
    assert small[f"{PREFIX}q.lora_down.weight"].shape[0] < 8
    with pytest.raises(LoRAFileError, match=r"megabytes is 0\.01, .* choose at least 0\.0") as told:
        shrunk(state, Limits(megabytes=0.01))
    least = float(str(told.value).rpartition(" ")[2].rstrip("."))
    assert shrunk(state, Limits(megabytes=least))[f"{PREFIX}q.lora_down.weight"].shape[0] == 1
    assert shrunk(other, Limits(megabytes=0.01)) == other  # it has no ranks


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(), ""),
        (Limits(energy=1), ""),
        (Limits(max_rank=2), "1 difference and 2 LoHa are loaded whole: max_rank cuts pairs of"),
        (Limits(energy=0.9, megabytes=1), "loaded whole: keep_energy and megabytes cut pairs of"),
    ],
)
def test_what_a_limit_does_not_reach_is_counted(limits: Limits, said: str):
    state = pair("q", 8) | {"lora_unet_n.diff_b": torch.ones(8)}
    for name in "xy":
        state |= {f"{name}.hada_w{n}_{s}": torch.ones(2, 2) for n in (1, 2) for s in "ab"}
    told = left_whole(LoRAFile(state, {}), limits)
    assert (said in told) if said else not told
    assert not left_whole(LoRAFile(dora(), {}), limits), "whose factors are cut"
    small = shrunk(state, limits)
    assert all(small[key] is state[key] for key in state if not key.startswith(PREFIX))


def test_a_name_longer_than_the_old_one_counts(tmp_path: Path):
    made = [toy.component(f"blocks.{n}.attn1.to_q", 8, (64, 64), seed=n) for n in range(12)]
    titles = {"modelspec.title": "a", "ss_output_name": "a"}
    source = lora_file.save(tmp_path / "a.safetensors", made, titles)
    target = tmp_path / f"{'n' * 120}.safetensors"
    found = resize_file(source, target, Limits(megabytes=0.015))
    assert 0.98 * 15_000 <= found.after <= 15_000
    assert lora_file.load(target).metadata["modelspec.title"] == "n" * 120


def test_a_file_in_fp32_is_not_copied_over_its_limit(tmp_path: Path):
    parts = [
        (save(tmp_path / f"{seed}.safetensors", pair("q", 8, 300, 300, seed)), 1.0)
        for seed in (1, 2)
    ]
    whole = merge_files(parts, tmp_path / "sum.safetensors", Limits())
    limits = Limits(megabytes=0.7 * whole.after / 1e6)
    found = resize_file(whole.path, tmp_path / "small.safetensors", limits)
    assert found.after <= 0.7 * whole.after
    assert found.ranks_after == whole.ranks_after, "fp16 is all it took"


def test_its_own_size_is_no_limit(tmp_path: Path):
    made = [toy.component(f"blocks.{n}.attn1.to_q", 8, (64, 64), seed=n) for n in range(3)]
    source = lora_file.save(tmp_path / "a.safetensors", made, {})
    own = source.stat().st_size
    found = resize_file(source, tmp_path / "b.safetensors", Limits(megabytes=own / 1e6))
    assert found.path.read_bytes() == source.read_bytes()
    smaller = resize_file(source, found.path, Limits(megabytes=(own - 1) / 1e6))
    assert smaller.after < own


@pytest.mark.parametrize(
    "limits", [Limits(), Limits(max_rank=4096), Limits(energy=0.9, order="learnt")]
)
def test_no_rank_is_above_what_a_layer_can_hold(tmp_path: Path, limits: Limits):
    source = save(tmp_path / "a.safetensors", pair("q", 100, 32, 40))
    found = resize_file(source, tmp_path / "b.safetensors", limits)
    [info] = lora_file.inspect(found.path)[0]
    assert info.rank <= 32 and found.ranks_before == (100,)
    wanted, got = patch(source, f"{PREFIX}q"), patch(found.path, f"{PREFIX}q")
    assert float((got - wanted).norm() / wanted.norm()) == pytest.approx(found.error, abs=1e-3)


@pytest.mark.parametrize("max_rank", [None, 1, 4])
def test_columns_against_each_other_in_the_learnt_order(tmp_path: Path, max_rank: int | None):
    one = save(tmp_path / "one.safetensors", pair("q", 4))
    two = save(tmp_path / "two.safetensors", pair("q", 4) | pair("k", 3, seed=5))
    parts = [(one, 1.0), (two, -0.9)]
    whole = merge_files(parts, tmp_path / "whole.safetensors", Limits())
    limits = Limits(max_rank=max_rank, energy=None if max_rank else 0.9, order="learnt")
    found = merge_files(parts, tmp_path / "cut.safetensors", limits)
    off = total = 0.0
    for layer in "qk":
        key = f"{PREFIX}{layer}"
        wanted = patch(whole.path, key)
        held = {info.key for info in lora_file.inspect(found.path)[0] if info.rank}
        got = patch(found.path, key) if key in held else 0 * wanted
        off += float((got - wanted).square().sum())
        total += float(wanted.square().sum())
    assert (off / total) ** 0.5 == pytest.approx(found.error, abs=1e-3)
    assert max_rank or found.kept >= 0.9


def test_what_cancels_is_not_written(tmp_path: Path):
    one, two = (save(tmp_path / f"{n}.safetensors", pair("q", 4)) for n in (1, 2))
    for limits in (Limits(), Limits(energy=0.99), Limits(max_rank=2, order="learnt")):
        with pytest.raises(
            LoRAFileError, match=r"would change nothing.*weights that do not cancel"
        ):
            merge_files([(one, 0.3), (two, -0.3)], tmp_path / "sum.safetensors", limits)
    assert not (tmp_path / "sum.safetensors").exists()


def test_what_belongs_to_factors_in_an_unknown_way_is_named(tmp_path: Path):
    """The factors of the new file are others: nobody knows what it would mean beside them."""
    strange = {
        f"{PREFIX}q.lora_C.weight": torch.ones(2, 2),
        f"{PREFIX}q.lora_B.bias": torch.ones(80),
    }
    source = save(tmp_path / "a.safetensors", pair("q", 2) | strange)
    found = resize_file(source, tmp_path / "b.safetensors", Limits(max_rank=1))
    assert set(found.ignored) == set(strange)
    assert "Left out as no part of a LoRA: " in found.text() and "and 1 more." in found.text()
    again = resize_file(found.path, tmp_path / "c.safetensors", Limits(max_rank=1))
    assert not again.ignored and "Left out" not in again.text()


def test_a_full_disk_is_told_of_a_copy_too(tmp_path: Path):
    made = [toy.component("blocks.0.attn1.to_q", 8, (64, 64))]
    source = lora_file.save(tmp_path / "a.safetensors", made, {})
    with toy.file_size_limit(1000), pytest.raises(LoRAFileError, match="could not be written"):
        resize_file(source, tmp_path / "b.safetensors", Limits())
    assert not (tmp_path / "b.safetensors").exists()


def test_the_size_asked_for_has_the_name_of_its_input(tmp_path: Path):
    source = save(tmp_path / "a.safetensors", pair("q", 2))
    with pytest.raises(LoRAFileError, match=r"Choose megabytes of at least"):
        resize_file(source, tmp_path / "b.safetensors", Limits(megabytes=0.001))


@pytest.mark.parametrize("kind", ["resize", "copy", "merge"])
def test_a_name_that_is_taken_while_a_file_is_written_stays(tmp_path: Path, kind: str):
    """As by another server, in the moment before the file gets its name."""
    source = save(tmp_path / "a.safetensors", pair("q", 8) | pair("k", 8, seed=1))
    if kind == "copy":
        source = resize_file(source, tmp_path / "ours.safetensors", Limits()).path
    limits = Limits() if kind == "copy" else Limits(max_rank=6)
    target = tmp_path / "new_00001_.safetensors"

    def write(path: Path, new: bool) -> Path:
        if path == target:
            path.write_bytes(b"another's")
        if kind == "merge":
            return merge_files([(source, 1.0), (source, 0.5)], path, Limits(), new).path
        return resize_file(source, path, limits, new).path

    path = write_beside_others(target, write, lambda _: False)
    assert path.name == "new_00002_.safetensors" and lora_file.load(path).state
    assert target.read_bytes() == b"another's"
    assert not list(tmp_path.glob(".*")), "no temporary is left"


def _ranks(state: dict[str, Tensor]) -> dict[str, int]:
    end = ".lora_down.weight"
    return {key.removesuffix(end): t.shape[0] for key, t in state.items() if key.endswith(end)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["dora", "ours", "kohya"])
def test_memory_file_and_forecast_have_the_same_numbers(tmp_path: Path, kind: str, order: str):
    source = tmp_path / "a.safetensors"
    if kind == "ours":
        made = [toy.component(f"blocks.{n}.attn1.to_q", 8, (64, 64), seed=n) for n in range(40)]
        lora_file.save(source, made, {"lora2.mean_rank": "8.000"})
    else:
        state: dict[str, Tensor] = {}
        for n in range(40):
            state |= pair(f"q_{n}", 8, 64, 100, n)
        dora_of = {f"{PREFIX}q_{n}.dora_scale": torch.rand(100, 1) for n in range(40)}
        metadata = {"ss_network_dim": "8", "sshs_model_hash": "a" * 64}
        safetensors.torch.save_file(state | (dora_of if kind == "dora" else {}), source, metadata)
    whole = source.stat().st_size
    for limits in (
        Limits(megabytes=0.5 * whole / 1e6, order=order),
        Limits(energy=0.8, order=order),
        Limits(max_rank=3, energy=0.7, megabytes=0.9, order=order),
    ):
        found = resize_file(source, tmp_path / "b.safetensors", limits)
        assert _ranks(shrink(lora_file.load(source), limits).state) == _ranks(
            lora_file.load(found.path).state
        )
    found = resize_file(source, tmp_path / "c.safetensors", Limits(energy=0.99))
    assert measure_file(source).cut_bytes == pytest.approx(found.after, rel=0.001)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_is_a_number(tmp_path: Path, weight: float):
    source = save(tmp_path / "a.safetensors", pair("q", 4))
    with pytest.raises(ConfigError, match=r"weight of a\.safetensors is (nan|inf), which is no"):
        merge_files([(source, weight)], tmp_path / "b.safetensors", Limits())


@pytest.mark.parametrize("limits", [Limits(), Limits(max_rank=2)])
@pytest.mark.parametrize("weight", [1e32, 1e35, 1e37, 1e300])
def test_nothing_is_written_that_would_be_called_damaged(tmp_path: Path, weight: float, limits):
    target = tmp_path / "b.safetensors"
    factors = save(tmp_path / "a.safetensors", pair("q", 4))
    differences = save(tmp_path / "d.safetensors", {f"{PREFIX}q.diff": torch.ones(8, 8)})
    for source in (factors, differences):
        with pytest.raises(LoRAFileError, match="too large to be stored, so nothing was written"):
            merge_files([(source, weight)], target, limits)
        assert not target.exists()


def test_what_is_said_of_ranks_is_true(tmp_path: Path):
    target = tmp_path / "b.safetensors"
    wide = save(tmp_path / "a.safetensors", pair("q", 100, 64, 64))
    assert "mean rank 100.0 → 64.0" in merge_files([(wide, 1.0)], target, Limits()).text()
    assert "mean rank 100.0 → 64.0" in resize_file(wide, target, Limits()).text()
    alone = save(tmp_path / "d.safetensors", {f"{PREFIX}q.diff": torch.ones(8, 8)})
    text = merge_files([(alone, 1.0)], target, Limits()).text()
    assert "rank" not in text and "%" not in text and "differences of 1 layer" in text
    against = pair("q", 2, 64, 64)  # the second column takes nearly all of the first away
    for end, sign in ((".lora_down.weight", 1.0), (".lora_up.weight", -0.99)):
        one = against[PREFIX + "q" + end]
        if sign > 0:
            one[1] = one[0]
        else:
            one[:, 1] = sign * one[:, 0]
    bad = save(tmp_path / "w.safetensors", against)
    text = resize_file(bad, target, Limits(max_rank=1, order="learnt")).text()
    assert "further from the LoRA than no LoRA would be" in text and "%" not in text


def test_what_lies_beside_may_be_of_any_type(tmp_path: Path):
    other = {"conv_in.bias": torch.ones(3, dtype=torch.uint16)}
    source = save(tmp_path / "a.safetensors", pair("q", 4) | other)
    small = shrink(lora_file.load(source), Limits(megabytes=0.003)).state
    assert torch.equal(small["conv_in.bias"], other["conv_in.bias"])


def test_a_new_file_has_no_old_date(tmp_path: Path):
    source = tmp_path / "a.safetensors"
    safetensors.torch.save_file(pair("q", 4), source, {"modelspec.date": "2024-01-01"})
    resize_file(source, tmp_path / "b.safetensors", Limits())
    merge_files([(source, 1.0)], tmp_path / "c.safetensors", Limits())
    for name in "bc":
        written = lora_file.load(tmp_path / f"{name}.safetensors").metadata
        assert "modelspec.date" not in written
