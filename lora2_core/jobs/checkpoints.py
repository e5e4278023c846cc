"""The checkpoints of trainings that were stopped: some are kept for a while, all can be deleted.

A training that a person stops may be gone on with by running it again; most never are. What is
under way, and what the end of the process has cut off, is never touched.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..files.atomic import remove_leftovers_in

KEPT = 10  # of trainings that are over, the newest
KEPT_SECONDS = 30 * 24 * 3600.0
# As RunKeeper names them; LoRAs that found no other place lie here under names of their own.
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors(\.damaged)?")


@dataclass(frozen=True)
class Unused:
    """What could be deleted."""

    count: int
    nbytes: int


class CheckpointFolder:
    """All checkpoints in ``folder``; ``in_use``: the hashes of the runs that still need theirs.

    No accident with one is raised: it is logged, and the file stays.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def measure(self, in_use: Collection[str]) -> Unused:
        """How many nobody needs, and the bytes that they take."""
        found = self._unused(in_use)
        return Unused(len(found), sum(nbytes for _, _, nbytes in found))

    def tidy(self, in_use: Collection[str]) -> None:
        """Delete those beyond the newest KEPT and those older than KEPT_SECONDS, and what a killed
        process left half written."""
        remove_leftovers_in(self.folder, ".safetensors")
        oldest = time.time() - KEPT_SECONDS
        for number, (written, path, _) in enumerate(self._unused(in_use)):
            if number >= KEPT or written < oldest:
                _delete(path)

    def clear(self, in_use: Collection[str]) -> None:
        """Delete all that nobody needs."""
        for _, path, _ in self._unused(in_use):
            _delete(path)

    def _unused(self, in_use: Collection[str]) -> list[tuple[float, Path, int]]:
        needed = {f"{run}.safetensors" for run in in_use}
        return [one for one in newest_first(self.folder) if one[1].name not in needed]


def newest_first(folder: Path) -> list[tuple[float, Path, int]]:
    """(when written, path, bytes) of every checkpoint, damaged ones (.damaged) included."""
    found: list[tuple[float, Path, int]] = []
    try:
        paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    except OSError:  # there was no training yet, or none may look
        return found
    for path in paths:
        try:
            status = path.lstat()
        except OSError:  # gone meanwhile
            continue
        found.append((status.st_mtime, path, status.st_size))
    return sorted(found, reverse=True)


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logging.warning("LoRA²: %s could not be deleted: %s.", path, error.strerror or error)
