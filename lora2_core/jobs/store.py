"""What is known of every training, one small JSON file each: it outlives the process.

A training that was under way when its process ended is found as "interrupted". The store keeps
no weights; those of an unfinished run are in its checkpoint.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files.atomic import remove_leftovers_in, replacing

KEPT = 100  # of those that are over, and as many interrupted ones
ALIVE = ("queued", "running", "paused")
INTERRUPTED = "interrupted"

_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_PROCESS = secrets.token_hex(8)  # tells the trainings of this process from those of earlier ones


@dataclass(frozen=True)
class Kept:
    """A training as its manifest tells."""

    id: str
    name: str
    node_id: str
    created: float  # Unix time
    state: str  # as an entry's, or "interrupted"
    step: int
    steps: int
    prompt: dict[str, Any] | None  # API graph that leads to this training; None: cannot be redone
    file: str | None  # of the LoRA; None before there is one
    error: str | None
    background: bool = True
    base: str = ""
    run: str = ""  # its run_hash, under which a checkpoint is found


class JobStore:
    """Manifests in ``folder``. No accident with one ends a training: it is logged, once."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Reentrant: a signal's handler may end trainings while this thread writes.
        self._lock = threading.RLock()
        self._failed = False

    def put(self, read: Callable[[], Kept]) -> None:
        """Write what ``read`` tells of a training now."""
        try:
            with self._lock:  # whoever comes last writes the newest state
                kept = read()
                text = json.dumps({**asdict(kept), "process": _PROCESS}, ensure_ascii=False)
                with replacing(self._path(kept.id)) as file:
                    file.write(text.encode())
            self._failed = False
        except (OSError, TypeError, ValueError) as error:  # a full disk, a prompt that is no JSON
            if not self._failed:
                logging.warning(
                    "LoRA²: the list of trainings could not be written to %s (%s). Training goes "
                    "on, but after a restart this one is not in the list.",
                    self.folder,
                    error,
                )
            self._failed = True

    def all(self) -> list[Kept]:
        """Every manifest, newest first. A damaged one is skipped with a warning."""
        whole = [kept for path in self._files() if (kept := _read(path)) is not None]
        return sorted(whole, key=lambda kept: kept.created, reverse=True)

    def remove(self, id: str) -> None:
        """Forget a training; what it has written stays."""
        if not _ID.fullmatch(id):
            raise ValueError(f"{id[:80]!r} is not the id of a training.")
        try:
            self._path(id).unlink(missing_ok=True)
        except OSError as error:
            logging.warning("LoRA²: %s could not be deleted: %s.", self._path(id), error)

    def supersede(self, run_hash: str) -> None:
        """Forget the interrupted trainings that a new one of this ``run_hash`` goes on with."""
        for kept in self.all():
            if kept.state == INTERRUPTED and kept.run == run_hash:
                self.remove(kept.id)

    def prune(self) -> None:
        """Forget the oldest of those that are over, and what a killed process left half written."""
        remove_leftovers_in(self.folder, ".json")
        every = self.all()
        interrupted = [kept for kept in every if kept.state == INTERRUPTED]
        over = [kept for kept in every if kept.state not in (*ALIVE, INTERRUPTED)]
        for kept in interrupted[KEPT:] + over[KEPT:]:
            self.remove(kept.id)

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.json"

    def _files(self) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if _is_manifest(path)]
        except FileNotFoundError:
            return []
        except OSError as error:
            logging.warning("LoRA²: %s could not be read: %s.", self.folder, error)
            return []


def _is_manifest(path: Path) -> bool:
    return path.suffix == ".json" and _ID.fullmatch(path.stem) is not None


_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "name": (str,),
    "node_id": (str,),
    "created": (int, float),
    "state": (str,),
    "step": (int,),
    "steps": (int,),
    "prompt": (dict, type(None)),
    "file": (str, type(None)),
    "error": (str, type(None)),
    "background": (bool,),
    "base": (str,),
    "run": (str,),
}


def _read(path: Path) -> Kept | None:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        values = {field.name: manifest[field.name] for field in fields(Kept)}
        wrong = [name for name, value in values.items() if not isinstance(value, _TYPES[name])]
        if wrong or values["id"] != path.stem:
            raise ValueError(f"{', '.join(wrong) or 'id'} is not what it should be")
        if values["state"] in ALIVE and manifest["process"] != _PROCESS:
            values["state"] = INTERRUPTED
        return Kept(**values)
    except FileNotFoundError:  # removed meanwhile
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.warning("LoRA²: %s is damaged and is left out: %r.", path, error)
        return None
