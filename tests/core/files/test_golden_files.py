"""Files of every version of the format are read for ever, and written again byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora2_pack.lora2_core import adaptive_rank, lora_file
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.files import metadata
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.lora2_core.files.metadata import FORMAT_VERSION
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.tests.core import toy
from lora2_pack.tests.golden import make

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
VERSIONS = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def test_there_is_one_of_every_version():
    newest = int(FORMAT_VERSION)
    assert [f"v{number}" for number in range(1, newest + 1)] == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_it_means_what_it_meant(version: str):
    expected = json.loads((GOLDEN / f"{version}.json").read_text(encoding="utf-8"))
    path = GOLDEN / f"{version}.safetensors"
    infos, metadata = lora_file.inspect(path)
    assert metadata["lora2.format_version"] == version[1:]
    assert {i.key: (i.rank, i.nu) for i in infos} == {
        key: (one["rank"], one["nu"]) for key, one in expected.items()
    }
    listed = json.loads(metadata["lora2.components"])
    assert {k: one["rank"] for k, one in listed.items()} == {i.key: i.rank for i in infos}
    state = dict(lora_file.load(path).state)
    assert {t.dtype for t in state.values()} == {torch.float16, torch.float32}
    for key, one in expected.items():
        assert (f"{key}.alpha" in state) == bool(one["rank"])
        if not one["rank"]:
            continue
        wanted = torch.tensor(one["delta"], dtype=torch.float64)
        assert (toy.stored_delta(state, key) - wanted).norm() < 5e-4 * wanted.norm()


def test_saved_again_it_has_the_same_bytes(tmp_path: Path):
    path = GOLDEN / f"v{FORMAT_VERSION}.safetensors"
    file = lora_file.load(path)
    assert lora_file.encode(file.state, file.metadata) == path.read_bytes()
    again = tmp_path / "again.safetensors"
    lora_file.write_atomically(again, lora_file.encode(file.state, file.metadata))
    loaded = lora_file.load(again)
    assert lora_file.encode(loaded.state, loaded.metadata) == again.read_bytes()
    assert resize_file(path, again, Limits()).after == path.stat().st_size
    assert again.read_bytes() == path.read_bytes()


def test_written_from_components_it_is_the_same_file(tmp_path: Path):
    """Byte for byte here; the last digit of an exponential is the processor's."""
    golden, paths = GOLDEN / "v1.safetensors", [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        lora_file.save(path, make.components(adaptive_rank.importance, Component), make.METADATA)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    old, new = lora_file.load(golden), lora_file.load(paths[0])
    assert lora_file.encode(new.state, new.metadata) == paths[0].read_bytes()
    assert list(new.state) == list(old.state)
    for key, tensor in old.state.items():
        assert new.state[key].dtype == tensor.dtype
        assert torch.allclose(new.state[key].float(), tensor.float(), rtol=1e-3)
    assert _without_hashes(new.metadata) == _without_hashes(old.metadata)


def _without_hashes(metadata: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in metadata.items() if "hash" not in name}


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """The golden file as a version to come might write it."""
    file = lora_file.load(GOLDEN / "v1.safetensors")
    changed = {
        "lora2.format_version": "2",
        "lora2.components": '{"x": {"nu": 1}}',
        "lora2.mode": "another",
        "lora2.columns": "rotated",
    }
    path = tmp_path / "newer.safetensors"
    path.write_bytes(lora_file.encode(file.state, {**file.metadata, **changed}))
    return path


def test_a_newer_version_is_a_plain_lora(newer: Path):
    report = inspector.inspect(newer)
    assert "LoRA² 2, newer than this pack knows; read as a plain LoRA" in report.text()
    assert "another" not in report.text()
    assert report.alpha == ""  # that it is 1 was a rule of version 1
    assert {c.nu for c in report.components} == {None}
    assert sorted(c.rank for c in report.components) == [1, 2, 2, 2, 3, 3, 4]
    golden = lora_file.load(GOLDEN / "v1.safetensors").state
    found = lora_file.load(newer).state
    assert all(torch.equal(found[key], golden[key]) for key in golden)
    assert found.keys() == golden.keys()


def test_a_newer_version_that_is_changed_is_of_ours_then(newer: Path, tmp_path: Path):
    """Nothing of what is not understood stays in it."""
    kept = resize_file(newer, tmp_path / "kept.safetensors", Limits())
    assert kept.path.read_bytes() == newer.read_bytes()
    cut = resize_file(newer, tmp_path / "cut.safetensors", Limits(max_rank=1))
    added = merge_files([(newer, 1.0), (newer, 1.0)], tmp_path / "sum.safetensors", Limits())
    for path, name in ((cut.path, "lora2.resize"), (added.path, "lora2.merge")):
        metadata = lora_file.inspect(path)[1]
        ours = {key for key in metadata if key.startswith("lora2.")}
        assert ours == {"lora2.format_version", "lora2.components", name}
        assert metadata["lora2.format_version"] == FORMAT_VERSION
        assert metadata["ss_output_name"] == path.stem


def test_the_page_names_all_that_a_file_says_of_itself(tmp_path: Path):
    """docs/format.md: a key that is written must stand there."""
    page = (GOLDEN.parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    told = metadata.describe_run(TrainConfig(), ["sks"], "hash", [1], [0.1], [0.1], "sks", "run")
    made = make.components(adaptive_rank.importance, Component)
    whole = lora_file.save(tmp_path / "whole", made, told).stat().st_size
    path = lora_file.save(tmp_path / "cut", made, told, megabytes=(whole - 1) / 1e6)
    written = set(lora_file.inspect(path)[1])
    assert "lora2.svd" in written
    written |= {"lora2.resize", "lora2.merge", "modelspec.thumbnail"}
    assert [key for key in sorted(written) if f"`{key}`" not in page] == []
