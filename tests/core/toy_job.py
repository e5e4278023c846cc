"""A real training job that takes a second: photos of two shapes, class images, empty captions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import (
    KeepConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from lora2_pack.lora2_core.data.samples import SampleOrder
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.jobs.sampling import StripFile
from lora2_pack.lora2_core.reports.strip import strip_png
from lora2_pack.lora2_core.training.objective import Prediction
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.tests.core import toy
from torch import Tensor

_OF_THE_SETUP = {"captions", "base_hash", "data_hash", "data_parts", "enable_checkpointing"}
LENGTHS = (6, 4, 6, 4, 6)  # tokens of each photo: two shapes that no batch mixes


class PhotosTask(toy.TransformerTask):
    """Five fixed inputs in shuffled order, noise on them, a tenth of them with an empty context."""

    def __init__(self, model: toy.Transformer):
        super().__init__(model)
        width = self.matrix.shape[0]
        self.photos = [toy.noise(n, width, seed=seed) for seed, n in enumerate(LENGTHS)]
        self.classes = [toy.noise(6, width, seed=20 + n) for n in range(3)]
        self.context = toy.noise(5, self.context_width, seed=30)
        self.order = SampleOrder([tuple(photo.shape) for photo in self.photos])
        self.class_order = SampleOrder([(6, width)] * len(self.classes))
        self.before_draw: Callable[[], None] = lambda: None

    def draw(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor, int]:
        self.before_draw()
        rows = [self.photos[n] for n in self.order.draw(generator, size)]
        extra = 0
        if rows[0].shape == self.classes[0].shape:
            rows += [self.classes[n] for n in self.class_order.draw(generator, size)]
            extra = size
        x = torch.stack(rows)
        x = x + 0.3 * torch.randn(x.shape, generator=generator)
        kept = torch.rand(len(rows), 1, 1, generator=generator) >= 0.1
        return x, kept * self.context.expand(len(rows), -1, -1), extra

    def spread(self, generator: torch.Generator, count: int, size: int) -> list[Any]:
        context = self.context.expand(1, -1, -1)
        return [(self.photos[n % len(self.photos)][None], context, 0) for n in range(count)]

    def predict(self, batch: Any) -> Prediction:
        x, context, extra = batch
        return Prediction(self.model(x, context), x @ self.matrix, class_images=extra)

    def state(self) -> dict[str, Any]:
        return {"photos": self.order.state(), "classes": self.class_order.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.order.load_state(state["photos"])
        self.class_order.load_state(state["classes"])


class ToyPainter:
    """What the model makes of noise of its own, as a picture; counts and may fail."""

    def __init__(self, model: toy.Transformer):
        self.model, self.painted = model, 0
        self.before: Callable[[], None] = lambda: None

    @torch.no_grad()
    def paint(
        self,
        prompts: Sequence[str],
        seed: int,
        size: tuple[int, int],
        steps: int,
        guidance: float,
    ) -> Tensor:
        self.before()
        self.painted += len(prompts)
        width, context_width = 16, 12
        found = [
            self.model(
                toy.noise(1, 6, width, seed=seed), toy.noise(1, 5, context_width, seed=len(text))
            )
            for text in prompts
        ]
        noise = torch.cat(found)[:, None].sigmoid()  # (n, 1, 6, width)
        picture = torch.nn.functional.interpolate(noise, size[::-1])  # (n, 1, height, width)
        return picture.movedim(1, -1).expand(-1, -1, -1, 3)


def config(steps: int = 24, **changes: Any) -> TrainConfig:
    """Settings under which ranks move, averages are kept and two batches make a step."""
    keep = KeepConfig(checkpoint_steps=3, checkpoint_minutes=0)
    settings: dict[str, Any] = {
        "steps": steps,
        "learning_rate": 1e-2,
        "batch_size": 2,
        "resolution": 64,
        "precision": "fp32",
        "entropy_weight": 0.0,
        "probes": 4,
        "seed": 5,
        "schedule": "cosine",
        "rank": RankConfig.balanced(target_rank=3.0, max_rank=8, rank_learning_rate=0.1),
        "optimizer": OptimizerConfig(ema=0.9, accumulation=2, clip_norm=1.0),
        "keep": keep,
    }
    return TrainConfig(**{**settings, **changes})


def job(path: Path, settings: TrainConfig, width: int = 16, **options: Any) -> TrainingJob:
    """A job on a new model, ``width`` wide, with its checkpoints beside ``path``."""
    if strip := options.pop("strip_path", None):
        options["strip"] = StripFile(strip, strip_png)
    torch.set_num_threads(1)
    model = toy.Transformer(width=width)
    targets = find_targets(model, settings.targets)
    network = AdaptiveRankNetwork(model, targets, settings.rank, settings.seed)
    painter = ToyPainter(model) if settings.samples.prompts else None
    of_the_setup = {name: options.pop(name) for name in _OF_THE_SETUP & options.keys()}
    defaults = {"captions": ("a cat", "a dog"), "base_hash": "b", "data_hash": "d"}
    setup = TrainingSetup(
        settings,
        network,
        PhotosTask(model),
        entropy=None,
        painter=painter,
        **{**defaults, **of_the_setup},
    )
    return TrainingJob(setup, path, checkpoints=path.parent / "checkpoints", **options)


def setup_of(found: TrainingJob) -> TrainingSetup:
    """What a job that is not over yet trains."""
    assert found.setup is not None
    return found.setup


def task_of(found: TrainingJob) -> PhotosTask:
    task = setup_of(found).task
    assert isinstance(task, PhotosTask)
    return task


def painter_of(found: TrainingJob) -> ToyPainter:
    painter = setup_of(found).painter
    assert isinstance(painter, ToyPainter)
    return painter


def prompts(*texts: str, every: int = 8) -> SampleConfig:
    return SampleConfig(prompts=texts, every=every, steps=2)


def at_draw(found: TrainingJob, number: int, act: Callable[[], None]) -> TrainingJob:
    """``act()`` in the job's thread before its draw of this number, 1 for the first."""
    left = [number]

    def before_draw() -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    task_of(found).before_draw = before_draw
    return found


def finish(found: TrainingJob) -> TrainingJob:
    """Run a job to its end and raise what ended it."""
    found.start()
    assert found.wait(120)
    assert not [t for t in threading.enumerate() if t is found._thread]
    if found.progress.error is not None:
        raise found.progress.error
    return found
