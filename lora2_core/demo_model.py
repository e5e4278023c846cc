"""Tiny SDXL: the shape and the seeded weights of the demo model.

Every class is ComfyUI's real one (see :func:`.comfy_host.build_sdxl`); only the numbers are
small. The U-Net and the text towers hold seeded random weights, so they have learnt nothing. The
autoencoder is exact by construction: it averages 8×8 px blocks into latents and interpolates
them back, so photos survive it as blurred but true colours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_TEXT_WIDTHS = {"clip_l": 64, "clip_g": 128}

UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": (1, 2, 4),
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
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


# The average colour of photos maps to latent 0 and their spread to about 1; the fourth latent
# repeats the brightness, since SDXL has four.
_COLOUR_MEAN, _COLOUR_SPREAD = 0.45, 0.25


@torch.no_grad()
def fill_autoencoder(state: dict[str, Tensor], latent_scale: float) -> dict[str, Tensor]:
    """Weights of a TAESD-shaped autoencoder that averages down and interpolates up.

    ``state``: the state dict to replace, for its names and shapes. ``latent_scale``: SDXL's
    0.13025, by which ComfyUI scales latents; zero would give NaN.
    """
    new = {name: torch.zeros_like(value) for name, value in state.items()}
    new["vae_scale"] = torch.tensor(latent_scale)
    for name, weight in new.items():
        if weight.ndim != 4 or ".conv." in name:
            continue  # residual branches stay zero: blocks pass their input on
        _pass_colours(weight, blur=weight.shape[0] == weight.shape[1])
    names = [name for name in new if name.endswith(".weight") and ".conv." not in name]
    into_latent = [n for n in names if n.startswith("taesd_encoder")][-1]
    from_latent = next(n for n in names if n.startswith("taesd_decoder"))
    _fill_latent_layers(new, into_latent, from_latent)
    return new


def _pass_colours(weight: Tensor, blur: bool) -> None:
    """Channels 0 to 2 through a 3×3 convolution, untouched or blurred by a binomial kernel."""
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(taps, taps)
    for channel in range(min(3, *weight.shape[:2])):
        if blur:
            weight[channel, channel] = kernel
        else:
            weight[channel, channel, 1, 1] = 1.0


def _fill_latent_layers(state: dict[str, Tensor], into_latent: str, from_latent: str) -> None:
    into, out_of = state[into_latent], state[from_latent]
    into.zero_()
    out_of.zero_()
    for channel in range(3):
        into[channel, channel, 1, 1] = 1 / _COLOUR_SPREAD
        into[3, channel, 1, 1] = 1 / (3 * _COLOUR_SPREAD)
        out_of[channel, channel, 1, 1] = _COLOUR_SPREAD
    state[into_latent.replace("weight", "bias")].fill_(-_COLOUR_MEAN / _COLOUR_SPREAD)
    state[from_latent.replace("weight", "bias")][:3] = _COLOUR_MEAN
