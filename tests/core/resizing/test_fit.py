"""A size in bytes is met to the byte, and what is cut for it is what matters least."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.adapters.budget import METADATA_BYTES
from lora2_pack.lora2_core.files import encode as lora_format
from lora2_pack.lora2_core.files.component import Component, decompose
from lora2_pack.lora2_core.files.metadata import complete_metadata
from lora2_pack.lora2_core.lora_file import LoRAFileError
from lora2_pack.lora2_core.resizing import choice
from lora2_pack.lora2_core.resizing.choice import Outline, Part, _hull, choose_ranks, kept_energy
from lora2_pack.lora2_core.resizing.fit import fit_to_megabytes
from lora2_pack.tests.core import toy
from torch import Tensor

torch.set_num_threads(1)

SHAPES = ((320, 320), (320, 768), (640, 320), (160, 160), (96, 32, 3, 3), (128, 256))
METADATA = {"ss_tag_frequency": "a, b " * 300, "lora2.mean_rank": "17.250", "note": 'ν ² "q"\n'}


@functools.cache
def trained(seed: int, count: int = 20) -> tuple[Component, ...]:
    """Components as a run leaves them: of many shapes, ranks and sizes, not orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        shape = SHAPES[int(torch.randint(len(SHAPES), (1,), generator=generator))]
        rank = int(torch.randint(1, 25, (1,), generator=generator))
        scale = float(10 ** -(3 * torch.rand(1, generator=generator)))
        falling = torch.exp(-0.1 * torch.arange(rank))
        name = f"input_blocks.{index}.1.transformer_blocks.0.attn1.to_q"
        found.append(toy.component(name, rank, shape, 100 * seed + index, scale, falling))
    return tuple(found)


def uncut_bytes(components: tuple[Component, ...], metadata: dict[str, str]) -> int:
    state = lora_file.to_state(components)
    full = complete_metadata(metadata, components, [c.rank for c in components])
    return len(lora_file.encode(state, full))


def ranks_in(state: dict[str, Tensor], components: tuple[Component, ...]) -> list[int]:
    downs = [lora_file.kohya_key(c.name) + ".lora_down.weight" for c in components]
    return [state[down].shape[0] if down in state else 0 for down in downs]


def error(state: dict[str, Tensor], components: tuple[Component, ...]) -> float:
    """‖ΔW of the file − ΔW‖² over all components."""
    total = 0.0
    for component in components:
        exact, key = toy.exact_delta(component), lora_file.kohya_key(component.name)
        stored = toy.stored_delta(state, key) if key + ".alpha" in state else 0 * exact
        total += float((stored - exact).square().sum())
    return total


# --- taking apart -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    rank=st.integers(1, 30),
    shape=st.sampled_from(((40, 36), (36, 200), (48, 6, 3, 3), (30, 30))),
    scale=st.sampled_from((1e-6, 1.0, 1e3)),
    seed=st.integers(0, 99),
)
def test_taking_apart_keeps_every_delta(rank, shape, scale, seed) -> None:
    component = toy.component(rank=rank, shape=shape, seed=seed, up_scale=scale)
    svd = decompose(component)
    exact = toy.exact_delta(component)
    assert float((toy.exact_delta(svd) - exact).norm() / exact.norm()) < 1e-5
    assert (svd.importance.diff() <= 0).all()
    assert svd.rank <= min(shape[0], math.prod(shape[1:]))
    assert svd.lora_down.shape[1:] == component.lora_down.shape[1:]
    assert svd.lora_up.shape[2:] == component.lora_up.shape[2:]
    values = torch.linalg.svdvals(exact)[: svd.rank]
    torch.testing.assert_close(svd.importance.double(), values, rtol=1e-5, atol=1e-6 * values[0])
    eye = torch.eye(svd.rank)
    down, up = svd.lora_down.flatten(1), svd.lora_up.flatten(1)
    torch.testing.assert_close(down @ down.t(), eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(up.t() @ up, eye, rtol=0, atol=1e-5)


def test_columns_that_add_nothing_are_gone() -> None:
    component = toy.component(rank=6)
    component.lora_up[:, 3:] = 0  # just grown
    component.lora_down[1] = 2 * component.lora_down[0]
    svd = decompose(component)
    assert svd.rank == 2
    exact = toy.exact_delta(component)
    assert float((toy.exact_delta(svd) - exact).norm() / exact.norm()) < 1e-5
    component.lora_up.zero_()
    assert decompose(component).rank == 0


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 24), seed=st.integers(0, 30))
def test_at_equal_ranks_the_svd_loses_no_more_than_the_prefix(rank: int, seed: int) -> None:
    for component in trained(seed, count=3):
        kept = min(rank, component.rank)
        exact = toy.exact_delta(component)
        best = decompose(component).first(kept)
        prefix = component.first(kept)
        lost = (toy.exact_delta(best) - exact).norm()
        assert lost <= (toy.exact_delta(prefix) - exact).norm() + 1e-5 * exact.norm()


