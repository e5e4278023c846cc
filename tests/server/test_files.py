"""Resizing, merging, inspecting and loading with options, as nodes of a booted server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.tests.server.graphs import Workflow, painting, training
from lora2_pack.tests.server.studio import Studio
from safetensors.torch import load_file, save_file

SEED = 61
NAME = f"tests/{SEED}_00001_.safetensors"
LIMITS = {"max_rank": 0, "keep_energy": 1.0, "megabytes": 0.0, "order": "svd"}


@pytest.fixture(scope="module")
def file(studio: Studio) -> Path:
    """A LoRA of clearly visible effect on the demo model of SEED."""
    studio.run(training(SEED, steps=8, learning_rate=0.02, target_rank=4.0))
    return studio.loras / NAME


def _paint(studio: Studio, model: list[Any], **nodes: dict[str, Any]):
    return studio.picture(studio.run(painting(SEED, model, **nodes)), "p")


def _load(name: str, **inputs: Any) -> dict[str, Any]:
    settings = {"model": ["1", 0], "lora_name": name, "strength_model": 1.0, "strength_clip": 1.0}
    return {"class_type": "LoRA2Load", "inputs": {**settings, **inputs}}


def _options(**inputs: Any) -> dict[str, Any]:
    places = {f"strength_{place}": 1.0 for place in ("down", "mid", "up", "self", "cross")}
    settings = {**LIMITS, "blocks": "all", "apply_as": "auto", **places, **inputs}
    return {"class_type": "LoRA2LoadOptions", "inputs": settings}


def _text(studio: Studio, history: dict[str, Any], node: str) -> str:
    return studio.server.outputs(history, node)["text"][0]


def _resize(**inputs: Any) -> Workflow:
    settings = {"lora_name": NAME, "file_name": "tests/small", **LIMITS, **inputs}
    return {"r": {"class_type": "LoRA2Resize", "inputs": settings}}


def _merge(**inputs: Any) -> Workflow:
    four = {f"lora_{n}": "none" for n in (3, 4)} | {f"weight_{n}": 1.0 for n in range(1, 5)}
    settings = {
        "lora_1": NAME,
        "lora_2": NAME,
        "file_name": "tests/sum",
        **four,
        **LIMITS,
        **inputs,
    }
    return {"m": {"class_type": "LoRA2Merge", "inputs": settings}}


def test_resizing(studio: Studio, file: Path):
    text = _text(studio, studio.run(_resize(max_rank=2)), "r")
    small = studio.loras / "tests/small_00001_.safetensors"
    assert "small_00001_" in text and "of the energy is kept" in text
    assert max(info.rank for info in lora_file.inspect(small)[0]) <= 2
    assert small.stat().st_size < file.stat().st_size
    cut = _paint(studio, ["x", 0], x=_load(NAME, options=["o", 0]), o=_options(max_rank=2))
    assert (
        abs(
            cut - _paint(studio, ["x", 0], x=_load(small.relative_to(studio.loras).as_posix()))
        ).max()
        <= 1
    )
    before = studio.lora_files()
    studio.run(_resize(max_rank=3))
    [new] = studio.lora_files() - before
    assert new == "tests/small_00002_.safetensors", "no file is replaced"
    error = studio.refusal(_resize(megabytes=0.001))
    assert "has no room" in error.message


def test_merging(studio: Studio, file: Path):
    shutil.copy(file, studio.loras / "tests/other.safetensors")
    text = _text(studio, studio.run(_merge(lora_2="tests/other.safetensors", weight_2=-0.25)), "m")
    assert "sum_00001_" in text
    merged = _paint(studio, ["x", 0], x=_load("tests/sum_00001_.safetensors"))
    assert abs(merged - _paint(studio, ["x", 0], x=_load(NAME, strength_model=0.75))).max() <= 1
    error = studio.refusal(_merge(weight_1=0.0, weight_2=0.0))
    assert "Every weight is 0" in error.message


def test_several_files_in_one_node(studio: Studio, file: Path):
    shutil.copy(file, studio.loras / "tests/twice.safetensors")
    one = _paint(studio, ["x", 0], x=_load(NAME, strength_model=0.75))
    two = _load(NAME, strength_model=0.5, lora_3="tests/twice.safetensors", strength_3=0.25)
    assert abs(_paint(studio, ["x", 0], x=two) - one).max() <= 1
    beside = _load(NAME, strength_model=0.75, options=["o", 0])
    found = _paint(studio, ["x", 0], x=beside, o=_options(apply_as="bypass"))
    assert abs(found - one).max() <= 1
    base = _paint(studio, ["1", 0])
    nowhere = _options(strength_self=0.0, strength_cross=0.0)
    assert (_paint(studio, ["x", 0], x=beside, o=nowhere) == base).all()


def test_inspecting_side_by_side(studio: Studio, file: Path):
    shutil.copy(file, studio.loras / "tests/beside.safetensors")
    inputs = {"lora_name": NAME, "lora_2": "tests/beside.safetensors", "measure": True}
    workflow = {
        "i": {"class_type": "LoRA2InspectRanks", "inputs": inputs},
        "t": {"class_type": "PreviewAny", "inputs": {"source": ["i", 2]}},
    }
    history = studio.run(workflow)
    text = _text(studio, history, "i")
    assert "could be cut to" in text and "beside.safetensors" in text
    told = json.loads(_text(studio, history, "t"))
    assert [one["name"] for one in told] == [NAME, "tests/beside.safetensors"]
    assert told[0]["measured"]["norm"] > 0 and told[0]["components"] == told[1]["components"]


def test_what_lies_beside_the_factors(studio: Studio, file: Path):
    """What can be cut is cut, the rest stays and is told; the file has another ending, too."""
    state, layer = load_file(file), "lora_unet_middle_block_1_proj_out"
    state[f"{layer}.lokr_w1"] = torch.randn(8, 8) / 20
    state[f"{layer}.lokr_w2"] = torch.randn(16, 16) / 20
    state["lora_unet_middle_block_1_norm.diff_b"] = torch.randn(128) / 20
    state["bundle_emb.sks cat.clip_l"] = torch.ones(2, 64)
    save_file(state, studio.loras / "tests/beside.SFT")
    load = _load("tests/beside.SFT", options=["o", 0])
    history = studio.run(painting(SEED, ["x", 0], x=load, o=_options(max_rank=2)))
    told = _text(studio, history, "x")
    assert "1 embedding (sks cat) left out; copy the file to models/embeddings" in told
    assert "1 difference and 1 LoKr are loaded whole: max_rank cuts pairs of factors" in told
    resize = _resize(lora_name="tests/beside.SFT", max_rank=2, file_name="tests/kept")
    text = _text(studio, studio.run(resize), "r")
    assert "Kept as they are: 1 difference, 1 LoKr, 1 embedding (sks cat)." in text
    small = _paint(studio, ["x", 0], x=_load("tests/kept_00001_.safetensors"))
    assert abs(small - studio.picture(history, "p")).max() <= 1
    error = studio.refusal(_merge(lora_2="tests/beside.SFT"))
    assert "holds LoKr, which have no ranks to cut or to add" in error.message
    inspect = {"class_type": "LoRA2InspectRanks", "inputs": {"lora_name": "tests/beside.SFT"}}
    text = _text(studio, studio.run({"i": inspect}), "i")
    assert "1 embedding: sks cat; 1 tensor, 0.5 kB" in text
    assert "1 lokr" in text and "of kinds without a rank" in text


def test_comfyui_s_own_lora_model_nodes_take_it(studio: Studio, file: Path):
    train = training(SEED, steps=8, learning_rate=0.02, target_rank=4.0, file_name="tests/model")
    nodes = {k: v for k, v in train.items() if k != "1"}
    apply = {"model": ["1", 0], "lora": ["3", 5], "strength_model": 1.0}
    apply["bypass"] = False  # which 0.14.0 and newer ask for
    nodes["x"] = {"class_type": "LoraModelLoader", "inputs": apply}
    save = {"lora": ["3", 5], "prefix": "loras/tests/stock", "steps": 0}
    nodes["s"] = {"class_type": "SaveLoRA", "inputs": save}
    picture = _paint(studio, ["x", 0], **nodes)
    assert abs(picture - _paint(studio, ["x", 0], x=_load(NAME))).max() <= 1
    [saved] = studio.loras.glob("tests/stock*.safetensors")
    again = _paint(studio, ["x", 0], x=_load(saved.relative_to(studio.loras).as_posix()))
    assert abs(picture - again).max() <= 1
