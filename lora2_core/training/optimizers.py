"""Optimizers of A and B by name, the one of ν, and the schedule of the learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..config.train import OptimizerConfig, TrainConfig

_ONE_KERNEL = ("cpu", "cuda")  # where Adam updates hundreds of small tensors in one call
_OLDEST_EIGHT_BIT = (0, 44)  # before it bitsandbytes kept a scale for 2048 numbers, not for 256


class OptimizerError(ValueError):
    """An optimizer cannot be made; the message says which setting to change."""


def make_optimizer(
    config: OptimizerConfig, groups: Sequence[tuple[Sequence[nn.Parameter], float]]
) -> torch.optim.Optimizer:
    """The optimizer of A and B over groups of (parameters, learning rate).

    ``adamw`` without decay is Adam. ``adamw8bit`` keeps its two moments in 8 bits each, as the
    paper does. ``prodigy`` finds its own step size; its learning rate is a factor, best left at 1.
    Raises OptimizerError when a package is missing or the settings do not go together.
    """
    parts = [{"params": list(weights), "lr": rate} for weights, rate in groups if weights]
    if config.name == "adamw":
        fused = parts[0]["params"][0].device.type in _ONE_KERNEL
        return torch.optim.AdamW(parts, weight_decay=config.weight_decay, fused=fused)
    if config.name == "adamw8bit":
        return _eight_bit(parts, config.weight_decay)
    return _prodigy(parts, config.weight_decay)


def make_nu_optimizer(log_nu: nn.Parameter, learning_rate: float) -> torch.optim.Adam:
    """Adam for ν: faster than A and B, never decayed, always in fp32."""
    return torch.optim.Adam([log_nu], learning_rate, fused=log_nu.device.type in _ONE_KERNEL)


def schedule_factor(config: TrainConfig, step: int) -> float:
    """Share of the learning rate at a step, 1 … ``config.steps``.

    ``cosine`` and ``linear`` fall towards 0. Source: ours; cosine takes higher rates and ends
    nearer to the subject than ``constant`` (docs/method.md).
    """
    rise = min(1.0, step / max(1.0, config.warm_up * config.steps))
    done = (step - 1) / config.steps
    fall = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
    }
    return rise * fall[config.schedule]


def _eight_bit(parts: list[dict], weight_decay: float) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise OptimizerError(
            "optimizer is adamw8bit, which needs the package bitsandbytes: install it into "
            "ComfyUI's Python (pip install bitsandbytes) or choose adamw."
        ) from error
    version = bitsandbytes.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST_EIGHT_BIT:
        raise OptimizerError(
            f"optimizer is adamw8bit, which needs bitsandbytes 0.44 or newer, and {version} is "
            "installed: update it (pip install --upgrade bitsandbytes) or choose adamw."
        )
    return AdamW8bit(parts, weight_decay=weight_decay)


def _prodigy(parts: list[dict], weight_decay: float) -> torch.optim.Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise OptimizerError(
            "optimizer is prodigy, which needs the package prodigyopt: install it into ComfyUI's "
            "Python (pip install prodigyopt) or choose adamw."
        ) from error
    if len({part["lr"] for part in parts}) > 1:
        raise OptimizerError(
            "optimizer is prodigy, which has one learning rate for all: set text_learning_rate to "
            "learning_rate, or choose adamw."
        )
    make: Any = Prodigy  # its annotations take whole numbers only
    return make(parts, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True)