# --- the size ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 30), share=st.floats(0.12, 0.999))
def test_a_size_is_met_from_below(seed: int, share: float) -> None:
    components = trained(seed)
    limit = int(share * uncut_bytes(components, METADATA))
    state, full = fit_to_megabytes(components, METADATA, limit)
    data = lora_file.encode(state, full)
    assert 0.97 * limit <= len(data) <= limit
    ranks = ranks_in(state, components)
    for component, rank in zip(components, ranks, strict=True):
        assert rank <= min(component.in_features, component.out_features, component.rank)
    listed = json.loads(full["lora2.components"])
    assert [entry["rank"] for entry in listed.values()] == ranks
    assert float(full["lora2.mean_rank"]) == pytest.approx(sum(ranks) / len(ranks), abs=1e-3)
    assert full["note"] == METADATA["note"]
    svd = json.loads(full["lora2.svd"])
    assert svd["target_megabytes"] == limit / 1e6
    energy = sum(float(toy.exact_delta(c).square().sum()) for c in components)
    lost = error(state, components) / energy
    assert float(svd["kept_energy"]) == pytest.approx(1 - lost, abs=2e-6)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_one_svd_across_all_beats_the_same_cut_for_each(share: float) -> None:
    components = trained(1)
    state, full = fit_to_megabytes(
        components, METADATA, int(share * uncut_bytes(components, METADATA))
    )
    size = len(lora_file.encode(state, full))
    whole = lora_file.to_state(components)
    for rank in itertools.count(1):
        cut = lora_file.truncate(whole, rank)
        if len(lora_file.encode(cut, full)) > size:
            break
        assert error(state, components) < error(cut, components)
    assert rank > 1


