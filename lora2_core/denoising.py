"""The trainer's task on a diffusion model: tell the noise in noised latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dataset import Sample, SampleOrder

Batch = tuple[Tensor, Tensor, Tensor]  # index (batch,), sigma (batch,), noise (batch, c, h, w)


def output_scale(prediction: str, sigma: Tensor) -> Tensor:
    """What turns a difference of clean latents into one of network outputs; (batch, 1, 1, 1).

    ``prediction``: ComfyUI's name of what the network puts out; ``sigma``: (batch,). Raises
    ValueError for anything but noise and v.
    """
    sigma = sigma.view(-1, 1, 1, 1)
    if prediction == "EPS":
        return 1 / sigma
    if prediction == "V_PREDICTION":
        return (sigma.square() + 1).sqrt() / sigma
    raise ValueError(
        f"model predicts {prediction}; LoRA² trains models that predict noise (EPS) or v "
        "(V_PREDICTION). Load another SDXL checkpoint."
    )


class DenoisingTask:
    """Draws images, noise and timesteps, and asks the model about them.

    ``model``: a private copy of ComfyUI's BaseModel, which takes noised latents and returns its
    estimate of the clean ones. ``options``: its transformer options. ``prediction``: what its
    network puts out, see :func:`output_scale`.
    """

    def __init__(
        self, model: Any, samples: Sequence[Sample], options: dict[str, Any], prediction: str
    ):
        self.model, self.options, self.prediction = model, options, prediction
        self.order = SampleOrder(len(samples))
        self.sigmas: Tensor = model.model_sampling.sigmas.float().cpu()  # (timesteps,) rising
        device = self.device = next(model.diffusion_model.parameters()).device
        self.latents = [sample.latent.to(device) for sample in samples]
        # Prompts above 77 tokens come in several windows; the shorter ones are repeated to fit,
        # as ComfyUI does when it samples them together.
        tokens = math.lcm(*(sample.context.shape[0] for sample in samples))
        self.contexts = [
            s.context.repeat(tokens // s.context.shape[0], 1).to(device) for s in samples
        ]
        self.vectors = [sample.vector.to(device) for sample in samples]

    def draw(self, generator: torch.Generator, size: int) -> Batch:
        """``size`` images with noise and uniform timesteps, drawn on the CPU."""
        index = torch.tensor(self.order.draw(generator, size))
        step = torch.randint(len(self.sigmas), (size,), generator=generator)
        return self._batch(index, step, generator)

    def spread(self, generator: torch.Generator, count: int, size: int) -> list[Batch]:
        """``count`` draws in batches of ``size``: timesteps spread evenly, images in turn."""
        numbers = torch.arange(count)
        steps = ((numbers + 0.5) / count * len(self.sigmas)).long()
        index = numbers % len(self.latents)
        parts = zip(index.split(size), steps.split(size), strict=True)
        return [self._batch(*part, generator) for part in parts]

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Two tensors whose difference is that of the network's output and the truth.

        (batch, c, h, w) each. For a model that predicts noise they are ε̂ and ε of eq. 11:
        (x − x̂₀)/σ and (x − x₀)/σ.
        """
        index, sigma, noise = batch
        numbers = index.tolist()
        sigma, noise = sigma.to(self.device), noise.to(self.device)
        latent = torch.stack([self.latents[i] for i in numbers])
        noised = self.model.model_sampling.noise_scaling(sigma, noise, latent, False)
        denoised = self.model.apply_model(
            noised,
            sigma,
            c_crossattn=torch.stack([self.contexts[i] for i in numbers]),
            y=torch.stack([self.vectors[i] for i in numbers]),
            transformer_options=dict(self.options),  # the model writes into it
        )
        scale = output_scale(self.prediction, sigma)
        return (noised - denoised) * scale, (noised - latent) * scale

    def _batch(self, index: Tensor, step: Tensor, generator: torch.Generator) -> Batch:
        shape = (len(index), *self.latents[0].shape)
        return index, self.sigmas[step], torch.randn(shape, generator=generator)
