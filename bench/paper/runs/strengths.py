"""A LoRA at a smaller strength than it was trained to: a given one, or the smallest that would do.

By the rule with which the pack saves a balanced run, on any LoRA file: the loss on fixed draws is
taken with the file applied to the base at several strengths, as a loader applies it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....lora2_core import comfy_host, lora_file
from ....lora2_core.config.train import TrainConfig
from ....lora2_core.resizing.source import LoRASource
from ....lora2_core.training.losses.fixed_noise import FixedNoise
from ....lora2_core.training.losses.strength import STRENGTHS, least_strength
from ....tools.tiny_sdxl.evaluation.parts import Parts
from ....tools.tiny_sdxl.world.subjects import View
from ..methods import Method

_measured: dict[tuple[Path, int], dict[float, float]] = {}  # of files, for rules that differ


def weaken(
    parts: Parts,
    photos: Sequence[View],
    config: TrainConfig,
    method: Method,
    source: Path,
    target: Path,
) -> dict[str, Any]:
    """Write ``source`` at the strength that ``method`` asks for, trained with ``config``."""
    losses: dict[float, float] = {}
    strength = method.strength
    if method.kept < 1:
        losses = on_fixed_noise(parts, photos, config, source)
        strength = least_strength(losses, method.kept)
    with LoRASource(source) as opened:
        found = [opened.component(key) for key in opened.keys]
        metadata = dict(opened.metadata)
    weaker = [dataclasses.replace(one, importance=strength * one.importance) for one in found]
    lora_file.save(target, weaker, metadata)
    ranks = [one.rank for one in lora_file.inspect(target)[0]]
    return {
        "mean_rank": sum(ranks) / len(ranks),
        "megabytes": target.stat().st_size / 1e6,
        "strength": strength,
        "losses": {f"{at:g}": round(loss, 6) for at, loss in losses.items()},
    }


def on_fixed_noise(
    parts: Parts, photos: Sequence[View], config: TrainConfig, file: Path
) -> dict[float, float]:
    """The loss of the base with ``file`` on the photos, by strength."""
    key = file, file.stat().st_mtime_ns
    if key not in _measured:
        _measured[key] = {at: _loss(parts, photos, config, file, at) for at in STRENGTHS}
    return _measured[key]


def _loss(
    parts: Parts, photos: Sequence[View], config: TrainConfig, file: Path, strength: float
) -> float:
    state = lora_file.load(file).state
    model, _ = comfy_host.apply_state(parts.model, parts.clip, state, strength, strength, file.name)
    # New adapters on a copy with the LoRA merged: their B is zero, so that they change nothing.
    setup = dataclasses.replace(parts, model=model).prepared(photos, config)
    loss = FixedNoise(setup.network, setup.task, config.batch_size).loss()
    assert loss is not None, "the demo model leaves room for a forward pass"
    return loss
