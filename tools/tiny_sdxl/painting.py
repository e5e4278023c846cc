"""Many prompts at once through ComfyUI's own model, schedule and sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .latents import SIZE

AT_ONCE = 16  # prompts
NOISE_SHAPE = (4, SIZE // 8, SIZE // 8)


@dataclass(frozen=True)
class Sampling:
    """How a picture is sampled; what the demo's workflows use."""

    steps: int = 20
    guidance: float = 4.0
    sampler: str = "dpmpp_2m"
    scheduler: str = "karras"


class Painter:
    """A MODEL, its CLIP and its VAE, as ComfyUI's nodes hold them."""

    def __init__(self, model: Any, clip: Any, vae: Any, sampling: Sampling = Sampling()):
        self.model, self.clip, self.vae, self.sampling = model, clip, vae, sampling

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return a picture of each prompt from the noise of its seed: (n, 3, 192, 192), 0 to 1."""
        return torch.cat(list(self._parts(prompts, seeds)))

    @torch.inference_mode()
    def _parts(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        import comfy.model_management

        comfy.model_management.load_models_gpu([self.model], force_full_load=True)
        for first in range(0, len(prompts), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            latents = self._sample(prompts[some], seeds[some])
            pixels = self.vae.decode(latents)  # (n, h, w, 3)
            yield pixels.permute(0, 3, 1, 2).float().clamp(0, 1)

    def _sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return latents as ComfyUI passes them on, (n, 4, 24, 24)."""
        import comfy.k_diffusion.sampling
        import comfy.samplers

        base = self.model.model
        sigmas = comfy.samplers.calculate_sigmas(
            base.model_sampling, self.sampling.scheduler, self.sampling.steps
        )
        noise = torch.stack([_noise(seed) for seed in seeds])
        start = base.model_sampling.noise_scaling(sigmas[:1], noise, torch.zeros_like(noise), True)
        sampler = getattr(comfy.k_diffusion.sampling, f"sample_{self.sampling.sampler}")
        latents = sampler(self._guided(prompts), start, sigmas, disable=True)
        return base.process_latent_out(latents)

    def _guided(self, prompts: Sequence[str]) -> Any:
        """Return the denoiser of these prompts, guided away from the empty one."""
        conditions = [self._read(prompt) for prompt in [*prompts, *[""] * len(prompts)]]
        context, vector = (torch.cat(parts) for parts in zip(*conditions, strict=True))

        def denoise(latent: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            twice, sigmas = torch.cat([latent, latent]), torch.cat([sigma, sigma])
            with_prompt, without = self.model.model.apply_model(
                twice, sigmas, c_crossattn=context, y=vector
            ).chunk(2)
            return without + self.sampling.guidance * (with_prompt - without)

        return denoise

    def _read(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Return what the U-Net is told of a prompt: (1, 77, context) and (1, vector)."""
        context, pooled = self.clip.encode_from_tokens(
            self.clip.tokenize(prompt), return_pooled=True
        )
        vector = self.model.model.encode_adm(
            pooled_output=pooled, width=SIZE, height=SIZE, device=pooled.device
        )
        return context, vector


def _noise(seed: int) -> Tensor:
    return torch.randn(NOISE_SHAPE, generator=torch.Generator().manual_seed(seed))
