"""The run so far, as anyone may read it while the job's thread writes it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..training.trainer import StepEvent
from .sampling import SampleEvent, thumbnail
from .saving import TrainedLoRA

State = Literal["queued", "running", "paused", "finished", "stopped", "failed"]
ENDED: tuple[State, ...] = ("finished", "stopped", "failed")

_LINES = 200  # of the log
_POINTS = 2000  # of the curves of a run that is over


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment: whatever is told of it at once is made from one of these."""

    state: State
    waits: bool
    message: str
    error: BaseException | None
    log: tuple[str, ...]
    result: TrainedLoRA | None
    samples: tuple[SampleEvent, ...]
    events: tuple[StepEvent, ...]


@dataclass
class Progress:
    """One run, earlier parts of it included; written by the job's thread, read by anyone."""

    state: State = "queued"
    step: int = 0
    events: list[StepEvent] = field(default_factory=list)
    samples: list[SampleEvent] = field(default_factory=list)  # the newest last
    message: str = ""  # the latest that a person should know of, such as a resume
    error: BaseException | None = None
    result: TrainedLoRA | None = None
    waits: bool = False  # for a prompt to be done; the state is "running" all the same
    log: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES))
    started: float = 0.0  # Unix time of the job's start; 0 while it is queued
    seconds: float = 0.0  # spent in steps, those before a resume included

    def snapshot(self) -> Snapshot:
        """All of it, each part read once, and what comes last in a run read first.

        A run that waits or is over has no step to come that could be missed, what it says of
        itself is true of its steps, and no picture is of a step after the newest.
        """
        return Snapshot(
            state=self.state,
            waits=self.waits,
            message=self.message,
            error=self.error,
            log=tuple(self.log),
            result=self.result,
            samples=tuple(self.samples),
            events=tuple(self.events),
        )

    def tell(self, text: str, level: int = logging.WARNING) -> None:
        """Say something to whoever watches the run, and in the log."""
        self.message = text
        self.log.append(text)
        logging.log(level, "LoRA²: %s", text)

    def note(self, text: str) -> None:
        """Say something that matters to whoever reads the log."""
        self.log.append(text[:1].upper() + text[1:])
        logging.info("LoRA²: %s", text)

    def add(self, event: StepEvent) -> None:
        """One more finished step."""
        self.events.append(event)
        self.step = event.step
        self.seconds += event.seconds

    def take(self, events: Sequence[StepEvent], step: int) -> None:
        """Become the run that had come to ``step``."""
        self.events[:] = events
        self.step = step
        self.seconds = sum(event.seconds for event in events)

    def slim(self) -> None:
        """Keep of a run that is over what a list of runs shows: curves, not every step's ranks.

        The ranks of the last step stay, and all pictures as thumbnails. Of an error only
        its text stays: wherever it was raised, its frames hold models. The LoRA is in its file.
        """
        if self.error is not None:
            self.error = RuntimeError(str(self.error) or type(self.error).__name__)
        every = max(1, -(-len(self.events) // _POINTS))
        shown = [
            event
            for event in self.events[:-1]
            if event.probe is not None or event.step % every == 0
        ]
        self.events = [replace(event, ranks=()) for event in shown] + self.events[-1:]
        self.samples = [thumbnail(event) for event in self.samples]
        if self.result is not None:
            file = replace(self.result.file, state={})
            self.result = replace(self.result, file=file, events=tuple(self.events))

    def forget_pictures(self) -> None:
        """Keep only the newest pictures."""
        self.samples = self.samples[-1:]