def test_a_cut_file_can_be_cut_further() -> None:
    components = trained(2)
    state, _ = fit_to_megabytes(components, METADATA, uncut_bytes(components, METADATA) // 2)
    cut = lora_file.truncate(state, 2)
    for component in components:
        key = lora_file.kohya_key(component.name)
        if key + ".alpha" not in cut:
            continue
        exact = toy.exact_delta(component)
        best = torch.linalg.svdvals(exact)[cut[key + ".lora_down.weight"].shape[0] :].norm()
        lost = (toy.stored_delta(cut, key) - exact).norm()
        assert float(lost) <= float(best) + 1e-3 * float(exact.norm())


def test_equal_components_give_equal_bytes(tmp_path: Path) -> None:
    files = [
        lora_file.save(tmp_path / f"{n}" / "x.safetensors", trained(3), METADATA, megabytes=0.08)
        for n in range(2)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert 77_600 <= files[0].stat().st_size <= 80_000
    trained.cache_clear()
    third = lora_file.save(tmp_path / "y.safetensors", trained(3), METADATA, megabytes=0.08)
    assert third.read_bytes() == files[0].read_bytes()
    infos, metadata = lora_file.inspect(third)
    assert [info.rank for info in infos] == ranks_in(lora_file.load(third).state, trained(3))
    assert [info.nu for info in infos] == [0.2] * len(infos)
    assert "lora2.svd" in metadata


def test_what_fits_is_not_touched(caplog: pytest.LogCaptureFixture) -> None:
    components = trained(4)
    limit = uncut_bytes(components, METADATA)
    caplog.set_level(logging.INFO)
    state, full = fit_to_megabytes(components, METADATA, limit)
    plain = lora_file.to_state(components)
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[key], plain[key]) for key in plain)
    assert "lora2.svd" not in full and full["lora2.mean_rank"] == "17.250"
    assert "nothing has to be cut" in caplog.text
    _, full = fit_to_megabytes(components, METADATA, limit // 2)
    kept = 100 * float(json.loads(full["lora2.svd"])["kept_energy"])
    assert f"kept {kept:.2f} % of its energy" in caplog.text


def test_what_fp16_cannot_hold_is_counted_in_fp32() -> None:
    components = tuple(
        toy.component(f"b.{n}.to_q", 12, (128, 128), n, up_scale=1e-10 if n % 2 else 1.0)
        for n in range(12)
    )
    for share in (0.3, 0.6, 0.9):
        limit = int(share * uncut_bytes(components, METADATA))
        state, full = fit_to_megabytes(components, METADATA, limit, min_rank=2)
        types = {tensor.dtype for key, tensor in state.items() if "alpha" not in key}
        assert types == {torch.float16, torch.float32}
        assert 0.97 * limit <= len(lora_file.encode(state, full)) <= limit


def test_a_limit_that_the_sums_misjudged_is_kept_all_the_same(monkeypatch) -> None:
    """Whether fp16 will do is judged before the cut; here the judge is always wrong."""
    components = tuple(
        toy.component(f"b.{n}.to_q", 12, (128, 128), n, up_scale=1e-10) for n in range(6)
    )
    judge, calls = lora_format.fits_half, []

    def judged(errors: Tensor) -> Tensor:
        calls.append(errors)
        return torch.ones_like(errors, dtype=torch.bool) if errors.dim() else judge(errors)

    for module in (lora_format, choice):  # all that ask
        monkeypatch.setattr(module, "fits_half", judged)
    limit = uncut_bytes(components, {}) // 2
    state, full = fit_to_megabytes(components, {}, limit)
    assert any(errors.dim() for errors in calls)
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert len(lora_file.encode(state, full)) <= limit


# --- which ranks ------------------------------------------------------------------------------


def part(energies: list[float], size: tuple[int, int] = (10, 10), header: int = 300, **half):
    svd = Component("x", torch.zeros(len(energies), size[1]), torch.zeros(size[0], len(energies)),
                    torch.tensor(energies).sqrt(), 0.1)  # fmt: skip
    fits = half.get("half") or [True] * len(energies)
    return Part(Outline.of(svd), tuple(energies), tuple(fits), header)


falling = st.lists(st.floats(0, 100), min_size=1, max_size=3).map(
    lambda values: sorted(values, reverse=True)
)


@settings(deadline=None, max_examples=150)
@given(
    spectra=st.lists(falling, min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 60), min_size=4, max_size=4),
    halves=st.lists(st.booleans(), min_size=12, max_size=12),
    share=st.floats(0, 1.1),
)
def test_chosen_ranks_are_nearly_the_best_that_fit(spectra, sizes, halves, share) -> None:
    parts = [
        part(spectrum, (size, size), 30, half=halves[3 * i : 3 * i + len(spectrum)])
        for i, (spectrum, size) in enumerate(zip(spectra, sizes, strict=False))
    ]
    available = int(share * sum(max(p.costs) for p in parts))

    def taken(ranks) -> int:
        return sum(p.costs[rank] for p, rank in zip(parts, ranks, strict=True))

    chosen = choose_ranks(parts, available)
    assert taken(chosen) <= available
    fitting = [
        ranks
        for ranks in itertools.product(*(range(p.rank + 1) for p in parts))
        if taken(ranks) <= available
    ]
    best = max(kept_energy(parts, ranks) for ranks in fitting)
    total = sum(sum(p.energies) for p in parts)
    # As for any knapsack, greedy by ratio misses at most one step of the hull.
    step = max(gain for p in parts for _, gain, _ in _hull(p, 0)) / max(total, 1e-9)
    assert kept_energy(parts, chosen) >= best - step - 1e-9
    for index, p in enumerate(parts):  # nothing more fits
        if chosen[index] < p.rank:
            assert taken([*chosen[:index], chosen[index] + 1, *chosen[index + 1 :]]) > available


