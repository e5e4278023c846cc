"""Train the base model: SDXL's real U-Net and text towers, small, from scratch, on latents."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....lora2_core import comfy_host
from ....lora2_core.tiny_sdxl import model as demo_model
from .run import Run, Schedule
from .words import Tokens, base_caption, vocabulary


@dataclass(frozen=True)
class Recipe:
    """What the base sees."""

    pictures: int = 20_000
    batch: int = 32
    snr_limit: float = 5.0  # min-SNR-γ: steps with little noise count for less
    other_sizes: float = 0.2  # share of samples with another size told, so that none throws it
    seed: int = 0


SCHEDULE = Schedule(steps=9000, learning_rate=1e-3, warm_up=300, average=0.9985)
# For weights that have learnt most already, such as those in the pack.
REFINING = Schedule(steps=2000, learning_rate=3e-4, warm_up=150, average=0.997)


class Base:
    """ComfyUI's SDXL objects in training: U-Net, two towers, and the rows of words that occur."""

    def __init__(self) -> None:
        import comfy.clip_model

        comfy.clip_model.CLIPLayer.forward = _layer_forward
        patcher, clip = comfy_host.build_sdxl(
            demo_model.UNET_CONFIG, demo_model.text_configs(), demo_model.fill_untrained
        )
        self.model: Any = patcher.model
        self.unet: nn.Module = self.model.diffusion_model
        self.towers = {"l": clip.cond_stage_model.clip_l, "g": clip.cond_stage_model.clip_g}
        self.tokens = Tokens(clip.tokenizer)
        self.vocabulary = vocabulary(self.tokens)
        self.place_of = {token: row for row, token in enumerate(self.vocabulary)}
        self.rows = {name: self._rows(tower) for name, tower in self.towers.items()}
        silence_branches(self.unet)

    def _rows(self, tower: Any) -> nn.Parameter:
        table = tower.transformer.get_input_embeddings().weight
        return nn.Parameter(table.detach()[self.vocabulary].clone())  # (words, width)

    def weights(self) -> dict[str, nn.Parameter]:
        """Return all that is trained, by name; the table of all words is not."""
        named = {f"unet.{name}": p for name, p in self.unet.named_parameters()}
        for tower, module in self.towers.items():
            inner = module.transformer
            named |= {
                f"clip_{tower}.{name}": p
                for name, p in inner.named_parameters()
                if "token_embedding" not in name
            }
            named[f"rows_{tower}"] = self.rows[tower]
        for parameter in named.values():
            parameter.requires_grad_(True)
        return named

    def read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return what the U-Net is told of prompts: (n, 77, context) and (n, pooled)."""
        hidden = {}
        pooled = {}
        for name, tower in self.towers.items():
            ids, lengths = self.tokens.rows(texts, name)
            places = ids.apply_(self.place_of.__getitem__)
            _, hidden[name], pooled[name], _ = tower.transformer(
                embeds=self.rows[name][places],
                num_tokens=lengths,
                intermediate_output=tower.layer_idx,
                final_layer_norm_intermediate=False,
            )
        return torch.cat([hidden["l"], hidden["g"]], dim=-1), pooled["g"]

    def describe(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        """Return SDXL's vector: pooled text and six numbers of size, (n, pooled + 6·256)."""
        told = [self.model.embedder(sizes[:, i]) for i in range(6)]
        return torch.cat([pooled, *told], dim=-1)


def _layer_forward(self: Any, x: Tensor, mask: Any = None, optimized_attention: Any = None) -> Any:
    """ComfyUI's text layer without its additions in place, through which no gradient passes."""
    x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
    return x + self.mlp(self.layer_norm2(x))


@torch.no_grad()
def silence_branches(unet: nn.Module) -> None:
    """Let every residual branch start at zero, as diffusion models do."""
    for name, weight in unet.named_parameters():
        if ".out_layers.3." in name or ".proj_out." in name or name.startswith("out.2."):
            weight.zero_()


class Denoising:
    """The loss of a step: tell the noise in latents of captioned scenes."""

    def __init__(self, base: Base, latents: Tensor, recipe: Recipe):
        self.base, self.latents, self.recipe = base, latents, recipe
        self.sigmas: Tensor = base.model.model_sampling.sigmas.float()  # (1000,)

    def loss(self, step: int) -> Tensor:
        """Return the min-SNR-weighted squared error of the noise."""
        batch, unet = self.recipe.batch, self.base.unet
        rng = random.Random(self.recipe.seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(step)
        numbers = [rng.randrange(len(self.latents)) for _ in range(batch)]
        texts = [base_caption(number, rng) for number in numbers]
        latent = self.latents[numbers].float()  # (batch, 4, 24, 24)
        times = torch.randint(len(self.sigmas), (batch,), generator=generator)
        sigma = self.sigmas[times].view(-1, 1, 1, 1)
        noise = torch.randn(latent.shape, generator=generator)
        noised = (latent + sigma * noise) / (sigma.square() + 1).sqrt()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context, pooled = self.base.read(texts)
            vector = self.base.describe(pooled.float(), self._sizes(rng, batch))
            guess = unet(noised, timesteps=times.float(), context=context, y=vector)
        weight = (self.recipe.snr_limit * sigma.square()).clamp(max=1)  # min(SNR, γ) / SNR
        return (weight * (guess.float() - noise).square()).mean()

    def _sizes(self, rng: random.Random, batch: int) -> Tensor:
        """Return height, width, crop's top and left, target height and width; (batch, 6)."""
        rows = []
        for _ in range(batch):
            other = rng.random() < self.recipe.other_sizes
            side = rng.randrange(64, 1025) if other else demo_model.SIZE
            rows.append([side, side, 0, 0, side, side])
        return torch.tensor(rows, dtype=torch.float32)


def weights_of_the_pack() -> dict[str, Tensor]:
    """Return what the pack's base has learnt, by the names of :meth:`Base.weights`."""
    weights = demo_model.read_weights()
    return {n: v for n, v in weights.items() if n != "words" and not n.startswith("vae.")}


def train(
    file: Path,
    latents: Tensor,
    schedule: Schedule = SCHEDULE,
    recipe: Recipe = Recipe(),
    start: Mapping[str, Tensor] | None = None,
) -> None:
    """Train to the end of the schedule, from where ``file`` stopped.

    A new run begins with fresh weights, or with those of ``start``, by the names of
    :meth:`Base.weights`.
    """
    base = Base()
    weights = base.weights()
    for name, value in (start or {}).items():
        weights[name].data.copy_(value)
    run = Run(weights, schedule, file)
    run.train(Denoising(base, latents, recipe).loss)
