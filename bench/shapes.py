"""SDXL's real shapes without data: a step of each contestant on meta tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lora2_pack.bench.paper.bases.family import on_meta
from lora2_pack.bench.peft_lora import inject
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.adaptive_rank import denoising_loss
from lora2_pack.lora2_core.comfy_host.checkpointing import checkpoint_blocks
from lora2_pack.lora2_core.comfy_host.models import keep_less
from lora2_pack.lora2_core.config.train import OptimizerConfig, TrainConfig
from lora2_pack.lora2_core.data.samples import Sample, Text
from lora2_pack.lora2_core.training.denoising import CachedTexts, DenoisingTask
from lora2_pack.lora2_core.training.objective import CrossAttentionEntropy
from lora2_pack.lora2_core.training.trainer import Trainer
from torch import Tensor, nn

Step = Callable[[], Any]
META = torch.device("meta")


class OneKernel:
    """AdamW as a card steps it, all weights at once; on meta tensors PyTorch has no such thing.

    ``moment``: bytes of each of its two moments a number.
    """

    def __init__(self, weights: Iterable[nn.Parameter], moment: int = 4):
        self.weights = [weight for weight in weights if weight.requires_grad]
        kind = {4: torch.float32, 1: torch.uint8}[moment]
        self.moments = [
            [torch.zeros_like(weight, dtype=kind) for weight in self.weights] for _ in range(2)
        ]
        self.steps = [torch.zeros((), device=META) for _ in self.weights]

    def step(self) -> None:
        torch._foreach_add_(self.steps, 1)
        if self.moments[0][0].dtype == torch.uint8:
            for weight in self.weights:  # bitsandbytes: one call a tensor
                weight.data.add_(0)
        else:
            gradients = [weight.grad for weight in self.weights]
            torch._fused_adamw_(
                self.weights, gradients, *self.moments, [], self.steps,
                lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8,
                amsgrad=False, maximize=False,
            )  # fmt: skip


def model_of(name: str, precision: torch.dtype) -> Any:
    """The BaseModel of a member of the family, frozen."""
    base = on_meta(name, precision)
    base.diffusion_model.requires_grad_(False)
    return base


def task_of(base: Any, config: TrainConfig) -> DenoisingTask:
    """One photo of the configuration's size, and a text of 77 tokens."""
    side = config.resolution // 8
    sample = Sample(torch.zeros(4, side, side), torch.zeros(1536), ("",))
    texts = CachedTexts({"": Text(torch.zeros(77, 2048), torch.zeros(1280))}, META)
    options = {"optimized_attention_override": _flash}
    task = DenoisingTask(base, [sample], texts, options, "EPS", config)
    base.to("meta")  # the noise schedule too, now that the task has read it
    return task


def floor(base: Any, config: TrainConfig) -> Step:
    """Forward and backward to the latent through the frozen model; nothing is learnt."""
    task = task_of(base, config)
    if config.gradient_checkpointing:
        checkpoint_blocks(base.diffusion_model)

    def step() -> None:
        batch = task.draw(torch.Generator(), config.batch_size)
        samples = [dataclasses.replace(s, latent=_learning(s.latent)) for s in batch.samples]
        said = task.predict(dataclasses.replace(batch, samples=tuple(samples)))
        denoising_loss(said.value, said.target).backward()

    return step


def ours(base: Any, config: TrainConfig) -> tuple[AdaptiveRankNetwork, Step, list[Tensor]]:
    """A step of the pack's trainer, but for what it reads on the host; and its moments."""
    keep_less(base)
    unet = base.diffusion_model
    network = AdaptiveRankNetwork(unet, find_targets(unet, config.targets), config.rank)
    cross = CrossAttentionEntropy([m for n, m in unet.named_modules() if n.endswith(".attn2")])
    plain = dataclasses.replace(config, optimizer=OptimizerConfig())
    trainer = Trainer(network, task_of(base, config), plain, cross)
    if config.gradient_checkpointing:
        checkpoint_blocks(unet, entropy=cross)
    moment = 1 if config.optimizer.name == "adamw8bit" else 4
    optimizer, of_nu = OneKernel(network.weights(), moment), OneKernel([network.log_nu])

    def step() -> None:
        terms = trainer._backward()
        network.let_go()
        torch.cat([torch.stack(terms), network.log_nu.detach()])
        optimizer.step()
        if network.log_nu.grad is not None:
            of_nu.step()
        trainer._zero_grad()
        network.clamp_nu()

    return network, step, [moment for side in optimizer.moments for moment in side]


def peft_lora(base: Any, config: TrainConfig) -> Step:
    """PEFT's LoRA of the same rank on the same layers, with the same optimizer."""
    unet = base.diffusion_model
    adapters = inject(unet, int(config.rank.target_rank), config.targets)
    task, optimizer = task_of(base, config), OneKernel(adapters)
    if config.gradient_checkpointing:
        checkpoint_blocks(unet)

    def step() -> None:
        said = task.predict(task.draw(torch.Generator(), config.batch_size))
        denoising_loss(said.value, said.target).backward()
        optimizer.step()
        for parameter in adapters:
            parameter.grad = None

    return step


def _flash(_: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, **__: Any) -> Tensor:
    """Attention as a card computes it. Without a device PyTorch takes the way that keeps maps."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return found.transpose(1, 2).flatten(2)


def _learning(latent: Tensor) -> Tensor:
    return latent.detach().clone().requires_grad_()
