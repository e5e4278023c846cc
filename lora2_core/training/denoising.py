"""The trainer's task on a diffusion model: tell the noise in noised latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config.train import ObjectiveConfig, TrainConfig
from ..data.samples import Sample, SampleOrder, Text, merge_tokens
from .draws import to_device
from .objective import Prediction


class TextSource(Protocol):
    """Where text embeddings come from: a cache, or text encoders in training."""

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Contexts (batch, tokens, width) and pooled embeddings (batch, width)."""
        ...


class CachedTexts:
    """Embeddings that were computed before training, so that no text encoder is in memory."""

    def __init__(self, texts: Mapping[str, Text], device: torch.device):
        self._texts = {
            name: Text(text.context.to(device), text.pooled.to(device))
            for name, text in texts.items()
        }

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return merge_tokens([self._texts[text] for text in texts])


@dataclass(frozen=True)
class Batch:
    """One draw. The last ``class_images`` rows are class images."""

    samples: tuple[Sample, ...]
    texts: tuple[str, ...]
    sigma: Tensor  # (batch,)
    noise: Tensor  # (batch, channels, h, w)
    class_images: int = 0


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


def min_snr_weight(prediction: str, sigma: Tensor, gamma: float) -> Tensor:
    """Min-SNR-γ, arXiv 2303.09556: min(SNR, γ)/SNR for noise, min(SNR, γ)/(SNR + 1) for v.

    With ComfyUI's sigma SNR = 1/σ². (batch,) → (batch, 1, 1, 1).
    """
    snr = 1 / sigma.view(-1, 1, 1, 1).square()
    return snr.clamp(max=gamma) / (snr if prediction == "EPS" else snr + 1)


