"""Files: exact numbers, equal bytes, whole or not at all, and no file that crashes a reader."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import adaptive_rank, lora_file
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.lora2_core.lora_file import LoRAFileError
from lora2_pack.tests.core import toy
from torch import Tensor

torch.set_num_threads(1)

NAMES = ("blocks.0.attn1.to_q", "blocks.0.attn2.to_k", "blocks.0.conv")
KEYS = tuple("lora_unet_" + name.replace(".", "_") for name in NAMES)
DOWN, UP = KEYS[0] + ".lora_down.weight", KEYS[0] + ".lora_up.weight"


def three() -> list[Component]:
    return [
        toy.component(NAMES[0], 5, (24, 16), seed=1),
        toy.component(NAMES[1], 1, (24, 12), seed=2),
        toy.component(NAMES[2], 3, (8, 6, 3, 3), seed=3),
    ]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# --- the numbers ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    rank=st.integers(1, 40),
    up_scale=st.sampled_from((1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e3)),
    down_scale=st.sampled_from((1e-6, 1.0, 1e6)),
    nu=st.floats(1e-6, 3.0),
    mode=st.sampled_from(adaptive_rank.MODES),
    seed=st.integers(0, 99),
)
def test_stored_delta_is_within_a_thousandth(rank, up_scale, down_scale, nu, mode, seed) -> None:
    rank = min(rank, max(1, int(14 / nu)))  # Λ down to 1e-6, or all of it near ν in paper mode
    importance = adaptive_rank.importance(torch.tensor(nu), rank, mode)
    component = toy.component(NAMES[0], rank, (48, 40), seed, up_scale, importance)
    component.lora_down.mul_(down_scale)
    state = lora_file.to_state([component])
    assert relative(toy.stored_delta(state, KEYS[0]), toy.exact_delta(component)) < 1e-3
    assert state[DOWN].shape[0] == rank and float(state[KEYS[0] + ".alpha"]) == 1


@pytest.mark.parametrize("up_scale", [1e-3, 1.0, 100.0])
def test_ordinary_weights_are_stored_in_half(up_scale: float) -> None:
    state = lora_file.to_state([toy.component(up_scale=up_scale)])
    assert {state[DOWN].dtype, state[UP].dtype} == {torch.float16}


@pytest.mark.parametrize("component", three(), ids=lambda c: c.name)
def test_folded_columns_have_equal_norms_and_keep_their_order(component: Component) -> None:
    down, up = lora_file.fold(component)
    assert (down.shape, up.shape) == (component.lora_down.shape, component.lora_up.shape)
    torch.testing.assert_close(down.flatten(1).norm(dim=1), up.flatten(1).norm(dim=0))
    for rank in range(component.importance.numel()):
        part = up.flatten(1)[:, rank : rank + 1] @ down.flatten(1)[rank : rank + 1]
        whole = component.lora_up.flatten(1)[:, [rank]] @ component.lora_down.flatten(1)[[rank]]
        stored = part / component.rank  # as loaders scale it, alpha being 1
        torch.testing.assert_close(stored, whole * component.importance[rank])


def test_a_new_column_of_zeros_stays_finite() -> None:
    component = toy.component(rank=4)
    component.lora_up[:, 2:] = 0
    state = lora_file.to_state([component])
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert state[DOWN].shape[0] == 4
    assert relative(toy.stored_delta(state, KEYS[0]), toy.exact_delta(component)) < 1e-3


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    components = three()
    components[1].lora_up[3] = torch.nan
    with pytest.raises(LoRAFileError, match=f"{NAMES[1]}.*not finite"):
        lora_file.save(tmp_path / "x.safetensors", components, {})
    assert list(tmp_path.iterdir()) == []


# --- cutting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 9])
def test_truncation_keeps_a_prefix_and_the_loaders_scale(rank: int) -> None:
    state = lora_file.to_state(three())
    state[KEYS[0] + ".alpha"] = torch.tensor(2.0)  # a foreign file may scale
    before = {key: value.clone() for key, value in state.items()}
    cut = lora_file.truncate(state, rank)
    assert list(cut) == list(state)
    for key in KEYS:
        down, up, alpha = (f"{key}{s}" for s in (".lora_down.weight", ".lora_up.weight", ".alpha"))
        kept = min(rank, before[down].shape[0])
        assert torch.equal(cut[down], before[down][:kept])
        assert torch.equal(cut[up], before[up][:, :kept])
        scale = float(before[alpha]) / before[down].shape[0]
        assert float(cut[alpha]) / kept == pytest.approx(scale, rel=1e-6)
    assert all(torch.equal(state[key], value) for key, value in before.items())


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 11), seed=st.integers(0, 99))
def test_the_best_cut_is_no_worse_than_the_prefix(rank: int, seed: int) -> None:
    component = toy.component(rank=12, seed=seed)
    state = lora_file.to_state([component])
    whole = toy.stored_delta(state, KEYS[0])
    error = (toy.stored_delta(lora_file.truncate(state, rank), KEYS[0]) - whole).norm()
    best = torch.linalg.svdvals(whole)[rank:].norm()  # Eckart and Young
    assert 0 < best <= error * (1 + 1e-9)
    less = (toy.stored_delta(lora_file.truncate(state, rank + 1), KEYS[0]) - whole).norm()
    assert less < error or rank == 11


def test_truncation_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_rank is 0"):
        lora_file.truncate({}, 0)


def test_truncation_cuts_all_three_factors() -> None:
    state = {
        "k.lora_down.weight": torch.ones(4, 6, 1, 1),
        "k.lora_mid.weight": torch.ones(4, 4, 3, 3),
        "k.lora_up.weight": torch.ones(8, 4, 1, 1),
    }
    assert lora_file.truncate(state, 2)["k.lora_mid.weight"].shape[:2] == (2, 2)


# --- bytes ------------------------------------------------------------------------------------


def saved(path: Path, components: list[Component] | None = None, **metadata: str) -> Path:
    return lora_file.save(path / "x.safetensors", components or three(), metadata)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    metadata = {f"ss_{number}": 'ν ² "quoted"\n' + "x" * number for number in range(40)}
    files = [
        lora_file.save(tmp_path / f"{n}" / f"{n}.safetensors", three(), metadata).read_bytes()
        for n in range(4)
    ]
    assert len(set(files)) == 1
    reordered = dict(reversed(metadata.items()))
    assert saved(tmp_path, **reordered).read_bytes() == files[0]
    assert saved(tmp_path, **{**metadata, "ss_0": "other"}).read_bytes() != files[0]


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    path = saved(tmp_path, author="Zoë")
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["author"] == "Zoë"
        assert set(file.keys()) == set(lora_file.to_state(three()))
        assert torch.equal(file.get_tensor(DOWN), lora_file.to_state(three())[DOWN])
    assert (
        8 + int.from_bytes(path.read_bytes()[:8], "little")
    ) % 8 == 0  # tensors may be mapped into memory


def test_loading_restores_ranks_and_numbers_exactly(tmp_path: Path) -> None:
    path = saved(tmp_path, note="n")
    file = lora_file.load(path)
    expected = lora_file.to_state(three())
    assert file.state.keys() == expected.keys()
    assert all(torch.equal(file.state[key], value) for key, value in expected.items())
    assert file.metadata["note"] == "n"
    infos, metadata = lora_file.inspect(path)
    assert metadata == file.metadata
    assert [(i.key, i.rank, i.in_features, i.out_features) for i in infos] == [
        (KEYS[0], 5, 16, 24),
        (KEYS[1], 1, 12, 24),
        (KEYS[2], 3, 54, 8),
    ]
    assert [i.nu for i in infos] == [0.2] * 3
    assert [i.nbytes for i in infos] == [2 * 5 * 40, 2 * 36, 2 * 3 * 62]
    assert [toy.infos_in_memory([c])[0] for c in three()] == infos


@settings(deadline=None, max_examples=25)
@given(ranks=st.lists(st.integers(1, 16), min_size=1, max_size=12))
def test_any_ranks_survive_the_file(ranks: list[int]) -> None:
    components = [toy.component(f"b.{i}.to_q", rank, seed=i) for i, rank in enumerate(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        infos, _ = lora_file.inspect(saved(Path(folder), components))
    found = {info.key: info.rank for info in infos}
    assert found == {f"lora_unet_b_{i}_to_q": rank for i, rank in enumerate(ranks)}


@pytest.mark.parametrize("megabytes", [None, 0.008])
def test_what_was_written_is_known_without_reading_it(tmp_path: Path, megabytes) -> None:
    path = tmp_path / "x.safetensors"
    written = lora_file.write(path, three(), {"ss_steps": "3"}, megabytes)
    read = lora_file.load(path)
    assert written.file.metadata == read.metadata and written.nbytes == path.stat().st_size
    assert list(written.components) == lora_file.inspect(path)[0]
    assert written.file.state.keys() == read.state.keys()
    for key, tensor in written.file.state.items():
        assert tensor.dtype == read.state[key].dtype and torch.equal(tensor, read.state[key])


def test_components_come_back_in_the_order_of_the_model(tmp_path: Path) -> None:
    components = [toy.component(f"b.{i}.to_q", i + 1) for i in range(12)]
    infos, _ = lora_file.inspect(saved(tmp_path, components))
    assert infos == toy.infos_in_memory(components)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Above 1 MiB and 64 KiB, so that the old hash has something to hash."""
    component = toy.component(NAMES[0], 120, (512, 5000), importance=torch.ones(120))
    metadata = {"ss_steps": "500", "modelspec.title": "t"}
    return saved(tmp_path_factory.mktemp("large"), [component], **metadata)