def test_energy_is_weighed_by_its_bytes() -> None:
    small, large = part([4.0, 3.0, 2.0], (10, 10)), part([6.0, 5.0, 4.0], (40, 40))
    available = small.costs[3] + large.costs[1]
    assert choose_ranks([small, large], available) == [3, 1]


def test_a_header_that_is_not_worth_its_bytes_leaves_the_file() -> None:
    faint, strong = part([0.1]), part([10.0, 5.0, 1.0])
    available = strong.costs[3] + faint.costs[1] - 1
    assert choose_ranks([faint, strong], available) == [0, 3]
    # A first rank pays for the header of those behind it.
    flat = part([1.0] * 30, header=1000)
    rival = part([1.9, 0.1], header=1000)
    assert choose_ranks([rival, flat], flat.costs[30]) == [0, 30]


def test_a_smallest_rank_is_left_to_all_where_it_fits() -> None:
    parts = [part([0.1, 0.01, 0.001]), part([10.0] * 9), part([0.2])]
    available = sum(p.costs[-1] for p in parts) - 8 * 40
    assert choose_ranks(parts, available, min_rank=2)[0] >= 2
    assert choose_ranks(parts, available, min_rank=2)[2] == 1  # it has no more
    tight = sum(p.costs[min(2, p.rank)] for p in parts)
    assert choose_ranks(parts, tight, min_rank=2) == [2, 2, 1]
    assert choose_ranks(parts, tight, min_rank=50) == [2, 2, 1]
    assert choose_ranks(parts, tight - 1, min_rank=2)[1] > 2  # for none then


def test_what_learnt_nothing_takes_no_room() -> None:
    components = [*trained(5)]
    components[3] = toy.component(components[3].name, 4, up_scale=0.0)
    limit = uncut_bytes(tuple(components), METADATA) // 2
    state, full = fit_to_megabytes(components, METADATA, limit, min_rank=2)
    ranks = ranks_in(state, tuple(components))
    assert ranks[3] == 0
    assert min(ranks[:3] + ranks[4:]) >= 1
    assert len(json.loads(full["lora2.components"])) == len(components)


# --- what cannot be ---------------------------------------------------------------------------


def test_no_room_at_all_is_named_with_what_would_do(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(LoRAFileError, match=r"0\.003 MB has no room.*at least 0\.\d+") as caught:
        lora_file.save(path, trained(6), METADATA, megabytes=0.003)
    assert not path.exists()
    enough = float(str(caught.value).rpartition(" ")[2].rstrip("."))
    lora_file.save(path, trained(6), METADATA, megabytes=enough)
    assert path.stat().st_size <= enough * 1e6


def test_nothing_learnt_is_said_and_not_a_lack_of_room(tmp_path: Path) -> None:
    with pytest.raises(LoRAFileError, match="no component has learnt"):
        lora_file.save(tmp_path / "x", [toy.component(up_scale=0.0)], {}, megabytes=0.001)


def test_what_is_not_finite_is_refused() -> None:
    components = [*trained(7)]
    components[0] = toy.component(rank=3)
    components[0].lora_down[1, 1] = torch.inf
    with pytest.raises(LoRAFileError, match="not finite"):
        fit_to_megabytes(components, {}, 10_000)


# --- whole runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["balanced", "paper", "fixed"])
def test_a_run_ends_at_its_size(mode: str, tmp_path: Path) -> None:
    model = toy.Transformer(blocks=2, width=32, context_width=24)
    megabytes = 0.03
    net = toy.adapt(model, mode=mode, target_megabytes=megabytes)
    assert net.expected_bytes() == 30_000
    toy.run(net, toy.TransformerTask(model), steps=12, batch_size=4)
    # No wider than what the estimate takes for it, as a run's own metadata are.
    metadata = {"ss_tag_frequency": "x" * (METADATA_BYTES - 500)}
    path = tmp_path / "x.safetensors"
    lora_file.save(path, net.components(), metadata, megabytes)
    assert 0.97 * megabytes * 1e6 <= path.stat().st_size <= megabytes * 1e6
    assert "lora2.svd" in lora_file.load(path).metadata
