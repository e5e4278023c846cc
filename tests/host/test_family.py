"""What LoRA² adapts in the models of the SDXL family, counted without their weights."""

from __future__ import annotations

from typing import Any

import comfy.supported_models
import pytest
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.targets import find_targets
from lora2_pack.tests.host import demo

_COMMON: dict[str, Any] = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "model_channels": 320,
    "channel_mult": [1, 2, 4],
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_head_channels": 64,
    "use_temporal_attention": False,
}
_THREE_A_LEVEL = {"num_res_blocks": [2, 2, 2]}
_TWO_A_LEVEL = {"num_res_blocks": [1, 1, 1]}
# What ComfyUI detects in a checkpoint of each: depths going down, in the middle, going up.
FAMILY = {
    "SDXL": _THREE_A_LEVEL
    | {
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
    "SSD1B": _THREE_A_LEVEL
    | {
        "transformer_depth": [0, 0, 2, 2, 4, 4],
        "transformer_depth_middle": -1,
        "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
    },
    "Segmind_Vega": _THREE_A_LEVEL
    | {
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_middle": -1,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    },
    "KOALA_700M": _TWO_A_LEVEL
    | {
        "transformer_depth": [0, 2, 5],
        "transformer_depth_middle": -2,
        "transformer_depth_output": [0, 0, 2, 2, 5, 5],
    },
    "KOALA_1B": _TWO_A_LEVEL
    | {
        "transformer_depth": [0, 2, 6],
        "transformer_depth_middle": 6,
        "transformer_depth_output": [0, 0, 2, 2, 6, 6],
    },
}


def _on_meta(name: str) -> Any:
    unet = {key: list(v) if isinstance(v, list) else v for key, v in FAMILY[name].items()}
    config = getattr(comfy.supported_models, name)({**_COMMON, **unet})
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, "", torch.device("meta"))


@pytest.mark.parametrize(
    ("name", "components", "parameters"),
    [("SDXL", 560, 1_451_520), ("KOALA_700M", 168, 408_576)],
)
def test_what_the_paper_counts(name: str, components: int, parameters: int):
    targets = find_targets(_on_meta(name).diffusion_model)
    assert len(targets) == components
    assert sum(target.parameters_per_rank for target in targets) == parameters


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("selection", ["attention", r"\.(proj_in|ff\.net\.2|in_layers\.2|op)$"])
def test_every_key_that_we_write_is_comfyui_s_own(name: str, selection: str):
    base = _on_meta(name)
    shapes = {key: value.shape for key, value in base.state_dict().items()}
    keys = demo.lora_key_map(base)
    targets = find_targets(base.diffusion_model, selection)
    for target in targets:
        weight = keys[lora_file.kohya_key(target.name)]
        assert weight == f"diffusion_model.{target.name}.weight"
        shape = shapes[weight]
        assert (shape[0], shape[1:].numel()) == (target.out_features, target.in_features)
    assert len({lora_file.kohya_key(target.name) for target in targets}) == len(targets)


@pytest.mark.parametrize("preset", ["self-attention", "cross-attention"])
def test_the_presets_halve_the_attention(preset: str):
    base = _on_meta("KOALA_700M").diffusion_model
    assert len(find_targets(base, preset)) == len(find_targets(base)) // 2
