"""One training run in a thread of its own: started, watched, stopped, gone on with, always saved.

Whatever ends a run after its first step, be it the last step, a stop or an error, the LoRA as of
the last complete step is written before the job is over, and so is a checkpoint from which the
same run goes on exactly. Steps, losses and pictures of before come back with it: the file of a
run that was stopped and resumed has the same bytes as that of one that was not. Between two steps
a run can be held for as long as anyone likes, and waits for prompts if it is told to.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import lora_file
from ..adapters.network import AdaptiveRankNetwork
from ..config.train import TrainConfig
from ..files.atomic import remove_leftovers
from ..files.checkpoint import Checkpoint
from ..files.metadata import describe_run
from ..files.read import ComponentInfo
from ..reports.report import TrainingHistory
from ..training import out_of_memory
from ..training.memory import size
from ..training.objective import CrossAttentionEntropy
from ..training.out_of_memory import OutOfMemory
from ..training.trainer import Task, Trainer, TrainingError
from . import keeper, shutdown
from .gate import StepGate
from .keeper import RunKeeper
from .log import pack_events, training_history, unpack_events
from .progress import ENDED, State
from .progress import Progress as Progress
from .sampling import Painter, SampleStrip, StripFile


@dataclass(frozen=True)
class TrainedLoRA:
    """What a run leaves behind; the value of the LORA2 socket."""

    path: Path
    file: lora_file.LoRAFile  # exactly what was written
    components: tuple[ComponentInfo, ...]
    history: TrainingHistory


class TrainingJob:
    """Trains ``network`` on ``task`` and writes ``path``.

    ``guard``: entered inside the thread around the whole run; the host uses it to keep its own
    cancel button away from the training. ``data_hash``: of photos, captions and masks.
    ``checkpoints``: a folder for the checkpoints of this and other runs; None keeps none and
    resumes none. A resumed run writes over the unfinished LoRA of its interruption (and never
    over anything else), so ``path`` may change once the job has started. ``painter``: for the
    prompts of ``config.samples``; ``strip``: a file of them. ``enable_checkpointing``: called
    when memory runs out, before the step is tried once more. ``busy``: while it is true the job
    waits between steps. ``watch``, to be set before the start, is called in the job's thread after
    every step and change; ``ended`` last of all, when the model is gone from memory.
    """

    def __init__(
        self,
        network: AdaptiveRankNetwork,
        task: Task,
        entropy: CrossAttentionEntropy | None,
        config: TrainConfig,
        path: Path,
        captions: tuple[str, ...] = (),
        base_hash: str = "",
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        data_hash: str = "",
        checkpoints: Path | None = None,
        painter: Painter | None = None,
        strip: StripFile | None = None,
        enable_checkpointing: Callable[[], None] | None = None,
        busy: Callable[[], bool] = lambda: False,
    ):
        self.network, self.task, self.entropy = network, task, entropy
        self.config, self.path, self.guard = config, path, guard
        self.captions, self.base_hash = captions, base_hash
        self.strip = strip
        self.enable_checkpointing = enable_checkpointing
        self.progress = Progress()
        self.result: TrainedLoRA | None = None
        self.run = keeper.run_hash(config, captions, base_hash, data_hash)
        self._keeper = RunKeeper(checkpoints, self.run, config.keep, self._tell)
        self._checkpointing = config.gradient_checkpointing
        self._strip: SampleStrip | None = None
        if painter is not None and config.samples.prompts:
            self._strip = SampleStrip(painter, config, strip, "")
        self._trainer: Trainer | None = None
        self.watch: Callable[[], None] = lambda: None
        self.ended: Callable[[], None] = lambda: None
        self._gate = StepGate(self.progress, busy, lambda: self.watch())
        # Daemon: a server that shuts down must not wait for the last step.
        self._thread = threading.Thread(target=self._run, name=f"LoRA² {path.stem}", daemon=True)

    def start(self) -> None:
        self.progress.started = time.time()
        self._gate.begin()
        try:
            self._thread.start()
        except RuntimeError as error:  # the system has no thread left
            self.progress.error = error
            self._over("failed")
            raise

    def stop(self) -> None:
        """Ask for an end after the step that runs now; what was learnt is saved."""
        self._gate.stop()

    @property
    def stopping(self) -> bool:
        """Whether an end was asked for."""
        return self._gate.stopping

    def pause(self) -> bool:
        """Hold the run after the step that runs now; False when there is nothing to hold."""
        return self._gate.pause()

    def unpause(self) -> bool:
        """Let a held run go on; False when it is not held."""
        return self._gate.unpause()

    def drop(self) -> None:
        """Never start: the model goes, and there is nothing to save."""
        self._over("stopped")

    def move_to(self, path: Path) -> None:
        """Write to ``path`` instead, and the samples beside it; before the first step."""
        if self.strip is not None:
            old = self.strip.path
            moved = old.with_name(old.name.replace(self.path.stem, path.stem))
            self.strip = replace(self.strip, path=moved)
        self.path = path

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most ``seconds``; whether the job is over and its thread gone."""
        if self._thread.ident is None:
            return self.progress.state in ENDED
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def slim(self) -> None:
        """Of a job that is over, keep what a list shows; the LoRA itself is in its file."""
        self.progress.slim()
        if self.result is not None:
            history = training_history(self.progress.events, self.config)
            file = replace(self.result.file, state={})
            self.result = replace(self.result, file=file, history=history)

    def _run(self) -> None:
        shutdown.enter(self)
        state: State = "failed"
        try:
            self.watch()
            with self.guard():
                self._train()
            state = "finished" if self.progress.step == self.config.steps else "stopped"
        except BaseException as error:  # any end must reach the waiting node, MemoryError too
            self.progress.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            self._over(state)
            try:
                self.ended()
            finally:
                shutdown.leave(self)

    def _over(self, state: State) -> None:
        # The copy of the model ends with the run: neither the finished job nor the frames of an
        # error may keep it in memory.
        del self.network, self.task, self.entropy, self.enable_checkpointing
        self._trainer = self._strip = None
        if self.progress.error is not None:
            traceback.clear_frames(self.progress.error.__traceback__)
        self._gate.end(state)

    def _tell(self, text: str, level: int = logging.WARNING) -> None:
        """Say something to whoever watches the run, and in the log."""
        self.progress.message = text
        self.progress.log.append(text)
        logging.log(level, "LoRA²: %s", text)

    def _note(self, text: str) -> None:
        """Say something that matters to whoever reads the log."""
        self.progress.log.append(text[:1].upper() + text[1:])
        logging.info("LoRA²: %s", text)

    def _train(self) -> None:
        trainer = self._trainer = Trainer(self.network, self.task, self.config, self.entropy)
        self._resume(trainer)
        for path in (self.path, *([self.strip.path] if self.strip else [])):
            remove_leftovers(path)
        self._note(
            f"training {len(self.network.targets)} components for {self.config.steps} steps "
            f"({self.config.rank.mode} mode) towards {self.path.name}."
        )
        try:
            self._steps(trainer)
        except BaseException as error:
            # Its frames hold the last step's graph: after running out of memory that must go
            # before anything can be saved.
            traceback.clear_frames(error.__traceback__)
            self._end_by(error, trainer)
        if not self.progress.events:
            return
        if trainer.step < self.config.steps:
            self._checkpoint(trainer)  # before the LoRA, whose folding takes longer
        self._save(trainer)
        if trainer.step == self.config.steps:
            self._keeper.remove()
            self._paint(trainer)

    def _steps(self, trainer: Trainer) -> None:
        """Every step that is left; a first lack of memory is met by gradient checkpointing."""
        try:
            self._run_steps(trainer)
            return
        except Exception as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            if self._checkpointing or self.enable_checkpointing is None:
                raise self._out_of_memory(error, trainer) from error
            needed, _ = out_of_memory.needed_and_free(str(error))
        # Outside of the handler, which holds the error and by it what had been computed.
        self._switch_checkpointing_on()
        asked = "" if needed is None else f" ({size(needed)} more were needed)"
        self._tell(
            f"Out of memory in step {trainer.step + 1}{asked}: trying again with gradient "
            "checkpointing, which computes every block twice. Setting gradient_checkpointing on "
            "saves the failed try next time."
        )
        try:
            self._run_steps(trainer)
        except Exception as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            raise self._out_of_memory(error, trainer) from error

    def _run_steps(self, trainer: Trainer) -> None:
        for event in trainer.run(self._gate):
            self.progress.add(event)
            self.watch()
            if event.step < self.config.steps:  # at the end the LoRA is saved first
                self._paint(trainer)
                if self._keeper.due(event.step):
                    self._checkpoint(trainer)

    def _switch_checkpointing_on(self) -> None:
        if self.enable_checkpointing is not None:
            self.enable_checkpointing()
            self._checkpointing = True

    def _out_of_memory(self, error: Exception, trainer: Trainer) -> OutOfMemory:
        needed, free = out_of_memory.needed_and_free(str(error))
        if free is None and self.network.log_nu.device.type == "cpu":
            free = out_of_memory.free_ram()
        step = trainer.step + 1
        return OutOfMemory(
            out_of_memory.message(self.config, step, needed, free, self._checkpointing)
        )

    def _end_by(self, error: BaseException, trainer: Trainer) -> None:
        """Keep what there is after an error, and raise it."""
        if isinstance(error, TrainingError):
            # The same settings lead to the same end from any checkpoint of this run, and other
            # settings are another run.
            self._keeper.remove()
        elif self.progress.events:
            self._checkpoint(trainer)
        if self.progress.events:
            try:
                self._save(trainer)
            except Exception as second:  # the first error is the one to tell
                logging.error("LoRA²: after the failure nothing could be saved: %s", second)
        if isinstance(error, TrainingError) and self._keeper.path is not None:
            raise TrainingError(
                f"{error} No checkpoint is kept: from it the run would end the same way."
            ) from error
        raise error

    # --- going on later ---------------------------------------------------------------------

    def _checkpoint(self, trainer: Trainer) -> None:
        def state() -> dict[str, Any]:
            return {
                "trainer": trainer.state(),
                "events": pack_events(self.progress.events),
                "samples": self._strip.state() if self._strip else {},
                "checkpointing": self._checkpointing,
            }

        self._keeper.save(trainer.step, self.path, state)

    def _resume(self, trainer: Trainer) -> None:
        kept = self._keeper.load()
        fresh = trainer.state() if kept else {}
        if kept and self._take(kept, trainer, fresh):
            self.move_to(keeper.target_of(self.path, kept))
            self._tell(
                f"Going on after step {kept.step} of {self.config.steps} from the checkpoint of "
                f"this run; the LoRA goes to {self.path.name}. (To start anew, switch resume off.)",
                logging.INFO,
            )
        if self._strip is not None:
            self._strip.file, self._strip.title = self.strip, self.path.stem

    def _take(self, kept: Checkpoint, trainer: Trainer, fresh: dict[str, Any]) -> bool:
        """Become the run that ``kept`` is of; if that fails, the ``fresh`` one again."""
        try:
            trainer.load_state(kept.state["trainer"])
            events = unpack_events(kept.state["events"], self.config.steps)
            if self._strip is not None and kept.state["samples"]:
                self._strip.load_state(kept.state["samples"])
        except Exception as error:  # a whole file that another state of the code has written
            trainer.load_state(fresh)
            self._keeper.set_aside(f"it does not fit this run ({error}).")
            return False
        self.progress.take(events, trainer.step)
        if self._strip is not None:
            self.progress.samples[:] = self._strip.events
        if kept.state["checkpointing"] and not self._checkpointing:
            self._switch_checkpointing_on()
        return True

    # --- what comes out ---------------------------------------------------------------------

    @contextmanager
    def _as_saved(self, trainer: Trainer) -> Iterator[None]:
        """Inside, the network is what would be saved now: averages if any, fresh importances."""
        with trainer.averaged(), torch.no_grad():
            self.network.refresh_importance()
            yield

    def _paint(self, trainer: Trainer) -> None:
        """Pictures of the samples' prompts, when they are due; no accident here ends the run."""
        strip = self._strip
        if strip is None or not strip.due(trainer.step):
            return
        try:
            with self._as_saved(trainer):
                strip.paint(trainer.step, self._gate)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            self._strip = None
            self._tell(f"Samples are off for the rest of this run: {error}")
            return
        self.progress.samples[:] = strip.events
        self.watch()

    def _save(self, trainer: Trainer) -> None:
        with self._as_saved(trainer):
            components = self.network.components()
        # An explosion put an earlier state back; the file tells of the steps that are in it.
        events = self.progress.events[: trainer.step]
        text = describe_run(
            config=self.config,
            captions=self.captions,
            base_hash=self.base_hash,
            ranks=[int(c.importance.numel()) for c in components],
            losses=[event.loss for event in events],
            probes=[event.probe for event in events if event.probe is not None],
            title=self.path.stem,
            run=self.run,
        )
        rank = self.config.rank
        lora_file.save(self.path, components, text, rank.target_megabytes, rank.min_rank)
        size = self.path.stat().st_size / 1e6
        self.progress.log.append(f"Wrote {self.path.name}, {size:.2f} MB.")
        logging.info("LoRA²: wrote %s, %.2f MB, after %d steps.", self.path, size, len(events))
        self.result = TrainedLoRA(
            path=self.path,
            file=lora_file.load(self.path),
            components=tuple(lora_file.inspect(self.path)[0]),
            history=training_history(self.progress.events, self.config),
        )
