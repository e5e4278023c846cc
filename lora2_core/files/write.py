"""Files written whole or not at all, and errors that say what is needed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .atomic import replacing
from .header import LoRAFileError


class NotWritten(LoRAFileError):
    """A file's place cannot be written to; another may be."""


def write_atomically(path: Path, data: bytes) -> None:
    """``data`` in ``path``, whole or not at all. Raises NotWritten on a full or closed disk."""
    with writing(path, len(data)) as file:
        file.write(data)


@contextmanager
def writing(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """As :func:`.atomic.replacing`, but an OSError becomes NotWritten: what is needed."""
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise NotWritten(
            f"{path} could not be written ({error.strerror or error}); it needs "
            f"{nbytes / 1e6:.1f} MB. Free some space or choose another output folder."
        ) from error


def check_writable(path: Path, nbytes: int) -> None:
    """Before training: can ``nbytes`` be written to ``path``? Raises LoRAFileError if not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise LoRAFileError(
            f"{path.parent} cannot be written to ({error.strerror or error}); make it writable or "
            "choose another output folder."
        ) from error
    if free < nbytes:
        raise LoRAFileError(
            f"The disk of {path.parent} is full: the LoRA needs {nbytes / 1e6:.1f} MB and "
            f"{free / 1e6:.1f} MB are free. Free some space first."
        )
