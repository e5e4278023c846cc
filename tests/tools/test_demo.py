"""The demo's own judgement: what it collects, and when it says that it failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_tools import demo
from safetensors.torch import save_file

GOOD = {"loss_first": 1.3, "loss_last": 1.0, "rank_min": 4, "rank_max": 34}


def write_run(output: Path, pictures: tuple[str, ...] = tuple(demo.PICTURES)) -> None:
    """What ComfyUI's output folder holds after a run."""
    (output / "loras" / "lora2").mkdir(parents=True)
    entries = {"a": {"nu": 0.3, "rank": 4}, "b": {"nu": 0.1, "rank": 20}}
    metadata = {
        "lora2.components": json.dumps(entries),
        "lora2.loss": json.dumps({"training": [1.4, 1.1], "fixed_noise": [1.3, 1.0]}),
        "lora2.steps": "100",
    }
    file = output / "loras" / "lora2" / "cat_00001_.safetensors"
    save_file({"x": torch.zeros(3)}, file, metadata)
    for name in pictures:
        (output / f"{name}_00001_.png").write_bytes(name.encode())


def test_it_collects_everything(tmp_path: Path):
    output, out = tmp_path / "output", tmp_path / "out"
    write_run(output)
    out.mkdir()
    summary = demo.collect(output, out, 12.34)
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["loss_first"], summary["loss_last"], summary["steps"]) == (1.3, 1.0, 100)
    assert (summary["rank_min"], summary["rank_mean"], summary["rank_max"]) == (4, 12, 20)
    assert summary["bytes"] == (out / summary["file"]).stat().st_size
    assert {path.name for path in out.iterdir()} == {
        *demo.PICTURES.values(),
        "summary.json",
        "cat_00001_.safetensors",
    }
    demo.check(summary, out)


@pytest.mark.parametrize("missing", demo.PICTURES)
def test_a_missing_picture_is_a_failure(tmp_path: Path, missing: str):
    write_run(tmp_path, tuple(name for name in demo.PICTURES if name != missing))
    (tmp_path / "out").mkdir()
    with pytest.raises(demo.DemoError, match=missing):
        demo.collect(tmp_path, tmp_path / "out", 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_last": 1.29}, "did not fall clearly"),
        ({"loss_last": 1.4}, "did not fall clearly"),
        ({"rank_min": 34}, "the same rank"),
        ({}, "changed nothing"),
    ],
)
def test_it_fails_when_there_is_nothing_to_show(tmp_path: Path, change: dict[str, Any], words: str):
    (tmp_path / "base.png").write_bytes(b"one picture")
    (tmp_path / "sample.png").write_bytes(b"another" if change else b"one picture")
    with pytest.raises(demo.DemoError, match=words):
        demo.check(GOOD | change, tmp_path)