class DenoisingTask:
    """Draws images, noise and timesteps, and asks the model about them.

    ``model``: a private copy of ComfyUI's BaseModel, which takes noised latents and returns its
    guess of the clean ones. ``options``: its transformer options. ``prediction``: what its
    network puts out, see :func:`output_scale`. ``class_samples``: each draw adds as many of them
    as it has photos, for prior preservation (DreamBooth).
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sample],
        texts: TextSource,
        options: dict[str, Any],
        prediction: str,
        config: TrainConfig,
        class_samples: Sequence[Sample] = (),
    ):
        self.model, self.options, self.prediction = model, options, prediction
        self.texts, self.config = texts, config
        self.sigmas: Tensor = model.model_sampling.sigmas.float().cpu()  # (timesteps,) rising
        self.device = next(model.diffusion_model.parameters()).device
        self.samples = [_on(self.device, sample) for sample in samples]
        shapes = [tuple(sample.latent.shape) for sample in samples]
        self.order = SampleOrder(shapes, [sample.repeats for sample in samples])
        self.classes: dict[tuple[int, ...], list[Sample]] = {}
        for sample in class_samples:
            self.classes.setdefault(tuple(sample.latent.shape), []).append(_on(self.device, sample))
        self.class_orders = {
            shape: SampleOrder([shape] * len(found)) for shape, found in self.classes.items()
        }

    def draw(self, generator: torch.Generator, size: int) -> Batch:
        """``size`` images with noise and uniform timesteps, drawn on the CPU and sent on.

        What is switched off draws no number, so a setting that is left alone changes no run.
        """
        chosen = [self.samples[index] for index in self.order.draw(generator, size)]
        shape = tuple(chosen[0].latent.shape)
        classes: list[Sample] = []
        if shape in self.classes:
            picked = self.class_orders[shape].draw(generator, size)
            classes = [self.classes[shape][index] for index in picked]
        steps = torch.randint(*self._range(), (len(chosen) + len(classes),), generator=generator)
        texts = [self._caption(sample, generator) for sample in chosen]
        texts += [sample.captions[0] for sample in classes]
        noise = torch.randn((len(texts), *shape), generator=generator)
        if offset := self.config.objective.noise_offset:
            level = torch.randn((len(texts), shape[0], 1, 1), generator=generator)
            noise = noise + offset * level
        sigma, noise = (to_device(part, self.device) for part in (self.sigmas[steps], noise))
        return Batch((*chosen, *classes), tuple(texts), sigma, noise, len(classes))

    def spread(self, generator: torch.Generator, count: int, size: int) -> list[Batch]:
        """``count`` draws in batches of up to ``size``: timesteps spread evenly, photos in turn."""
        low, high = self._range()
        numbers = torch.arange(count)
        steps = low + ((numbers + 0.5) / count * (high - low)).long()
        chosen = [self.samples[number % len(self.samples)] for number in range(count)]
        batches = []
        while chosen:
            alike = [s.latent.shape == chosen[0].latent.shape for s in chosen[:size]]
            length = alike.index(False) if False in alike else len(alike)
            part, chosen = chosen[:length], chosen[length:]
            noise = torch.randn((length, *part[0].latent.shape), generator=generator)
            texts = tuple(sample.captions[0] for sample in part)
            batches.append(Batch(tuple(part), texts, self.sigmas[steps[:length]], noise))
            steps = steps[length:]
        return batches

    def predict(self, batch: Batch) -> Prediction:
        """The network's output and the truth, up to a shared term: only the difference counts.

        (batch, c, h, w) each. For a model that predicts noise they are ε̂ and ε of eq. 11:
        (x − x̂₀)/σ and (x − x₀)/σ.
        """
        sigma, noise = batch.sigma.to(self.device), batch.noise.to(self.device)
        latent = torch.stack([sample.latent for sample in batch.samples])
        context, pooled = (part.to(self.device) for part in self.texts.read(batch.texts))
        sizes = torch.stack([sample.sizes for sample in batch.samples])
        noised = self.model.model_sampling.noise_scaling(sigma, noise, latent, False)
        denoised = self.model.apply_model(
            noised,
            sigma,
            c_crossattn=context,
            y=torch.cat([pooled, sizes.to(pooled.dtype)], 1),
            transformer_options=dict(self.options),  # the model writes into it
        )
        scale = output_scale(self.prediction, sigma)
        return Prediction(
            (noised - denoised) * scale,
            (noised - latent) * scale,
            self._weight(batch, sigma),
            batch.class_images,
        )

    def state(self) -> dict[str, Any]:
        orders = [order.state() for order in self.class_orders.values()]
        return {"photos": self.order.state(), "classes": {str(n): o for n, o in enumerate(orders)}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.order.load_state(state["photos"])
        for number, order in enumerate(self.class_orders.values()):
            order.load_state(state["classes"][str(number)])

    def _range(self) -> tuple[int, int]:
        """Timesteps from the first to before the second; the least noise comes first."""
        return timestep_range(self.config.objective, len(self.sigmas))

    def _caption(self, sample: Sample, generator: torch.Generator) -> str:
        dropout = self.config.data.caption_dropout
        if dropout and torch.rand((), generator=generator) < dropout:
            return ""
        count = len(sample.captions)
        place = int(torch.randint(count, (), generator=generator)) if count > 1 else 0
        return sample.captions[place]

    def _weight(self, batch: Batch, sigma: Tensor) -> Tensor | None:
        """Mask × min-SNR × share of photos or class images; None where all is 1."""
        parts: list[Tensor] = []
        if any(sample.mask is not None for sample in batch.samples):
            masks = [s.mask for s in batch.samples]
            blank = torch.ones(1, *batch.samples[0].latent.shape[1:], device=self.device)
            parts.append(torch.stack([blank if mask is None else mask for mask in masks]))
        if gamma := self.config.objective.min_snr_gamma:
            parts.append(min_snr_weight(self.prediction, sigma, gamma))
        if count := batch.class_images:
            total = len(batch.samples)
            shares = [total / (total - count)] * (total - count)
            shares += [self.config.data.prior_weight * total / count] * count
            parts.append(torch.tensor(shares, device=self.device).view(-1, 1, 1, 1))
        weight = None
        for part in parts:
            weight = part if weight is None else weight * part
        return weight


def timestep_range(objective: ObjectiveConfig, count: int) -> tuple[int, int]:
    """The timesteps that a run draws from, first and one past the last, of ``count``."""
    low = min(count - 1, int(objective.timestep_low * count))
    return low, max(low + 1, round(objective.timestep_high * count))


def _on(device: torch.device, sample: Sample) -> Sample:
    mask = None if sample.mask is None else sample.mask.to(device)
    latent, sizes = sample.latent.to(device), sample.sizes.to(device)
    return replace(sample, latent=latent, sizes=sizes, mask=mask)
