"""Many prompts at once through ComfyUI's own model, schedule and sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....lora2_core.tiny_sdxl.model import SIZE

AT_ONCE = 16  # prompts


@dataclass(frozen=True)
class Sampling:
    """How a picture is sampled; what the demo's workflows use."""

    steps: int = 20
    guidance: float = 4.0
    sampler: str = "dpmpp_2m"
    scheduler: str = "karras"


class Painter:
    """A MODEL, its CLIP and its VAE, as ComfyUI's nodes hold them."""

    def __init__(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        sampling: Sampling = Sampling(),
        size: int | None = None,
        at_once: int = AT_ONCE,
    ):
        self.model, self.clip, self.vae, self.sampling = model, clip, vae, sampling
        self.size, self.at_once = size or SIZE, at_once  # px along each side; prompts

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return a picture of each prompt from the noise of its seed: (n, 3, size, size), 0 to 1,
        on the CPU."""
        return torch.cat(list(self._parts(prompts, seeds)))

    @torch.inference_mode()
    def _parts(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        import comfy.model_management

        comfy.model_management.load_models_gpu([self.model], force_full_load=True)
        for first in range(0, len(prompts), self.at_once):
            some = slice(first, first + self.at_once)
            latents = self._sample(prompts[some], seeds[some])
            pixels = self.vae.decode(latents)  # (n, h, w, 3)
            yield pixels.permute(0, 3, 1, 2).float().clamp(0, 1).cpu()

    def _sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return latents as ComfyUI passes them on, (n, 4, size/8, size/8)."""
        import comfy.k_diffusion.sampling
        import comfy.samplers

        base, device = self.model.model, self.model.load_device
        sigmas = comfy.samplers.calculate_sigmas(
            base.model_sampling, self.sampling.scheduler, self.sampling.steps
        ).to(device)
        noise = torch.stack([self._noise(seed) for seed in seeds]).to(device)
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
            pooled_output=pooled, width=self.size, height=self.size, device=pooled.device
        )
        device = self.model.load_device
        return context.to(device), vector.to(device)

    def _noise(self, seed: int) -> Tensor:
        shape = (4, self.size // 8, self.size // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
