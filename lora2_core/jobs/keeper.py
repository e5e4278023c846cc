"""The checkpoint of one run: which run it is, when one is due, where it lies, what it may replace.

A folder holds one file a run, named after its :func:`run_hash`. Interrupted and started again with
the same settings and photos, the run is found by it and goes on.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import lora_file
from ..config.train import KeepConfig, TrainConfig
from ..data.cache import content_key
from ..files import checkpoint
from ..files.atomic import remove_leftovers
from ..files.checkpoint import Checkpoint, CheckpointError, Label
from ..files.header import LoRAFileError
from ..files.metadata import RUN, deciding
from .checkpoints import newest_first

_NUMBERED = re.compile(r"(.*?)_?\d+_?")  # subject_00001_, as ComfyUI counts


def run_hash(config: TrainConfig, captions: Sequence[str], base_hash: str, data_hash: str) -> str:
    """SHA-256 over all that decides a run; what it is called and how it is kept is left out.

    So ``keep``, ``samples`` and the file's name may change between a stop and the resume.
    """
    settings = json.dumps(deciding(config), sort_keys=True)
    return content_key(settings, data_hash, base_hash, *captions)


def target_of(path: Path, kept: Checkpoint) -> Path:
    """Where a resumed run writes: over its own unfinished LoRA if that is there, else ``path``.

    Its own: the file that the checkpoint names, in the same folder, the same name but for
    the number, and not written by any other run, as its metadata tells.
    """
    own = Path(kept.target)
    if not _is_called_alike(own, path):
        return path
    if not own.exists():
        return own
    return own if made_by(kept.run, own) is not None else path


def is_unfinished(path: Path, run_hash: str) -> bool:
    """Whether there is a LoRA of this run in ``path``, of fewer steps than it was to have."""
    metadata = made_by(run_hash, path)
    if metadata is None:
        return False
    return metadata.get("ss_steps") != metadata.get("ss_max_train_steps")


def made_by(run_hash: str, path: Path) -> dict[str, str] | None:
    """The metadata of a LoRA in ``path`` if this run has written it."""
    try:
        _, metadata = lora_file.inspect(path)
    except (LoRAFileError, OSError):
        return None
    return dict(metadata) if metadata.get(RUN) == run_hash else None


def _is_called_alike(path: Path, other: Path) -> bool:
    """The same folder, and the same name but for the number."""
    return path.parent == other.parent and _stem(path) == _stem(other)


def _stem(path: Path) -> str:
    numbered = _NUMBERED.fullmatch(path.stem)
    return numbered[1] if numbered else path.stem


class RunKeeper:
    """Keeps the checkpoint of the run with ``run_hash`` in ``folder``; None keeps nothing.

    ``made_of``: what the run is made of, see :mod:`.differences`. No accident with a checkpoint
    ends a training: it is told to ``tell``, once for writing.
    """

    def __init__(
        self,
        folder: Path | None,
        run_hash: str,
        keep: KeepConfig,
        tell: Callable[[str], None],
        made_of: Mapping[str, Any] | None = None,
    ):
        self.made_of = dict(made_of or {})
        self.run_hash, self.keep, self._tell = run_hash, keep, tell
        self.path = None if folder is None else folder / f"{run_hash}.safetensors"
        self.step: int | None = None  # finished steps of the checkpoint that lies there
        self._written = time.monotonic()
        self._failed = False

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after this step, by its number or by the clock."""
        by_steps, minutes = self.keep.checkpoint_steps, self.keep.checkpoint_minutes
        if self.path is None:
            return False
        if by_steps and step % by_steps == 0:
            return True
        return bool(minutes) and time.monotonic() - self._written >= 60 * minutes

    def save(self, step: int, target: Path, state: Callable[[], dict[str, Any]]) -> bool:
        """Write a checkpoint of ``state``; whether that worked. Never raises an Exception."""
        if self.path is None:
            return False
        self._written = time.monotonic()  # failed or not, the next one waits its time
        try:
            kept = Checkpoint(self.run_hash, step, str(target), state(), self.made_of)
            checkpoint.write(self.path, kept)
        except Exception as error:  # a full disk, no memory for the copy: training goes on
            reason = getattr(error, "strerror", None) or error
            if not self._failed:
                self._tell(
                    f"The checkpoint {self.path} could not be written ({reason}). Training goes "
                    "on; until one can be written, an accident costs what was learnt since the "
                    "last one."
                )
            self._failed = True
            return False
        self._failed, self.step = False, step
        return True

    def load(self) -> Checkpoint | None:
        """The checkpoint of this run, if there is one and it is wanted and whole."""
        if self.path is None:
            return None
        remove_leftovers(self.path)
        if not self.keep.resume or not self.path.is_file():
            return None
        try:
            kept = checkpoint.read(self.path, self.run_hash)
        except CheckpointError as error:
            self.set_aside(str(error))
            return None
        self.step = kept.step
        return kept

    def unfinished_alike(self, target: Path) -> Label | None:
        """The newest checkpoint of another run whose LoRA was to be called as ``target`` is.

        None where going on was not wanted, or this run has, or had, a checkpoint of its own.
        """
        own = self.path
        if own is None or not self.keep.resume or own.exists() or _aside(own).exists():
            return None
        for _, path, _ in newest_first(own.parent):
            if path.suffix != own.suffix:  # set aside, as damaged
                continue
            try:
                label = checkpoint.read_label(path)
            except CheckpointError:  # told when its own run comes back
                continue
            if label.run != self.run_hash and _is_called_alike(Path(label.target), target):
                return label
        return None

    def set_aside(self, reason: str) -> None:
        """Rename a checkpoint that cannot be used, so that no new one overwrites it."""
        if self.path is None:
            return
        self.step = None
        aside = _aside(self.path)
        try:
            self.path.replace(aside)
            kept = f"It was renamed to {aside.name}"
        except OSError as error:
            kept = f"It could not be renamed ({error.strerror or error})"
        self._tell(f"The run could not go on from its checkpoint: {reason} {kept}; starting anew.")

    def remove(self) -> None:
        """Delete the checkpoint: the run is over."""
        if self.path is None:
            return
        self.step = None
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logging.warning("LoRA²: %s could not be deleted: %s.", self.path, error)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")
