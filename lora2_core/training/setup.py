"""What a run trains, whole: model, task and settings, ready for a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..adapters.network import AdaptiveRankNetwork
from ..config.train import TrainConfig
from .estimate import Estimate
from .objective import CrossAttentionEntropy
from .task import Task


class Painter(Protocol):
    """Paints prompts with the model in training; see comfy_host.painting."""

    def paint(
        self,
        prompts: Sequence[str],
        seed: int,
        size: tuple[int, int],
        steps: int,
        guidance: float,
    ) -> Tensor: ...


@dataclass(frozen=True)
class TrainingSetup:
    """Everything a run needs, none of it shared with the user's own model."""

    config: TrainConfig  # as asked, with the precision that ``auto`` came to
    network: AdaptiveRankNetwork
    task: Task
    entropy: CrossAttentionEntropy | None
    captions: tuple[str, ...] = ()  # of the photos
    base_hash: str = ""
    data_hash: str = ""  # changes with any photo, caption, mask, class image, VAE, CLIP or sampling
    data_parts: Mapping[str, str] = field(default_factory=dict)  # a digest of each kind of these
    painter: Painter | None = None  # of validation samples; None when none is asked for
    checkpointing: bool = False  # whether every block is computed twice already
    enable_checkpointing: Callable[[], None] | None = None  # for a run that is short of memory
    estimate: Estimate | None = None  # of memory, time and file size; None where it cannot be told
