"""PEFT's AdaLoRA and DoRA on the same layers, photos, noise, batches and schedule as ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ....lora2_core import comfy_host
from ....lora2_core.adapters.targets import PRESETS
from ....lora2_core.adaptive_rank import denoising_loss
from ....lora2_core.files.encode import kohya_key
from ....lora2_core.training.optimizers.make import schedule_factor
from ....lora2_core.training.trainer import _NOISE_SEED
from ....tools.tiny_sdxl.evaluation.parts import Parts
from ....tools.tiny_sdxl.world.subjects import View
from ..methods import Method

ADAPTER = "default"
ORTHOGONAL = 0.5  # AdaLoRA's own weight of its regulariser


def train(
    parts: Parts, photos: Sequence[View], method: Method, config: Any, file: Path
) -> dict[str, float]:
    """Train a rival, write its LoRA, and return what it took."""
    task, unet = clean_task(parts, photos, config)
    allocate = _inject(unet, method, config)
    weights = [p for name, p in unet.named_parameters() if _learns(name)]
    for weight in weights:
        weight.data = weight.data.float()  # PEFT makes them in the base's precision
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, config.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed ^ _NOISE_SEED)
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(1, config.steps + 1):
        factor = schedule_factor(config, step)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        said = task.predict(task.draw(generator, config.batch_size))
        loss = denoising_loss(said.value, said.target)
        (loss + _regulariser(unet, method)).backward()
        optimizer.step()
        allocate(step)  # reads the gradients
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    seconds = time.perf_counter() - started
    ranks = write(unet, method, file)
    last = losses[-max(1, len(losses) // 5) :]
    return {
        "loss": sum(last) / len(last),
        "mean_rank": sum(ranks) / len(ranks),
        "megabytes": file.stat().st_size / 1e6,
        "seconds": seconds,
    }


def clean_task(parts: Parts, photos: Sequence[View], config: Any) -> tuple[Any, nn.Module]:
    """The pack's task on a frozen copy of the model without adapters, and that copy's U-Net."""
    setup = parts.prepared(photos, config)
    private = comfy_host.private_copy(parts.model, config.precision)
    setup.task.model = private
    return setup.task, private.diffusion_model


def _inject(unet: nn.Module, method: Method, config: Any) -> Callable[[int], None]:
    """Put adapters in; returns what is to be told of every step after its gradients."""
    from peft import AdaLoraConfig, LoraConfig, inject_adapter_in_model
    from peft.tuners.adalora import AdaLoraModel

    pattern = ".*" + PRESETS["attention"]
    torch.manual_seed(config.seed)
    if method.mode == "dora":
        rank = method.rank["r"]
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern, use_dora=True)
        inject_adapter_in_model(settings, unet)
        return lambda step: None
    first, last = method.rank["init_r"], method.rank["target_r"]
    steps = config.steps
    settings = AdaLoraConfig(
        init_r=first, target_r=last, lora_alpha=first, target_modules=pattern,
        tinit=steps // 10, tfinal=steps // 5, deltaT=max(1, steps // 100), total_step=steps,
        orth_reg_weight=ORTHOGONAL,
    )  # fmt: skip
    return AdaLoraModel(unet, settings, ADAPTER).update_and_allocate


def _learns(name: str) -> bool:
    return any(part in name for part in ("lora_A", "lora_B", "lora_E", "lora_magnitude"))


def _regulariser(unet: nn.Module, method: Method) -> Tensor | float:
    """AdaLoRA's: how far A's rows and B's columns are from being orthonormal, mean over all."""
    if method.mode != "adalora":
        return 0.0
    squares = []
    for name, weight in unet.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = weight @ weight.T if "lora_A" in name else weight.T @ weight
            squares.append((square - torch.eye(len(square), device=square.device)).norm())
    return ORTHOGONAL * torch.stack(squares).mean()


@torch.no_grad()
def write(unet: nn.Module, method: Method, file: Path) -> list[int]:
    """Write what was learnt as any loader reads it; returns the ranks."""
    key, state, ranks = kohya_key, dict[str, Tensor](), list[int]()
    for name, layer in unet.named_modules():
        if ADAPTER not in getattr(layer, "lora_A", {}):
            continue
        down, up = (_weight(getattr(layer, part)[ADAPTER]) for part in ("lora_A", "lora_B"))
        layer: Any
        if method.mode == "adalora":
            values = layer.lora_E[ADAPTER][:, 0]  # (rank,), 0 where it was taken away
            scale = layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)
            kept = values.nonzero()[:, 0]
            down, up = down[kept] * values[kept, None] * scale, up[:, kept]
        ranks.append(len(down))
        if not len(down):
            continue
        # Alpha 1 as in our own files, so that no reader can take it for another.
        root, side = key(name), len(down) ** 0.5
        state[f"{root}.lora_down.weight"] = (down * side).half().contiguous()
        state[f"{root}.lora_up.weight"] = (up * side).half().contiguous()
        state[f"{root}.alpha"] = torch.tensor(1.0)
        if method.mode == "dora":
            # In fp32: rounding these would round the base's own weights.
            magnitude = _weight(layer.lora_magnitude_vector[ADAPTER])  # (out,)
            state[f"{root}.dora_scale"] = magnitude[:, None].contiguous()  # (out, 1)
    save_file(state, file)
    return ranks


def _weight(part: Any) -> Tensor:
    return (part if isinstance(part, Tensor) else part.weight).detach().float()