def test_the_model_hash_is_that_of_the_tensors(large: Path) -> None:
    raw = large.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    metadata = lora_file.load(large).metadata
    digest = hashlib.sha256(raw[8 + length :]).hexdigest()
    assert metadata["sshs_model_hash"] == digest
    assert metadata["modelspec.hash_sha256"] == "0x" + digest


def test_the_legacy_hash_is_the_one_that_kohya_writes(large: Path) -> None:
    file = lora_file.load(large)
    training = {key: value for key, value in file.metadata.items() if key.startswith("ss_")}
    raw = safetensors.torch.save(file.state, training)
    assert len(raw) > 0x110000
    expected = hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    assert file.metadata["sshs_legacy_hash"] == expected


# --- whole or not at all ----------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    with (
        toy.file_size_limit(1000),
        pytest.raises(LoRAFileError, match=f"{path}.*needs.*MB") as caught,
    ):
        saved(tmp_path, [toy.component(seed=9)])
    assert isinstance(caught.value.__cause__, OSError)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(LoRAFileError, match="No space left on device"):
        saved(tmp_path, [toy.component(seed=9)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors" / "inside").mkdir(parents=True)
    with pytest.raises(LoRAFileError, match="could not be written"):
        saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_that_cannot_be_written_is_named_before_training() -> None:
    with toy.unprivileged_folder(0o555) as folder:
        for path in (folder / "y.safetensors", folder / "sub" / "y.safetensors"):
            with pytest.raises(LoRAFileError, match=f"{path.parent} cannot be written"):
                lora_file.check_writable(path, 10)


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "loras").write_text("")
    with pytest.raises(LoRAFileError, match=f"{tmp_path / 'loras'} cannot be written"):
        lora_file.check_writable(tmp_path / "loras" / "x.safetensors", 10)


def test_a_full_disk_is_named_before_training(tmp_path: Path, monkeypatch) -> None:
    lora_file.check_writable(tmp_path / "new" / "x.safetensors", 1000)
    assert list((tmp_path / "new").iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
    with pytest.raises(LoRAFileError, match=r"full: the LoRA needs 3.0 MB and 2.0 MB are free"):
        lora_file.check_writable(tmp_path / "x.safetensors", 3_000_000)


def test_nothing_learnt_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(LoRAFileError, match=r"x\.safetensors.*no component has learnt"):
        saved(tmp_path, [toy.component(up_scale=0.0)])
    assert list(tmp_path.iterdir()) == []


# --- reading what others made -----------------------------------------------------------------


def test_the_header_alone_is_read(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.safetensors"
    pair = {**toy.PAIR, "other": toy.entry([1 << 32], 28)}
    path.write_bytes(toy.raw_file(pair))
    os.truncate(path, path.stat().st_size + 28 + (1 << 33))  # 8 GB of hole

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tensors were read")

    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    infos, metadata = lora_file.inspect(path)
    assert infos == [lora_file.ComponentInfo("k", 2, 3, 4, None, 28)]
    assert metadata == {}


def test_components_left_out_are_listed_in_their_place(tmp_path: Path) -> None:
    components = three()
    components[1].lora_up.zero_()
    path = saved(tmp_path, components)
    assert not any(key.startswith(KEYS[1]) for key in lora_file.load(path).state)
    infos, _ = lora_file.inspect(path)
    assert {info.key: (info.rank, info.nbytes) for info in infos}[KEYS[1]] == (0, 0)
    assert [(i.in_features, i.out_features) for i in infos] == [(16, 24), (12, 24), (54, 8)]
    assert infos == toy.infos_in_memory(components)


@pytest.mark.parametrize("read", [lora_file.inspect, lora_file.load])
@pytest.mark.parametrize("case", toy.UNREADABLE)
def test_an_unreadable_file_is_named(read, case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    data, text = toy.UNREADABLE[case]
    path.write_bytes(data)
    with pytest.raises(LoRAFileError, match=f"{path}.*{text}"):
        read(path)
    for missing in (tmp_path / "y.safetensors", tmp_path):
        with pytest.raises(LoRAFileError, match=f"{missing} does not exist"):
            read(missing)


def test_a_file_that_may_not_be_read_is_named() -> None:
    with toy.unprivileged_folder(0o755) as folder, pytest.raises(LoRAFileError):
        lora_file.inspect(folder / "x.safetensors")


@pytest.mark.parametrize("case", toy.DAMAGED)
def test_a_damaged_header_is_named(case: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(toy.DAMAGED[case])
    with pytest.raises(LoRAFileError, match=r"x\.safetensors"):
        lora_file.inspect(tmp_path / "x.safetensors")


@pytest.mark.parametrize("case", toy.FOREIGN)
def test_what_others_wrote_into_our_metadata_hides_no_rank(case: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(toy.FOREIGN[case])
    infos, _ = lora_file.inspect(tmp_path / "x.safetensors")
    assert [(info.key, info.rank) for info in infos if info.rank] == [("k", 2)]


def test_what_holds_no_lora_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"model.weight": torch.ones(2, 3)}, path)
    with pytest.raises(LoRAFileError, match=f"{path} holds no LoRA"):
        lora_file.inspect(path)
