"""The U-Nets of the SDXL family, as ComfyUI detects them in a checkpoint."""

from __future__ import annotations

import importlib
from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "use_checkpoint": False, "image_size": 32, "in_channels": 4, "out_channels": 4,
    "use_spatial_transformer": True, "legacy": False, "num_classes": "sequential",
    "adm_in_channels": 2816, "model_channels": 320, "channel_mult": [1, 2, 4],
    "use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64,
    "use_temporal_attention": False,
}  # fmt: skip
# Class in ComfyUI → depths of its transformers going down, in the middle, and going up.
FAMILY: dict[str, tuple[list[int], int, list[int]]] = {
    "SDXL": ([0, 0, 2, 2, 10, 10], 10, [0, 0, 0, 2, 2, 2, 10, 10, 10]),
    "SSD1B": ([0, 0, 2, 2, 4, 4], -1, [0, 0, 0, 1, 1, 2, 10, 4, 4]),
    "Segmind_Vega": ([0, 0, 1, 1, 2, 2], -1, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
    "KOALA_700M": ([0, 2, 5], -2, [0, 0, 2, 2, 5, 5]),
    "KOALA_1B": ([0, 2, 6], 6, [0, 0, 2, 2, 6, 6]),
}


def on_meta(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The BaseModel of a member of the family, without data; ``changes``: to its configuration."""
    from ....lora2_core.comfy_host.copies.structure import plain

    supported: Any = importlib.import_module("comfy.supported_models")
    down, middle, up = FAMILY[name]
    depths = {
        "num_res_blocks": [len(down) // 3] * 3,  # a level
        "transformer_depth": list(down),
        "transformer_depth_middle": middle,
        "transformer_depth_output": list(up),
    }
    config = getattr(supported, name)({**_COMMON, **depths, **changes})
    config.set_inference_dtype(dtype, None)
    config.custom_operations = plain()  # ComfyUI's own can lack weights until these are loaded
    return config.get_model({}, "", torch.device("meta"))
