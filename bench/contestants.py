"""One training step each: ours in its variants, a frozen floor, PEFT, and ComfyUI's own trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from lora2_pack.bench.peft_lora import inject
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.adaptive_rank import denoising_loss
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.data.photos import Photo
from lora2_pack.lora2_core.tiny_sdxl.model import (
    SIZE,
    UNET_CONFIG,
    autoencoder_weights,
    fill_seeded,
    fill_trained,
    text_configs,
)
from lora2_pack.lora2_core.training.objective import CrossAttentionEntropy, Prediction
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.lora2_core.training.trainer import Trainer, train
from torch import Tensor, nn

RANK, BATCH, STEPS = 16, 2, 10_000  # the run is never finished: only its steps are timed
RATE = 1e-4
WIDTH, HEADS, CONTEXT, TOKENS, TEXT = 1280, 20, 2048, 256, 77  # SDXL's inner blocks at 512 px
Step = Callable[[], Any]


def demo_parts() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the demo."""
    with torch.inference_mode():
        model, clip = comfy_host.build_sdxl(UNET_CONFIG, text_configs(), fill_trained)
        return model, clip, comfy_host.build_autoencoder(autoencoder_weights())


def photos() -> list[Photo]:
    """Six pictures of noise: what they show costs nothing."""
    generator = torch.Generator().manual_seed(0)
    size = SIZE
    return [
        Photo(torch.rand(size, size, 3, generator=generator), "a photo of sks cat")
        for _ in range(6)
    ]


def config(mode: str = "balanced", **changes: Any) -> TrainConfig:
    """The settings of every variant of ours; fp32, as CPUs train."""
    rank = RankConfig.for_mode(mode, target_rank=float(RANK))
    settings = {"steps": STEPS, "learning_rate": RATE, "batch_size": BATCH, "probes": 0}
    common = {"resolution": SIZE, "precision": "fp32", "rank": rank, "kept_gain": 1.0}
    return TrainConfig(**{**settings, **common, **changes})


def ours(parts: tuple[Any, Any, Any], settings: TrainConfig) -> Step:
    """A step of the pack's trainer on a private copy of the demo model."""
    return prepared(parts, settings)[1]


def prepared(parts: tuple[Any, Any, Any], settings: TrainConfig) -> tuple[TrainingSetup, Step]:
    """A training of the pack, and a step of it."""
    setup = comfy_host.prepare_training(*parts, photos(), settings)
    run = train(setup.network, setup.task, setup.config, setup.entropy)
    return setup, lambda: next(run)


def floor(parts: tuple[Any, Any, Any], precision: str = "fp32") -> Step:
    """Forward and backward to the latent through the frozen model; nothing is learnt."""
    task, _ = _task(parts, precision)
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        batch = task.draw(generator, BATCH)
        latent = [_requiring_grad(sample) for sample in batch.samples]
        said = task.predict(type(batch)(tuple(latent), batch.texts, batch.sigma, batch.noise))
        denoising_loss(said.value, said.target).backward()

    return step


def peft_lora(parts: tuple[Any, Any, Any], precision: str = "fp32") -> Step:
    """PEFT's LoRA of the same rank on the same layers, with the same optimizer."""
    task, unet = _task(parts, precision)
    adapters = inject(unet, RANK)
    optimizer = torch.optim.AdamW(adapters, RATE, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        said = task.predict(task.draw(generator, BATCH))
        denoising_loss(said.value, said.target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Blocks(nn.Module):
    """Two transformer blocks of SDXL's width, of ComfyUI's class, frozen."""

    def __init__(self) -> None:
        super().__init__()
        operations: Any = comfy.ops.disable_weight_init
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                WIDTH, HEADS, WIDTH // HEADS, context_dim=CONTEXT, operations=operations
            )
            for _ in range(2)
        )
        fill_seeded(self, seed=3)
        self.requires_grad_(False)
        plain = lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)  # noqa: E731
        self.options = {"optimized_attention_override": plain}

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, context, dict(self.options))
        return x


