"""The training of a job, in the job's thread: from its first step or a checkpoint to its file.

Whatever ends a run after its first step, be it the last step, a stop or an error, the LoRA as of
the last complete step is written before the job is over, and before it a checkpoint from which the
same run goes on exactly; that of a finished run stays until its LoRA is on disk. Steps, losses and
pictures of before come back with it: the file of a run that was stopped and resumed has the same
bytes as that of one that was not.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.swapping import computes_in_ram
from ..config.train import doubts_about_rates, rate_to_try
from ..files.atomic import remove_leftovers
from ..files.checkpoint import Checkpoint
from ..files.raw.memory import free_ram
from ..files.write import NotWritten, write_beside_others
from ..training import out_of_memory
from ..training.memory import size
from ..training.out_of_memory import OutOfMemory
from ..training.setup import TrainingSetup
from ..training.trainer import Trainer, TrainingError
from . import differences, keeper
from .gate import StepGate
from .keeper import RunKeeper
from .log import pack_events, unpack_events
from .progress import Progress
from .sampling import SampleStrip, StripFile
from .saving import save_lora


@dataclass
class RunFiles:
    """Where a run writes; that may change until its first step."""

    lora: Path
    strip: StripFile | None

    def move_to(self, lora: Path) -> None:
        """Write to ``lora`` instead, and the strip beside it."""
        if self.strip is not None:
            old = self.strip.path
            moved = old.with_name(old.name.replace(self.lora.stem, lora.stem))
            self.strip = replace(self.strip, path=moved)
        self.lora = lora


class Run:
    """Trains what ``setup`` holds, once, and writes ``files``; what comes of it is in ``progress``.

    It holds the model, and must go when the job is over. ``watch``: called after every step and
    change.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        files: RunFiles,
        run_keeper: RunKeeper,
        progress: Progress,
        gate: StepGate,
        watch: Callable[[], None],
    ):
        self.setup, self.config, self.files, self.keeper = setup, setup.config, files, run_keeper
        self.progress, self.gate, self.watch = progress, gate, watch
        self.trainer = Trainer(setup.network, setup.task, setup.config, setup.entropy)
        self.checkpointing = setup.checkpointing or bool(setup.config.gradient_checkpointing)
        self.ran_short = False  # of memory, so that blocks had to be computed twice
        # A name that was not free from the start is no news at the end.
        self.taken = files.lora.name if files.lora.exists() else None
        self.strength = 1.0  # at which it is saved, of that which was trained
        self.resumed: Path | None = None  # where the interrupted run wrote, or was to
        self.strip: SampleStrip | None = None
        if setup.painter is not None and setup.config.samples.prompts:
            self.strip = SampleStrip(
                setup.painter, setup.config, files.strip, files.lora.stem, run_keeper.run_hash
            )

    def go(self) -> None:
        """Train to the end, and save. Raises what ended it early, after saving."""
        for doubt in doubts_about_rates(self.config):
            self.progress.tell(doubt)
        self._resume()
        for path in (self.files.lora, *([self.files.strip.path] if self.files.strip else [])):
            remove_leftovers(path)
        self.progress.note(
            f"training {len(self.setup.network.targets)} components for {self.config.steps} steps "
            f"({self.config.rank.mode} mode) towards {self.files.lora.name}."
        )
        try:
            self._steps()
        except BaseException as error:
            # Its frames hold the last step's graph: after running out of memory that must go
            # before anything can be saved.
            traceback.clear_frames(error.__traceback__)
            self._end_by(error)
        if not self.progress.events:
            return
        if self.keeper.step != self.trainer.step:
            self._checkpoint()  # before the LoRA, which may find no place
        self._find_strength()
        self._save()
        if self.trainer.step == self.config.steps:
            self.keeper.remove()
            self._paint()
        self._tell_if_worse()

    def _tell_if_worse(self) -> None:
        """No run that ends above its start does so without a word."""
        probes = [event for event in self.progress.events if event.probe is not None]
        if not probes:
            return
        start, end = self.trainer.probe_guard.start, probes[-1].probe
        if start is None:  # it goes on from the checkpoint of an earlier version
            start = probes[0].probe
        if start is None or end is None or end <= start or f"{end:.4g}" == f"{start:.4g}":
            return
        self.progress.tell(
            f"This LoRA may do harm: the loss on fixed noise is {end:.4g} after step "
            f"{probes[-1].step} and was {start:.4g} before the first. learning_rate is "
            f"{self.config.learning_rate:g}: try {rate_to_try(self.config):g}."
        )

    # --- steps ------------------------------------------------------------------------------

    def _steps(self) -> None:
        """Every step that is left; a first lack of memory is met by gradient checkpointing."""
        try:
            self._run_steps()
            return
        except Exception as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            if self.checkpointing or self.setup.enable_checkpointing is None:
                raise self._out_of_memory(error) from error
            needed, _ = out_of_memory.needed_and_free(str(error))
        # Outside of the handler, which holds the error and by it what had been computed.
        self._switch_checkpointing_on()
        asked = "" if needed is None else f" ({size(needed)} more were needed)"
        self.progress.tell(
            f"Out of memory in step {self.trainer.step + 1}{asked}: trying again with gradient "
            "checkpointing, which computes every block twice. Setting gradient_checkpointing on "
            "saves the failed try next time."
        )
        try:
            self._run_steps()
        except Exception as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            raise self._out_of_memory(error) from error

    def _run_steps(self) -> None:
        for event in self.trainer.run(self.gate):
            self.progress.add(event)
            self.watch()
            if event.step < self.config.steps:  # at the end the LoRA is saved first
                self._paint()
                if self.keeper.due(event.step):
                    self._checkpoint()

    def _switch_checkpointing_on(self) -> None:
        if self.setup.enable_checkpointing is not None:
            self.setup.enable_checkpointing()
            self.checkpointing = self.ran_short = True

    def _out_of_memory(self, error: Exception) -> OutOfMemory:
        needed, free = out_of_memory.needed_and_free(str(error))
        device = self.setup.network.log_nu.device
        in_ram = computes_in_ram(device)
        if free is None and device.type == "cpu":
            free = free_ram()
        step, told = self.trainer.step + 1, self.setup.estimate
        return OutOfMemory(
            out_of_memory.message(self.config, step, needed, free, self.checkpointing, told, in_ram)
        )

    def _end_by(self, error: BaseException) -> None:
        """Keep what there is after an error, and raise it."""
        ruined = isinstance(error, TrainingError)
        told = ""
        if self.progress.events and self.trainer.step:  # 0: no step of it was worth keeping
            if not ruined:
                self._checkpoint()
            try:
                self._save()
            except Exception as second:  # the first error is the one to raise
                told = f" {second}"
                logging.error("LoRA²: after the failure: %s", second)
        if not ruined:
            if told:
                self.progress.tell(f"After the failure:{told}")
            raise error
        # The same settings lead to the same end from any checkpoint of this run, and other
        # settings are another run.
        self.keeper.remove()
        if self.keeper.path is not None:
            told += " No checkpoint is kept: from it the run would end the same way."
        raise TrainingError(f"{error}{told}") from error

    def save_last_step(self, seconds: float) -> bool:
        """Save the last complete step from another thread, as the next one may take for ever.

        That one is then abandoned. False where nothing was complete, or could be reached within
        ``seconds``: the run changes its weights, paints or saves just now.
        """
        with self.trainer.last_step.held(seconds) as got:
            if not got or self.progress.result is not None:
                return False
            self.trainer.last_step.abandoned = True
            end = time.monotonic() + 1
            while len(self.progress.events) < self.trainer.step and time.monotonic() < end:
                time.sleep(0.01)  # the job's thread is about to add it
            if not self.progress.events:
                return False
            self._checkpoint()
            self._save()
            self.progress.tell(
                f"Step {self.trainer.step + 1} takes too long to wait for; step "
                f"{self.trainer.step} is saved, and the same run goes on from there."
            )
            return True

    # --- going on later ---------------------------------------------------------------------

    def _checkpoint(self) -> None:
        def state() -> dict[str, Any]:
            return {
                "trainer": self.trainer.state(),
                "events": pack_events(self.progress.events),
                "samples": self.strip.state() if self.strip else {},
                # Not where the look ahead has decided so: it decides again where the run goes on.
                "checkpointing": self.ran_short,
            }

        self.keeper.save(self.trainer.step, self.files.lora, state)

    def _resume(self) -> None:
        other = self.keeper.unfinished_alike(self.files.lora)
        kept = self.keeper.load()
        if other is not None:
            self.progress.tell(differences.sentence(other, self.keeper.made_of), logging.INFO)
        if kept is None or not self._take(kept):
            return
        self.resumed = Path(kept.target)
        self.files.move_to(keeper.target_of(self.files.lora, kept))
        done = kept.step == self.config.steps
        self.progress.tell(
            f"{'All steps are done; saving' if done else 'Going on'} after step {kept.step} of "
            f"{self.config.steps} from the checkpoint of this run; the LoRA goes to "
            f"{self.files.lora.name}. (To start anew, switch resume off.)",
            logging.INFO,
        )
        if self.strip is not None:
            self.strip.file, self.strip.title = self.files.strip, self.files.lora.stem

    def _take(self, kept: Checkpoint) -> bool:
        """Become the run that ``kept`` is of; if that fails, the one that it is anew."""
        fresh = self.trainer.state()
        try:
            self.trainer.load_state(kept.state["trainer"])
            events = unpack_events(kept.state["events"], self.config.steps)
            if self.strip is not None and kept.state["samples"]:
                self.strip.load_state(kept.state["samples"])
        except Exception as error:  # a whole file that another state of the code has written
            self.trainer.load_state(fresh)
            self.keeper.set_aside(f"it does not fit this run ({error}).")
            return False
        self.progress.take(events, self.trainer.step)
        if self.strip is not None:
            self.progress.samples[:] = self.strip.events
        self.ran_short = bool(kept.state["checkpointing"])
        if self.ran_short and not self.checkpointing:
            self._switch_checkpointing_on()
        return True

    # --- what comes out ---------------------------------------------------------------------

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """Inside, the network is what would be saved now: averages if any, fresh importances, and
        at the end the strength that was found."""
        network = self.setup.network
        with self.trainer.averaged(), network.at_strength(self.strength), torch.no_grad():
            network.refresh()
            yield

    def _find_strength(self) -> None:
        """At what strength it is saved; no accident here costs the LoRA."""
        try:
            found = self.trainer.least_strength()
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            self.progress.tell(f"The LoRA is saved at its full strength: {error}")
            return
        if found is None:
            self.progress.tell(
                "The LoRA is saved at its full strength: there is no memory to find the smallest "
                "that would do."
            )
        elif found < 1:
            self.strength = found
            self.progress.note(
                f"saved at {found:.2f} of its trained strength, which keeps "
                f"{self.config.gain_to_keep:.0%} of what it has learnt and leaves the prompt more "
                f"room; a loader's strength of {1 / found:.2f} undoes it."
            )

    def _paint(self) -> None:
        """Pictures of the samples' prompts, when they are due; no accident here ends the run."""
        if self.strip is None or not self.strip.due(self.trainer.step):
            return
        try:
            with self._as_saved():
                self.strip.paint(self.trainer.step, self.gate)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            self.strip = None
            self.progress.tell(f"Samples are off for the rest of this run: {error}")
            return
        self.files.strip = self.strip.file
        self.progress.samples[:] = self.strip.events
        self.watch()

    def _save(self) -> None:
        """Write the LoRA. Raises NotWritten, after trying to keep it beside the checkpoint."""
        with self.trainer.last_step.held():
            self._save_held()

    def _save_held(self) -> None:
        with self._as_saved():
            components = self.setup.network.components()
        # An explosion put an earlier state back; the file tells of the steps that are in it.
        events, steps = self.progress.events, self.trainer.step

        def write(path: Path, new: bool) -> None:
            run_hash = self.keeper.run_hash
            trained = save_lora(
                path, self.setup, components, events, steps, run_hash, new, self.strength
            )
            size = trained.nbytes / 1e6
            self.progress.log.append(f"Wrote {path.name}, {size:.2f} MB.")
            logging.info("LoRA²: wrote %s, %.2f MB, after %d steps.", path, size, steps)
            self.progress.result = trained
            if path.name != self.files.lora.name:
                name = self.files.lora.name
                say = self.progress.note if name == self.taken else self.progress.tell
                say(f"The name {name} was taken meanwhile; the LoRA is {path.name}.")

        try:
            write_beside_others(self.files.lora, write, self._is_own)
        except NotWritten as error:
            raise NotWritten(f"{error} {self._kept_elsewhere(write)}".strip()) from error
        if self.progress.result is not None:
            self.files.lora = self.progress.result.path

    def _is_own(self, path: Path) -> bool:
        """Whether this run has written what is in ``path``, now or before it was interrupted."""
        if path == self.resumed:
            return keeper.made_by(self.keeper.run_hash, path) is not None
        return keeper.is_unfinished(path, self.keeper.run_hash)

    def _kept_elsewhere(self, write: Callable[[Path, bool], None]) -> str:
        """Keep the LoRA that finds no place in its folder; says where it and the run are."""
        kept: list[str] = []
        if self.keeper.path is not None:
            place = self.keeper.path.with_name(self.files.lora.name)
            try:
                write_beside_others(place, write, self._is_own)
                if self.progress.result is not None:
                    place = self.progress.result.path
                logging.warning("LoRA²: the LoRA is kept as %s.", place)
                short = "/".join(place.parts[-3:])  # screens leave out what begins at the root
                kept.append(f"The LoRA is kept in the folder of checkpoints: {short}.")
            except Exception as error:
                logging.error("LoRA²: nor could the LoRA be kept as %s: %s", place, error)
        if self.keeper.step == self.trainer.step:
            kept.append("The run is kept as well: queued again it goes straight to saving.")
        return " ".join(kept)
