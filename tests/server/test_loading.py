"""LoRA files in ComfyUI: found without a restart, the same through every loader, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lora2_pack.tests.server.graphs import painting, training
from lora2_pack.tests.server.studio import Studio

SEED = 11
NAME = f"tests/{SEED}_00001_.safetensors"


@pytest.fixture(scope="module")
def file(studio: Studio) -> Path:
    """A LoRA of clearly visible effect on the demo model of SEED."""
    studio.run(training(SEED, steps=8, learning_rate=0.02, target_rank=4.0))
    return studio.loras / NAME


def _paint(studio: Studio, model: list[Any], **nodes: dict[str, Any]):
    return studio.picture(studio.run(painting(SEED, model, **nodes)), "p")


def _load(node: str, name: str, **inputs: Any) -> dict[str, Any]:
    return {
        "class_type": node,
        "inputs": {"model": ["1", 0], "lora_name": name, "strength_model": 1.0, **inputs},
    }


def _ours(name: str, **inputs: Any) -> dict[str, Any]:
    return _load("LoRA2Load", name, strength_clip=1.0, **inputs)


def _offered(studio: Studio, node: str) -> list[str]:
    spec = studio.server.get(f"/object_info/{node}")[node]["input"]["required"]["lora_name"]
    return spec[0] if isinstance(spec[0], list) else spec[1]["options"]


def test_a_new_file_is_listed_without_a_restart(studio: Studio, file: Path):
    for node in ("LoraLoader", "LoRA2Load", "LoRA2InspectRanks"):
        assert NAME in _offered(studio, node), node


def test_every_loader_paints_the_same_picture(studio: Studio, file: Path):
    base = _paint(studio, ["1", 0])
    ours = _paint(studio, ["x", 0], x=_ours(NAME))
    stock = _paint(studio, ["x", 0], x=_load("LoraLoaderModelOnly", NAME))
    both = {"clip": ["1", 1], "strength_clip": 1.0}
    stock_with_clip = _paint(studio, ["x", 0], x=_load("LoraLoader", NAME, **both))
    assert abs(ours - base).max() > 10, "the LoRA is too weak to prove anything"
    assert abs(ours - stock).max() <= 1
    assert abs(ours - stock_with_clip).max() <= 1


def test_the_training_node_hands_on_what_it_saved(studio: Studio, file: Path):
    train = training(SEED, steps=8, learning_rate=0.02, target_rank=4.0, file_name="tests/again")
    direct = _paint(studio, ["3", 0], **{k: v for k, v in train.items() if k != "1"})
    assert abs(direct - _paint(studio, ["x", 0], x=_ours(NAME))).max() <= 1


def test_strength_and_clip(studio: Studio, file: Path):
    base = _paint(studio, ["1", 0])
    off = _paint(studio, ["x", 0], x=_ours(NAME, strength_model=0.0))
    assert (off == base).all()
    half = _paint(studio, ["x", 0], x=_ours(NAME, strength_model=0.5, clip=["1", 1]))
    stock = _paint(studio, ["x", 0], x=_load("LoraLoaderModelOnly", NAME, strength_model=0.5))
    assert abs(half - stock).max() <= 1


def _refusals(studio: Studio, name: str) -> list[str]:
    """What the nodes that inspect and load say."""
    inspect = {"class_type": "LoRA2InspectRanks", "inputs": {"lora_name": name}}
    inspected = studio.refusal({"i": inspect})
    loaded = studio.refusal(painting(SEED, ["x", 0], x=_ours(name)))
    assert loaded.node_id == "x"
    return [inspected.message, loaded.message]


def _refused(studio: Studio, name: str) -> str:
    inspected, loaded = _refusals(studio, name)
    assert inspected == loaded
    return loaded


def check_one_sentence(message: str, *words: str) -> None:
    for word in words:
        assert word in message
    assert "Traceback" not in message and "\n" not in message


def test_a_truncated_file(studio: Studio, file: Path):
    data = file.read_bytes()
    for name, size in (("cut", len(data) - 100), ("cut_header", 50), ("nothing", 0)):
        (studio.loras / f"{name}.safetensors").write_bytes(data[:size])
        check_one_sentence(_refused(studio, f"{name}.safetensors"), f"{name}.safetensors")


def test_files_that_are_no_safetensors(studio: Studio):
    torch.save({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, studio.loras / "pickle.pt")
    shutil.copy(studio.loras / "pickle.pt", studio.loras / "pickle.safetensors")
    (studio.loras / "text.safetensors").write_text("this is no LoRA")
    for name in ("pickle.safetensors", "text.safetensors"):
        check_one_sentence(_refused(studio, name), name, "not a safetensors file")
    for message in _refusals(studio, "pickle.pt"):  # ComfyUI itself may look at the list first
        check_one_sentence(message, "pickle.pt")
        assert "not a safetensors file" in message or "not in list" in message
    for node in ("LoRA2Load", "LoRA2InspectRanks"):
        assert "pickle.pt" not in _offered(studio, node)


def test_a_file_that_is_not_there(studio: Studio, file: Path):
    doomed = studio.loras / "doomed.safetensors"
    shutil.copy(file, doomed)
    _paint(studio, ["x", 0], x=_ours(doomed.name))
    doomed.unlink()
    for name in (doomed.name, "../../secret.safetensors", "/etc/passwd"):
        error = studio.refusal(painting(SEED, ["x", 0], x=_ours(name)))
        assert "lora_name" in error.message and name in error.message


def test_a_lora_of_other_shapes(studio: Studio, file: Path):
    state = safetensors.torch.load_file(file)
    wide = {
        key: torch.cat([value, value], 1 if key.endswith("down.weight") else 0)
        if value.ndim
        else value
        for key, value in state.items()
    }
    safetensors.torch.save_file(wide, studio.loras / "wide.safetensors")
    error = studio.refusal(painting(SEED, ["x", 0], x=_ours("wide.safetensors")))
    check_one_sentence(error.message, "wide.safetensors", "made for a text of width 384")


def test_a_lora_without_a_matching_layer(studio: Studio, file: Path):
    flux = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 64),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(192, 2),
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0),
    }
    safetensors.torch.save_file(flux, studio.loras / "flux.safetensors")
    error = studio.refusal(painting(SEED, ["x", 0], x=_ours("flux.safetensors")))
    check_one_sentence(error.message, "flux.safetensors was made for Flux, this model is SDXL")


def test_a_checkpoint_is_no_lora(studio: Studio):
    state = {"model.diffusion_model.out.2.weight": torch.ones(4, 4)}
    safetensors.torch.save_file(state, studio.loras / "checkpoint.safetensors")
    inspect = {"class_type": "LoRA2InspectRanks", "inputs": {"lora_name": "checkpoint.safetensors"}}
    check_one_sentence(studio.refusal({"i": inspect}).message, "checkpoint.safetensors", "no LoRA")
    error = studio.refusal(painting(SEED, ["x", 0], x=_ours("checkpoint.safetensors")))
    check_one_sentence(error.message, "checkpoint.safetensors")