class BlocksTask:
    """Noise in, noise to be said: (1, 256, 1280) with a context of (1, 77, 2048)."""

    def __init__(self, model: Blocks):
        self.model = model

    def draw(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
        x, target = (torch.randn(size, TOKENS, WIDTH, generator=generator) for _ in range(2))
        return x, torch.randn(size, TEXT, CONTEXT, generator=generator), target

    def spread(self, generator: torch.Generator, count: int, size: int) -> list[Any]:
        return [self.draw(generator, size) for _ in range(count // size)]

    def predict(self, batch: tuple[Tensor, Tensor, Tensor]) -> Prediction:
        x, context, target = batch
        return Prediction(self.model(x, context), target)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        assert state == {}


def wide_trainer(settings: TrainConfig, model: Blocks) -> Trainer:
    """The trainer on the two blocks."""
    network = AdaptiveRankNetwork(model, find_targets(model), settings.rank, 0)
    cross = CrossAttentionEntropy([block.attn2 for block in model.blocks])
    return Trainer(network, BlocksTask(model), settings, cross)


def wide_ours(settings: TrainConfig) -> Step:
    """A step of the trainer on the two blocks."""
    run = wide_trainer(settings, Blocks()).run()
    return lambda: next(run)


def wide_floor() -> Step:
    """Forward and backward to x through the two blocks."""
    task = BlocksTask(Blocks())
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        x, context, target = task.draw(generator, 1)
        said = task.predict((x.requires_grad_(), context, target))
        denoising_loss(said.value, said.target).backward()

    return step


def run_train_lora_node(
    parts: tuple[Any, Any, Any],
    steps: int,
    checkpointing: bool,
    between: Callable[[], None],
    precision: str = "fp32",
) -> None:
    """ComfyUI's TrainLoraNode does ``steps`` steps of its own; ``between`` is called before each.

    Its loop is inside the node: what it iterates over is replaced, and nothing else.
    """
    node: Any = importlib.import_module("comfy_extras.nodes_train")
    latents, positive = _encoded(parts)
    original = node.trange
    node.trange = lambda total, **_: _Range(total, between)
    settings: dict[str, Any] = {
        "batch_size": BATCH,
        "steps": steps,
        "grad_accumulation_steps": 1,
        "learning_rate": RATE,
        "rank": RANK,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": precision,
        "lora_dtype": "fp32",
        "algorithm": "LoRA",
        "gradient_checkpointing": checkpointing,
        "existing_lora": "[None]",
    }
    # What newer versions ask for too (buckets, offloading, depth of checkpoints, ...).
    schema = node.TrainLoraNode.define_schema()
    given = {*settings, "model", "latents", "positive"}
    settings |= {more.id: more.default for more in schema.inputs if more.id not in given}
    try:
        with torch.inference_mode():  # as ComfyUI runs every node
            node.TrainLoraNode.execute(
                model=[parts[0]],
                latents=[{"samples": latent[None]} for latent in latents],
                positive=[positive],
                **{name: [value] for name, value in settings.items()},
            )
    finally:
        node.trange = original


class _Range:
    """Counts as tqdm's trange does, and lets others run before each number."""

    def __init__(self, total: int, between: Callable[[], None]):
        self.total, self.between = total, between

    def __iter__(self) -> Iterator[int]:
        for number in range(self.total):
            self.between()
            yield number
        self.between()

    def set_postfix(self, *_: Any) -> None:
        """What the progress bar would show."""


def _encoded(parts: tuple[Any, Any, Any]) -> tuple[Tensor, list[Any]]:
    """Latents and CONDITIONING of the photos, as ComfyUI's own nodes make them."""
    _, clip, vae = parts
    with torch.inference_mode():
        pixels = torch.stack([photo.pixels for photo in photos()])
        tokens = clip.tokenize(photos()[0].caption)
        return vae.encode(pixels), clip.encode_from_tokens_scheduled(tokens)


def _task(parts: tuple[Any, Any, Any], precision: str) -> tuple[Any, nn.Module]:
    """The pack's task on a frozen copy of the model without adapters, and that copy's U-Net."""
    setup = comfy_host.prepare_training(*parts, photos(), config())
    private = comfy_host.private_copy(parts[0], precision)
    setup.task.model = private
    return setup.task, private.diffusion_model


def _requiring_grad(sample: Any) -> Any:
    latent = sample.latent.clone().requires_grad_()
    return type(sample)(latent, sample.sizes, sample.captions)
