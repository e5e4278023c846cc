"""What a training tells: one event a step, or why it cannot go on."""

from __future__ import annotations

from dataclasses import dataclass


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to change."""


@dataclass(frozen=True)
class StepEvent:
    """One finished step. Losses are without the weights of eq. 14, so settings compare."""

    step: int  # 1 … steps
    steps: int
    loss: float  # of the photos: mean squared error, eq. 11, weighted as the task asks
    prior_loss: float  # of the class images; 0 without prior preservation
    entropy: float  # nats, eq. 13; 0 when switched off
    rank_term: float  # as it entered the loss
    gradient: float  # norm of the gradient of A, B and log ν; 0 in fp16
    mean_rank: float  # integer ranks, plain mean
    ranks: tuple[int, ...]
    resized: int  # components whose rank changed after this step
    seconds: float  # of this step
    probe: float | None  # loss on fixed noise and timesteps, when measured after this step
