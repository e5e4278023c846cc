"""Files of every version of the format are read for ever, and written again byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora2_pack.lora2_core import inspector, lora_file, lora_format, resize
from lora2_pack.lora2_core.shrink import Limits
from lora2_pack.tests.core import toy

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
VERSIONS = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def test_there_is_one_of_every_version():
    newest = int(lora_format.FORMAT_VERSION)
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
    state = dict(lora_file.load(path).state)
    for key, one in expected.items():
        wanted = torch.tensor(one["delta"], dtype=torch.float64)
        assert (toy.stored_delta(state, key) - wanted).norm() < 5e-4 * wanted.norm()


def test_saved_again_it_has_the_same_bytes(tmp_path: Path):
    path = GOLDEN / f"v{lora_format.FORMAT_VERSION}.safetensors"
    file = lora_file.load(path)
    assert lora_file.encode(file.state, file.metadata) == path.read_bytes()
    again = tmp_path / "again.safetensors"
    lora_file.write_atomically(again, lora_file.encode(file.state, file.metadata))
    loaded = lora_file.load(again)
    assert lora_file.encode(loaded.state, loaded.metadata) == again.read_bytes()
    assert resize.resize(path, again, Limits()).after == path.stat().st_size
    assert again.read_bytes() == path.read_bytes()


def test_a_newer_version_is_a_plain_lora(tmp_path: Path):
    file = lora_file.load(GOLDEN / "v1.safetensors")
    newer = {**file.metadata, "lora2.format_version": "2", "lora2.components": '{"x": {"nu": 1}}'}
    path = tmp_path / "newer.safetensors"
    path.write_bytes(lora_file.encode(file.state, newer))
    report = inspector.inspect(path)
    assert "LoRA² 2, newer than this pack knows; read as a plain LoRA" in report.text()
    assert {c.nu for c in report.components} == {None}
    assert sorted(c.rank for c in report.components) == [1, 2, 2, 3]
    assert lora_file.load(path).state.keys() == file.state.keys()
