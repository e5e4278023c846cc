"""What can be shown of a file that says two things, or that no loader takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.lora_file import LoRAFileError
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from safetensors.torch import save_file
from torch import Tensor

torch.set_num_threads(1)

SGM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
DOTTED = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
DIFFUSERS = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")


def pair(name: str, ends: tuple[str, str] = KOHYA, rank: int = 4) -> dict[str, Tensor]:
    return {name + ends[0]: torch.ones(rank, 64), name + ends[1]: torch.ones(64, rank)}


@pytest.mark.parametrize(
    "twice",
    [
        pair(DOTTED, PEFT) | pair(SGM),
        pair(SGM) | pair("lora_unet_" + DIFFUSERS.replace(".", "_")),
        pair(SGM) | pair("base_model.model." + DIFFUSERS, PEFT),
        pair(SGM) | pair(SGM, PEFT),
    ],
)
def test_a_layer_by_two_names(tmp_path: Path, twice: dict[str, Tensor]):
    path, new = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(twice | pair("lora_unet_other"), path)
    for use in (lambda: resize_file(path, new, Limits()),
                lambda: merge_files([(path, 1.0)], new, Limits())):  # fmt: skip
        with pytest.raises(LoRAFileError, match="names a component twice"):
            use()
    assert not new.exists()
    report = inspector.inspect(path, with_tensors=True)
    assert len(report.components) == 3 and "a layer twice" in report.as_dict()["damage"]
    assert "\nDamaged      it changes a layer twice (" in report.text()
    assert report.measured is not None
    assert [one.key for one in report.measured.components] == ["lora_unet_other"]
    assert "Not measured: 2 that the file names twice." in report.text()


@pytest.mark.parametrize("words", ["no JSON", '{"lora_alpha": "many"}'])
def test_a_strength_that_cannot_be_read_hides_nothing_else(tmp_path: Path, words: str):
    path = tmp_path / "x.safetensors"
    own = pair("lora_unet_own") | {"lora_unet_own.alpha": torch.tensor(4.0)}
    save_file(pair("x", PEFT) | own, path, {"lora_adapter_metadata": words})
    report = inspector.inspect(path, with_tensors=True)
    assert report.measured is not None and json.dumps(report.as_dict())
    assert [one.key for one in report.measured.components] == ["lora_unet_own"]
    assert "Not measured: 1 whose alpha cannot be read (lora_adapter_metadata)." in report.text()
    assert "lora_adapter_metadata that cannot be read" in report.damage
    with pytest.raises(LoRAFileError, match="lora_adapter_metadata that cannot be read"):
        resize_file(path, tmp_path / "y.safetensors", Limits())


@pytest.mark.parametrize(
    ("state", "numbers"),
    [
        (pair("x") | {"x.dora_scale": torch.ones(64, 1)}, 512 + 64),
        (pair("x", PEFT) | {"x.lora_magnitude_vector": torch.ones(64)}, 512 + 64),
        (pair("x", PEFT) | {"x.lora_E": torch.ones(4, 1)}, 512 + 4),
        (
            {
                "x.lora_down.weight": torch.ones(4, 64, 1, 1),
                "x.lora_mid.weight": torch.ones(4, 4, 3, 3),
                "x.lora_up.weight": torch.ones(64, 4, 1, 1),
                "x.alpha": torch.tensor(4.0),
            },
            256 + 144 + 256,
        ),
    ],
)
def test_all_that_was_trained_counts(tmp_path: Path, state: dict[str, Tensor], numbers: int):
    save_file(state, tmp_path / "x.safetensors")
    summary = inspector.inspect(tmp_path / "x.safetensors").as_dict()["summary"]
    assert (summary["parameters"], summary["nbytes"]) == (numbers, 4 * numbers)
