"""Tiny SDXL: the shape and the trained weights of the demo model.

Every class is ComfyUI's real one (see :func:`..comfy_host.build_sdxl`); only the numbers are
small. The weights were trained from scratch on drawn scenes, see ``tiny_sdxl/README.md``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "tiny_sdxl.safetensors"
SHA256 = "e32e2d22e2d6b9653bc008f2c0f39bb3c66a9a2177cccc6d7f2b365087cbee34"
SIZE = 192  # px that it was trained at, and paints at

_TEXT_WIDTHS = {"clip_l": 64, "clip_g": 128}

UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": (1, 1, 2),
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 1, 1, 1],
    "transformer_depth_middle": 2,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
    "num_classes": "sequential",
    "context_dim": sum(_TEXT_WIDTHS.values()),
    "adm_in_channels": _TEXT_WIDTHS["clip_g"] + 1536,
}


def text_configs() -> dict[str, dict[str, Any]]:
    """ComfyUI's model options for the two text encoders, small."""
    return {
        f"{name}_model_config": {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": width // 32,
            "num_hidden_layers": 3,  # ComfyUI reads the one before the last
            "projection_dim": width,
        }
        for name, width in _TEXT_WIDTHS.items()
    }


@torch.no_grad()
def fill_seeded(module: nn.Module, seed: int) -> None:
    """Every parameter of ``module`` from one seed: matrices Gaussian at 1/√fan-in, norms 1,
    biases 0. ComfyUI's classes leave their parameters uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            values = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        else:
            values = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
        parameter.copy_(values.to(parameter))


class DemoModelError(RuntimeError):
    """The demo model's weights cannot be used; the message says which file and what to do."""


def fill_untrained(unet: nn.Module, text: nn.Module, seed: int = 0) -> None:
    """Weights that have learnt nothing, the same for the same seed."""
    fill_seeded(unet, seed)
    fill_seeded(text, seed + 1)


@torch.no_grad()
def fill_trained(unet: nn.Module, text: Any) -> None:
    """The trained weights. Words that no caption of the training held keep seeded random rows:
    they are free for subjects. Raises DemoModelError when the file is missing or damaged."""
    weights = read_weights()
    unet.load_state_dict(_below("unet.", weights))
    fill_seeded(text, 1)
    for name in _TEXT_WIDTHS:
        transformer = getattr(text, name).transformer
        table: Tensor = transformer.get_input_embeddings().weight  # (49408, width)
        table[weights["words"].long()] = weights[name.replace("clip", "rows")].to(table)
        for part, value in _below(f"{name}.", weights).items():
            transformer.get_parameter(part).copy_(value)


def autoencoder_weights() -> dict[str, Tensor]:
    """The trained weights of a TAESD, by ComfyUI's names. Raises as :func:`fill_trained` does."""
    return _below("vae.", read_weights())


def read_weights(file: Path = WEIGHTS) -> dict[str, Tensor]:
    """All tensors of the file, fp16, but the numbers of words. Raises DemoModelError."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DemoModelError(
            f"The demo model's weights are missing: {file} ({error.strerror}). Install the pack "
            "again."
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DemoModelError(
            f"The demo model's weights are damaged or of another version: {file} has SHA-256 "
            f"{found[:16]}…, {SHA256[:16]}… is expected. Install the pack again."
        )
    return load(content)


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
