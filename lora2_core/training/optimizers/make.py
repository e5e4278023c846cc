"""Optimizers of A and B by name, the one of ν, and the schedule of the learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...config.train import OptimizerConfig, TrainConfig
from ...files.header import first_line
from ..out_of_memory import is_out_of_memory
from .quantized import NUMBERS

_ONE_KERNEL = ("cpu", "cuda")  # where Adam updates hundreds of small tensors in one call
_OLDEST_EIGHT_BIT = (0, 44)  # before it bitsandbytes kept a scale for 2048 numbers, not for 256


_TRIED = (64, 64)  # shape of a weight to try one on: the smallest that 8 bits are used for


class OptimizerError(ValueError):
    """An optimizer cannot be made; the message says which setting to change."""


def check_optimizer(config: TrainConfig, device: torch.device) -> None:
    """Take a step on a weight of our own with the optimizer of ``config``, before any work.

    Raises OptimizerError where its package is missing or does not work on ``device``, and for
    settings that do not go together. A package that can be imported may still know nothing of the
    device, which only a step tells.
    """
    rates = [config.learning_rate, config.text.learning_rate]
    with torch.inference_mode(False):
        groups = [([nn.Parameter(torch.ones(_TRIED, device=device))], r) for r in rates if r]
        optimizer = make_optimizer(config.optimizer, groups)
        for weights, _ in groups:
            weights[0].grad = torch.ones_like(weights[0])
        try:
            optimizer.step()
        except Exception as error:
            if is_out_of_memory(error):  # for so little: what is loaded there will make room
                return
            raise OptimizerError(
                f"optimizer is {config.optimizer.name}, whose package cannot compute on {device} "
                f"({first_line(error)[:200]}): update it, or choose adamw."
            ) from error


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


def block_of(config: OptimizerConfig) -> int:
    """Numbers of a weight that an optimizer remembers together: no two components may share one."""
    return NUMBERS if config.name == "adamw8bit" else 1


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
    except Exception as error:  # one that finds no library of the card may raise anything
        raise _missing("adamw8bit", "bitsandbytes", error) from error
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
    except Exception as error:
        raise _missing("prodigy", "prodigyopt", error) from error
    if len({part["lr"] for part in parts}) > 1:
        raise OptimizerError(
            "optimizer is prodigy, which has one learning rate for all: set text_learning_rate to "
            "learning_rate, or choose adamw."
        )
    make: Any = Prodigy  # its annotations take whole numbers only
    return make(parts, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True)


def _missing(name: str, package: str, error: Exception) -> OptimizerError:
    """What to say of an import that failed: nothing is there, or what is there is broken."""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return OptimizerError(
            f"optimizer is {name}, which needs the package {package}: install it into ComfyUI's "
            f"Python (pip install {package}) or choose adamw."
        )
    return OptimizerError(
        f"optimizer is {name}, and its package {package} is installed but cannot be loaded "
        f"({first_line(error)[:200]}): install it anew (pip install --force-reinstall --no-deps "
        f"{package}) or choose adamw."
    )
