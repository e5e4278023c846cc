"""One training run in a thread of its own: started, watched, stopped, and always saved.

Whatever ends a run after its first step, be it the last step, a stop or an error, the LoRA as of
the last complete step is written before the job is over.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from . import lora_file, metadata
from .config import TrainConfig
from .lora_file import ComponentInfo
from .network import AdaptiveRankNetwork
from .objective import CrossAttentionEntropy
from .report import TrainingHistory
from .trainer import StepEvent, Task, Trainer

State = Literal["queued", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrainedLoRA:
    """What a run leaves behind; the value of the LORA2 socket."""

    path: Path
    file: lora_file.LoRAFile  # exactly what was written
    components: tuple[ComponentInfo, ...]
    history: TrainingHistory


@dataclass
class Progress:
    """The run so far; written by the job's thread, read by anyone."""

    state: State = "queued"
    step: int = 0
    events: list[StepEvent] = field(default_factory=list)
    error: BaseException | None = None


class TrainingJob:
    """Trains ``network`` on ``task`` and writes ``path``.

    ``guard`` is entered inside the thread around the whole run; the host uses it to keep its own
    cancel button away from the training.
    """

    def __init__(
        self,
        network: AdaptiveRankNetwork,
        task: Task,
        entropy: CrossAttentionEntropy,
        config: TrainConfig,
        path: Path,
        captions: tuple[str, ...] = (),
        base_hash: str = "",
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.network, self.task, self.entropy = network, task, entropy
        self.config, self.path, self.guard = config, path, guard
        self.captions, self.base_hash = captions, base_hash
        self.progress = Progress()
        self.result: TrainedLoRA | None = None
        self._trainer: Trainer | None = None
        self._stop = threading.Event()
        # Daemon: a server that shuts down must not wait for the last step.
        self._thread = threading.Thread(target=self._run, name=f"LoRA² {path.stem}", daemon=True)

    def start(self) -> None:
        self.progress.state = "running"
        self._thread.start()

    def stop(self) -> None:
        """Ask for an end after the step that runs now; what was learnt is saved."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most ``seconds``; whether the job is over and its thread gone."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self.guard():
                self._train()
            self.progress.state = "stopped" if self._stop.is_set() else "finished"
        except BaseException as error:  # any end must reach the waiting node, MemoryError too
            self.progress.error = error
            self.progress.state = "failed"
            if not isinstance(error, Exception):
                raise
        finally:
            # The copy of the model ends with the run: neither the finished job nor the frames of
            # an error may keep it in memory.
            del self.network, self.task, self.entropy
            self._trainer = None
            if self.progress.error is not None:
                traceback.clear_frames(self.progress.error.__traceback__)

    def _train(self) -> None:
        logging.info(
            "LoRA²: training %d components for %d steps (%s mode) towards %s.",
            len(self.network.targets),
            self.config.steps,
            self.config.rank.mode,
            self.path.name,
        )
        self._trainer = Trainer(self.network, self.task, self.config, self.entropy)
        try:
            for event in self._trainer.run(self._stop.is_set):
                self.progress.events.append(event)
                self.progress.step = event.step
        except Exception as error:
            # Its frames hold the last step's graph: after running out of memory that must go
            # before anything can be saved.
            traceback.clear_frames(error.__traceback__)
            self._save_after_error()
            raise
        if self.progress.events:
            self._save()

    def _save_after_error(self) -> None:
        if not self.progress.events:
            return
        try:
            self._save()
        except Exception as error:  # the first error is the one to tell
            logging.error("LoRA²: after the failure nothing could be saved: %s", error)

    def _save(self) -> None:
        with self._trainer.averaged() if self._trainer else nullcontext():
            components = self.network.components()
        events = self.progress.events
        text = metadata.describe(
            config=self.config,
            captions=self.captions,
            base_hash=self.base_hash,
            ranks=[int(c.importance.numel()) for c in components],
            losses=[event.loss for event in events],
            probes=[event.probe for event in events if event.probe is not None],
            title=self.path.stem,
        )
        rank = self.config.rank
        lora_file.save(self.path, components, text, rank.target_megabytes, rank.min_rank)
        size = self.path.stat().st_size / 1e6
        logging.info("LoRA²: wrote %s, %.2f MB, after %d steps.", self.path, size, len(events))
        self.result = TrainedLoRA(
            path=self.path,
            file=lora_file.load(self.path),
            components=tuple(lora_file.inspect(self.path)[0]),
            history=history(events, self.config),
        )


def history(events: list[StepEvent], config: TrainConfig) -> TrainingHistory:
    """The curves of a run, for its report."""
    probes = [(event.step, event.probe) for event in events if event.probe is not None]
    in_megabytes = config.rank.target_megabytes is not None
    return TrainingHistory(
        steps=tuple(event.step for event in events),
        losses=tuple(event.loss for event in events),
        mean_ranks=tuple(event.mean_rank for event in events),
        probe_steps=tuple(step for step, _ in probes),
        probe_losses=tuple(loss for _, loss in probes),
        target_rank=None if in_megabytes else config.rank.target_rank,
    )
