"""Seeded checkpoints have the names and shapes that ComfyUI knows the real ones by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora2_pack.bench.paper.bases import seeded


@pytest.mark.parametrize("shape", list(seeded.SHAPES))
def test_comfyui_takes_it_for_the_real_one(runtime: Any, shape: str):
    import comfy.model_detection

    tensors = seeded._on_meta(shape)
    found = comfy.model_detection.model_config_from_unet(tensors, "model.diffusion_model.")
    assert type(found).__name__ == seeded.SHAPES[shape]
    target = found.clip_target({}).clip.__name__
    assert target == "SDXLClipModel"
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds >= {"model", "conditioner", "first_stage_model"}


def test_weights_are_seeded_and_norms_leave_alone():
    generator = torch.Generator().manual_seed(0)
    norm = seeded._seeded("a.norm.weight", torch.empty(4, device="meta"), generator)
    bias = seeded._seeded("a.bias", torch.empty(4, device="meta"), generator)
    weight = seeded._seeded("a.weight", torch.empty(64, 64, device="meta"), generator)
    ids = seeded._seeded("ids", torch.empty(1, 3, dtype=torch.int64, device="meta"), generator)
    assert norm.tolist() == [1] * 4 and bias.tolist() == [0] * 4 and ids.tolist() == [[0, 1, 2]]
    assert 0.018 < weight.float().std() < 0.022 and weight.dtype == torch.float16
