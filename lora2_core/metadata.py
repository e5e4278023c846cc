"""The metadata of a trained file: ours, kohya's ``ss_*`` and ModelSpec; all strings.

No clock and no path goes in: the same run gives the same bytes, and a shared file tells nothing
about its maker's machine.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence

from .config import TrainConfig

_MODULE = "lora2_core.network"


def describe(
    config: TrainConfig,
    captions: Sequence[str],
    base_hash: str,
    ranks: Sequence[int],
    losses: Sequence[float],
    probes: Sequence[float],
    title: str,
) -> dict[str, str]:
    """Everything a loader, a manager or a person may want to know of a trained file.

    ``losses``: one a step; ``probes``: the loss on fixed noise and timesteps, in order.
    """
    return {
        **_ours(config, base_hash, ranks, losses, probes),
        **_kohya(config, captions, title, len(losses)),
        **_model_spec(config, captions, title),
    }


def _first_and_last(values: Sequence[float]) -> list[float]:
    """Medians of the first and of the last fifth; single steps are too noisy to compare."""
    fifth = max(1, len(values) // 5)
    return [statistics.median(values[:fifth]), statistics.median(values[-fifth:])]


def _ours(
    config: TrainConfig,
    base_hash: str,
    ranks: Sequence[int],
    losses: Sequence[float],
    probes: Sequence[float],
) -> dict[str, str]:
    summary = {"training": _first_and_last(losses)}
    if probes:
        summary["fixed_noise"] = _first_and_last(probes)
    return {
        "lora2.mode": config.rank.mode,
        "lora2.quantile": str(config.rank.quantile),
        "lora2.config": json.dumps(config.as_dict(), sort_keys=True),
        "lora2.base_model_hash": base_hash,
        "lora2.seed": str(config.seed),
        "lora2.steps": str(len(losses)),
        "lora2.loss": json.dumps(summary),
        "lora2.mean_rank": f"{statistics.fmean(ranks):.3f}",
    }


def _kohya(config: TrainConfig, captions: Sequence[str], title: str, steps: int) -> dict[str, str]:
    tags = Counter(tag.strip() for text in captions for tag in text.split(",") if tag.strip())
    frequency = {f"1_{title}": dict(sorted(tags.items()))}
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": _MODULE,
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
        "ss_network_args": json.dumps({"mode": config.rank.mode, "targets": config.targets}),
        "ss_output_name": title,
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": config.schedule,
        "ss_unet_lr": str(config.learning_rate),
        "ss_steps": str(steps),
        "ss_max_train_steps": str(config.steps),
        "ss_optimizer": "torch.optim.adam.Adam",
        "ss_seed": str(config.seed),
        "ss_mixed_precision": {"fp32": "no"}.get(config.precision, config.precision),
        "ss_resolution": f"({config.resolution}, {config.resolution})",
        "ss_batch_size_per_device": str(config.batch_size),
        "ss_num_train_images": str(len(captions)),
        "ss_tag_frequency": json.dumps(frequency, sort_keys=True),
    }


def _model_spec(config: TrainConfig, captions: Sequence[str], title: str) -> dict[str, str]:
    trigger = captions[0] if captions and len(set(captions)) == 1 else ""
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.usage_hint": (
            "Load with any LoRA loader at strength 1. Every layer has a rank of its own."
        ),
    }
    if trigger:
        spec["modelspec.trigger_phrase"] = trigger
    return spec
