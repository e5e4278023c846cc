"""Pictures from a model in training, through ComfyUI's own schedule and sampler.

Nothing here is known to ComfyUI's memory management, reads its Cancel on purpose, or draws from a
global generator: a training thread may paint while prompts run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_base
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..training.denoising import TextSource
from ..training.out_of_memory import is_out_of_memory
from . import surface
from .copies.structure import copied
from .copies.weights import Weights
from .errors import HostError

SAMPLER, SCHEDULER = "dpmpp_2m", "karras"
_PIXELS = 8  # of a picture, along each side of one value of a latent


class Painter:
    """Paints prompts with a private model as it is at that moment, adapters and all.

    ``model``: the private copy of ComfyUI's BaseModel. ``vae``: the user's, whose network is
    copied here, once; a node calls this, so that no prompt uses the VAE meanwhile.
    """

    def __init__(self, model: comfy.model_base.BaseModel, vae: Any, texts: TextSource):
        surface.need(surface.Part.PAINTING)
        self.model, self.texts = model, texts
        self.device = next(model.diffusion_model.parameters()).device
        self._decoder = _Decoder(vae)

    @torch.no_grad()  # not inference mode: training goes on with the very same adapters
    def paint(
        self,
        prompts: Sequence[str],
        seed: int,
        size: tuple[int, int],
        steps: int,
        guidance: float,
    ) -> Tensor:
        """One picture a prompt, all from the noise of ``seed``: (n, height, width, 3), 0 to 1.

        ``size``: (width, height) in px, multiples of 8. ``guidance``: classifier-free, away from
        the empty prompt; 1 leaves the prompt alone. Importances must be up to date. On the CPU,
        fp32. Raises ValueError for a size that no latent has.
        """
        width, height = size
        if min(size) < _PIXELS or width % _PIXELS or height % _PIXELS:
            raise ValueError(f"size is {width}×{height}; use multiples of {_PIXELS} px.")
        latents = [self._sample(prompt, seed, size, steps, guidance) for prompt in prompts]
        # One at a time, with the model's activations gone: decoding is what takes most memory.
        pictures = [self._decoder.decode(latent, self.device) for latent in latents]
        return torch.cat(pictures) if pictures else torch.zeros(0, height, width, 3)

    def _sample(
        self, prompt: str, seed: int, size: tuple[int, int], steps: int, guidance: float
    ) -> Tensor:
        """A latent as ComfyUI passes it on, (1, 4, height / 8, width / 8)."""
        sampling = self.model.model_sampling
        sigmas = comfy.samplers.calculate_sigmas(sampling, SCHEDULER, steps).to(self.device)
        # As KSampler draws it, but not from the global generator.
        generator = torch.Generator().manual_seed(seed)
        shape = (1, 4, size[1] // _PIXELS, size[0] // _PIXELS)
        noise = torch.randn(shape, generator=generator).to(self.device)
        start = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
        sampler = getattr(comfy.k_diffusion.sampling, f"sample_{SAMPLER}")
        latent = sampler(self._guided(prompt, size, guidance), start, sigmas, disable=True)
        latent = sampling.inverse_noise_scaling(sigmas[-1], latent)
        return self.model.process_latent_out(latent)

    def _guided(self, prompt: str, size: tuple[int, int], guidance: float) -> Any:
        """The denoiser of a prompt, guided away from the empty one."""
        texts = [prompt] if guidance == 1 else [prompt, ""]
        context, pooled = (part.to(self.device) for part in self.texts.read(texts))
        vector: Any = self.model.encode_adm(
            pooled_output=pooled, width=size[0], height=size[1], device=self.device
        )

        def denoise(latent: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            count = len(texts)
            found = self.model.apply_model(
                latent.repeat(count, 1, 1, 1),
                sigma.repeat(count),
                c_crossattn=context,
                y=vector,
                transformer_options={},
            )
            with_prompt, without = found[:1], found[-1:]
            return without + guidance * (with_prompt - without)

        return denoise


class _Decoder:
    """A copy of a VAE's network, in RAM but while it decodes."""

    @torch.inference_mode(False)  # where a node may be; such tensors could not be moved later
    def __init__(self, vae: Any):
        vae.throw_exception_if_invalid()
        weights = Weights(vae.patcher, "vae")
        self._network = copied(vae.first_stage_model, weights, "", vae.vae_dtype)
        self._dtype = vae.vae_dtype
        self._finish = vae.process_output
        self._growth = vae.upscale_ratio

    def decode(self, latent: Tensor, device: torch.device) -> Tensor:
        """(1, 4, h, w) → (1, 8·h, 8·w, 3), 0 to 1, on the CPU; tile by tile if it does not fit."""
        try:
            self._network.to(device)
            try:
                pixels = self._pixels(latent)
            except Exception as error:  # each backend has its own for what lacks memory
                if not is_out_of_memory(error):
                    raise
                pixels = None
            if pixels is None:  # outside of the handler, which holds what had been computed
                pixels = self._tiled(latent)
        finally:
            self._network.to("cpu")
        # A clone: newer versions finish in place, and what tiles give is of inference mode.
        pixels = self._finish(pixels.clone()).movedim(1, -1)  # (1, height, width, 3)
        if not pixels.isfinite().all():
            raise HostError(
                "vae painted values that are not finite; SDXL's own VAE overflows in fp16: start "
                "ComfyUI with --fp32-vae or load the fp16-fix VAE."
            )
        return pixels.clamp(0, 1)

    def _pixels(self, latent: Tensor) -> Tensor:
        device = next(self._network.parameters()).device
        return self._network.decode(latent.to(device, self._dtype)).float().cpu()

    def _tiled(self, latent: Tensor) -> Tensor:
        return comfy.utils.tiled_scale(
            latent.cpu(), self._pixels, upscale_amount=self._growth, output_device="cpu"
        )
