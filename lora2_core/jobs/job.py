"""One training run in a thread of its own: started, watched, held, stopped.

Between two steps a run can be held for as long as anyone likes, and waits for prompts if it is told
to. The copy of the model lives as long as the run: a job that is over holds its story alone. What
happens in the thread is in :mod:`.run`.
"""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..adapters import pinning
from ..training.setup import TrainingSetup
from . import differences, keeper, shutdown
from .gate import StepGate
from .keeper import RunKeeper
from .progress import ENDED, Progress, State
from .run import Run, RunFiles
from .sampling import StripFile
from .saving import TrainedLoRA

_LARGE = 100_000_000  # bytes of adapted layers; less is worth no search through all of Python


class TrainingJob:
    """Trains what ``setup`` holds and writes ``path``.

    ``guard``: entered inside the thread around the whole run; the host uses it to keep its own
    cancel button away from the training. ``checkpoints``: a folder for the checkpoints of this and
    other runs; None keeps none and resumes none. A resumed run writes over the unfinished LoRA of
    its interruption (and never over anything else), so ``path`` may change once the job has
    started. ``strip``: a file of the pictures of ``config.samples``. ``busy``: while it is true the
    job waits between steps. ``watch``, to be set before the start, is called in the job's thread
    after every step and change; ``ended`` last of all, when the model is gone from memory.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        path: Path,
        *,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
        checkpoints: Path | None = None,
        strip: StripFile | None = None,
        busy: Callable[[], bool] = lambda: False,
    ):
        self.setup: TrainingSetup | None = setup  # None when the job is over
        self.config = setup.config
        self.run_hash = keeper.run_hash(
            setup.config, setup.captions, setup.base_hash, setup.data_hash
        )
        self.progress = Progress()
        self.watch: Callable[[], None] = lambda: None
        self.ended: Callable[[], None] = lambda: None
        self._run_now: Run | None = None
        self._guard = guard
        self._files = RunFiles(path, strip)
        made_of = differences.made_of(setup)
        self._keeper = RunKeeper(
            checkpoints, self.run_hash, self.config.keep, self.progress.tell, made_of
        )
        self._gate = StepGate(self.progress, busy, lambda: self.watch())
        # Daemon: a server that shuts down must not wait for the last step.
        self._thread = threading.Thread(target=self._run, name=f"LoRA² {path.stem}", daemon=True)

    @property
    def path(self) -> Path:
        """Where the LoRA goes."""
        return self._files.lora

    @property
    def strip(self) -> StripFile | None:
        """Where the strip of all pictures goes."""
        return self._files.strip

    @property
    def result(self) -> TrainedLoRA | None:
        """What was saved; None before, and after an end before the first step."""
        return self.progress.result

    @property
    def stopping(self) -> bool:
        """Whether an end was asked for."""
        return self._gate.stopping

    def start(self) -> None:
        """Begin. Raises RuntimeError when the system has no thread left."""
        self.progress.started = time.time()
        self._gate.begin()
        try:
            self._thread.start()
        except RuntimeError as error:
            self.progress.error = error
            self._over("failed")
            raise

    def stop(self) -> None:
        """Ask for an end after the step that runs now; what was learnt is saved."""
        self._gate.stop()

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
        self._files.move_to(path)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most ``seconds``; whether the job is over and its thread gone."""
        if self._thread.ident is None:
            return self.progress.state in ENDED
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def save_last_step(self, seconds: float) -> bool:
        """After :meth:`stop`: save the last complete step and wait for no other; whether it was.

        Waits at most ``seconds`` for a moment to do so. Raises what saving raises.
        """
        run = self._run_now
        return run is not None and run.save_last_step(seconds)

    def slim(self) -> None:
        """Of a job that is over, keep what a list shows; the LoRA itself is in its file."""
        self.progress.slim()

    def _run(self) -> None:
        shutdown.enter(self)
        state: State = "failed"
        try:
            self.watch()
            with self._guard():
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

    def _train(self) -> None:
        # In a frame of its own, so that nothing of the model is left in that of _run.
        setup = self.setup
        if setup is None:
            raise RuntimeError("This training is over; start another one.")
        self._run_now = Run(setup, self._files, self._keeper, self.progress, self._gate, self.watch)
        self._run_now.go()

    def _over(self, state: State) -> None:
        # The copy of the model ends with the run: neither the finished job nor the frames of an
        # error may keep it in memory.
        large = self.setup is not None and _is_large(self.setup)
        self.setup = self._run_now = None
        if self.progress.error is not None:
            traceback.clear_frames(self.progress.error.__traceback__)
        if large:
            # Its layers know each other, so that Python would find out some time later, when
            # what comes next has long asked for the memory.
            gc.collect()
            pinning.give_back()
        self._gate.end(state)


def _is_large(setup: TrainingSetup) -> bool:
    """Whether what a job holds is missed elsewhere: on a card always."""
    if setup.network.log_nu.device.type != "cpu":
        return True
    weights = (weight for layer in setup.network.layers for weight in layer.base.parameters())
    return sum(weight.numel() * weight.element_size() for weight in weights) >= _LARGE
