"""Train the base model's autoencoder: ComfyUI's real TAESD class, from scratch, on the CPU.

It computes in bf16, where the processor can (measured 134 ms a crop of 128 px against 277 in
fp32, 2 cores).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder_images import training_image_for_autoencoder
from .run import Run, Schedule

LATENT_SCALE = 0.13025  # SDXL's, by which ComfyUI scales latents


@dataclass(frozen=True)
class Recipe:
    """What the autoencoder sees, and what it is asked for."""

    batch: int = 8  # crops a step
    crop: int = 128  # px; the autoencoder is convolutional, so it works at any size
    size: int = 192  # px that pictures are drawn at
    photos: float = 0.12  # share of crops that are of real photos
    latent_weight: float = 0.02  # pull of each latent channel towards mean 0 and deviation 1
    latent_noise: float = 0.05  # added to latents: the decoder must bear a diffusion's errors
    seed: int = 0


# At 1e-3 without a clipped gradient a run was thrown back to its start at step 100, and its
# latents never recovered.
SCHEDULE = Schedule(steps=3600, learning_rate=8e-4, warm_up=200, clip=0.5)


def new_autoencoder() -> nn.Module:
    """Return ComfyUI's autoencoder with fresh weights; needs :func:`..host.open_comfyui`."""
    from comfy.taesd.taesd import TAESD

    model = TAESD(latent_channels=4)
    initialize(model, torch.Generator().manual_seed(0))
    return model


def trained_autoencoder(weights: Mapping[str, Tensor]) -> nn.Module:
    """Return the autoencoder with these weights, by the names of its class."""
    model = new_autoencoder()
    model.load_state_dict(weights, strict=False)  # the scale and shift are constants
    return model.eval().requires_grad_(False)


@torch.no_grad()
def initialize(model: Any, generator: torch.Generator) -> None:
    """Kaiming weights; the last convolution of each residual branch starts small."""
    for name, weight in model.named_parameters():
        if weight.ndim == 4:
            scale = 0.2 if name.endswith("conv.4.weight") else 1.0
            deviation = scale * math.sqrt(2 / weight[0].numel())
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
        elif weight.ndim == 1:
            weight.zero_()
    model.vae_scale.fill_(LATENT_SCALE)
    model.vae_shift.zero_()


def photos() -> list[np.ndarray]:
    """Return the real photos that scikit-image carries in colour, 8 bit."""
    try:
        from skimage import data
    except ImportError as error:
        raise SystemExit("Training needs photos: pip install scikit-image") from error
    return [data.astronaut(), data.chelsea(), data.coffee()]


class Crops:
    """Random crops of pictures, (batch, 3, crop, crop) in 0 to 1; a step's are always the same."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.photos = photos()

    def batch(self, step: int) -> Tensor:
        """Return the crops of a step."""
        rng = random.Random(self.recipe.seed * 1_000_003 + step)
        crops = [self._crop(rng) for _ in range(self.recipe.batch)]
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255

    def _crop(self, rng: random.Random) -> np.ndarray:
        side = self.recipe.crop
        if rng.random() < self.recipe.photos:
            image = rng.choice(self.photos)
        else:
            image = training_image_for_autoencoder(rng, self.recipe.size)
        top = rng.randrange(image.shape[0] - side + 1)
        left = rng.randrange(image.shape[1] - side + 1)
        cut = image[top : top + side, left : left + side]
        return cut[:, ::-1] if rng.random() < 0.5 else cut


def loss_of(model: Any, pixels: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Return the error of the reconstruction, plus the pull on the latents."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent = model.taesd_encoder(pixels).float()  # (batch, 4, h/8, w/8)
        noise = torch.randn(latent.shape, generator=generator) * recipe.latent_noise
        output = model.taesd_decoder(latent + noise).float()
    mean, deviation = latent.mean(dim=(0, 2, 3)), latent.std(dim=(0, 2, 3))
    pull = mean.square().mean() + (deviation - 1).square().mean()
    return fidelity(output, pixels) + recipe.latent_weight * pull


def fidelity(output: Tensor, pixels: Tensor) -> Tensor:
    """Return squared and absolute error, and the absolute error of edges."""
    error = output - pixels
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    return 4 * F.mse_loss(output, pixels) + 0.25 * error.abs().mean() + 0.1 * (across + down)


def train(file: Path, schedule: Schedule = SCHEDULE, recipe: Recipe = Recipe()) -> None:
    """Train to the end of the schedule, from where ``file`` stopped."""
    model, crops = new_autoencoder(), Crops(recipe)
    weights = {n: p for n, p in model.named_parameters() if not n.startswith("vae_")}

    def loss_of_step(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return loss_of(model, crops.batch(step), recipe, generator)

    Run(weights, schedule, file).train(loss_of_step)
