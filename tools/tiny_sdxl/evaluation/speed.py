"""How long a picture and a training step take."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch

from ....lora2_core.config.ranks import RankConfig
from ....lora2_core.config.train import TrainConfig
from ....lora2_core.tiny_sdxl.model import SIZE
from ....lora2_core.training.trainer import train
from ..world.subjects import SUBJECT_SEEDS, make_subject, subject_views
from .parts import DEMO_SETTINGS, Parts

# Name, mode, rank or target, weight of the entropy.
METHODS = (("fixed-16", "fixed", 16.0, 0.0), ("balanced", "balanced", 8.0, 1e-4))


def speed_figures(
    parts: Parts, samples: int = 5, steps: int = 15, warm_up: int = 3
) -> dict[str, Any]:
    """Return the seconds of a sample with its decoding, and of a LoRA step, medians of several."""
    return {
        "threads": torch.get_num_threads(),
        "sampling steps": parts.sampling.steps,
        "seconds a sample": statistics.median(_sample_seconds(parts, samples)),
        "seconds a LoRA step": {
            name: statistics.median(_step_seconds(parts, config, steps, warm_up))
            for name, config in configs().items()
        },
    }


def configs() -> dict[str, TrainConfig]:
    """Return the trainings whose steps are timed, by name."""
    return {
        name: TrainConfig(
            steps=400,
            learning_rate=4e-3,
            batch_size=2,
            resolution=SIZE,
            entropy_weight=entropy,
            rank=RankConfig.for_mode(mode, target_rank=rank),
            **DEMO_SETTINGS,
        )
        for name, mode, rank, entropy in METHODS
    }


def _sample_seconds(parts: Parts, count: int) -> list[float]:
    """Return the seconds of each of some samples, after one that does not count."""
    painter, seconds = parts.painter(), []
    for seed in range(count + 1):
        started = time.perf_counter()
        painter.paint(["a red striped mug on a sandy beach at sunset"], [seed])
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _step_seconds(parts: Parts, config: TrainConfig, count: int, warm_up: int) -> list[float]:
    """Return the seconds of each of some steps at the start of a training, after a warm-up."""
    views = subject_views(make_subject(SUBJECT_SEEDS[0]), "train", SIZE)
    setup = parts.prepared(views, config)
    events = train(setup.network, setup.task, setup.config, setup.entropy)
    return [event.seconds for event in itertools.islice(events, warm_up, warm_up + count)]
