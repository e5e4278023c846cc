"""PEFT's LoRA on the layers that ours adapts, for whoever compares."""

from __future__ import annotations

from lora2_pack.lora2_core.adapters.targets import PRESETS
from torch import nn


def inject(unet: nn.Module, rank: int, targets: str = "attention") -> list[nn.Parameter]:
    """Put PEFT's adapters on the layers of a preset of ours; returns A and B, which learn.

    Raises ImportError where PEFT is missing.
    """
    from peft import LoraConfig, inject_adapter_in_model

    pattern = ".*" + PRESETS[targets]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), unet)
    weights = [weight for name, weight in unet.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.requires_grad_(True)
    return weights
