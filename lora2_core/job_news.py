"""What is new of a job since it was last told: the event that goes to every open screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import job_view
from .job_queue import Entry
from .job_view import Host
from .job_watch import JobWatch

EVENT = "lora2.progress"


@dataclass(frozen=True)
class Told:
    """What the screens know of a job by now."""

    step: int = 0
    ranks: tuple[int, ...] = ()
    sample: int = 0  # the step of the newest pictures


def news(
    entry: Entry, watch: JobWatch, position: int | None, host: Host, told: Told
) -> tuple[dict[str, Any], Told]:
    """The event of a job, and what is told with it."""
    short = job_view.summary(entry, watch, position, host)
    curves = watch.curves_now(after=told.step)
    ranks = watch.look().ranks
    samples = list(entry.job.progress.samples)
    newest = samples[-1].step if samples else 0
    event: dict[str, Any] = {
        "job": short,
        "points": job_view.points(curves),
        "sample": newest if newest > told.sample else None,
    }
    if ranks and ranks != told.ranks:
        event["ranks"] = list(ranks)
    step = curves.steps[-1] if curves.steps else told.step
    return event, Told(step, ranks or told.ranks, max(newest, told.sample))
