"""A CLIP_VISION of ComfyUI as a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.reports.scoring import Subject
from lora2_pack.tests.core import judges
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip_vision(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ComfyUI's own, with seeded weights of a small CLIP."""
    import comfy.clip_vision

    folder = judges.make_clip(tmp_path_factory.mktemp("vision") / "clip")
    config = json.loads((folder / "config.json").read_text())
    small = {**config["vision_config"], "projection_dim": config["projection_dim"],
             "num_channels": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    (folder / "vision.json").write_text(json.dumps(small))
    found = comfy.clip_vision.ClipVisionModel(str(folder / "vision.json"))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    missing, _ = found.load_sd(weights)
    assert not [name for name in missing if "position_ids" not in name]
    return found


def test_it_compares_pictures_of_any_size(clip_vision: Any):
    red = Image.new("RGB", (40, 30), (255, 0, 0))
    blue = Image.new("RGB", (20, 50), (0, 0, 255))
    judge = comfy_host.clip_vision_judge(clip_vision)
    found = judge.judge(Subject("s", [red], {"p": [red, blue]}))["p"]
    assert found[0] == pytest.approx(1, abs=1e-5) and found[1] < 0.999
    assert judge.metric == "CLIP_VISION" and "32 px" in judge.name


def test_folders_come_before_the_cache(tmp_path: Path):
    import folder_paths

    (tmp_path / "owner" / "name").mkdir(parents=True)
    folder_paths.add_model_folder_path("diffusers", str(tmp_path))
    assert comfy_host.judge_folder(" owner/name ") == tmp_path / "owner" / "name"
    assert comfy_host.judge_folder("") is None
    for name in ("../owner", "/", "owner/../../x", "C:\\x", "\\\\host\\x"):
        with pytest.raises(comfy_host.HostError, match="leads out"):
            comfy_host.judge_folder(name)
