"""Files written whole or not at all, and errors that say what is needed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from .atomic import NameTaken, replacing
from .header import LoRAFileError

_NUMBER = re.compile(r"\d+(?=_?$)")  # of subject_00001_, as ComfyUI counts

Written = TypeVar("Written")


class NotWritten(LoRAFileError):
    """A file's place cannot be written to; another may be."""


def write_atomically(path: Path, data: bytes, new: bool = False) -> None:
    """``data`` in ``path``, whole or not at all. Raises as :func:`writing` does."""
    with writing(path, len(data), new) as file:
        file.write(data)


@contextmanager
def writing(path: Path, nbytes: int, new: bool = False) -> Iterator[BinaryIO]:
    """As :func:`.atomic.replacing`, but an OSError becomes NotWritten: what is needed."""
    try:
        with replacing(path, new) as file:
            yield file
    except NameTaken:
        raise
    except OSError as error:
        raise NotWritten(
            f"{path} could not be written ({error.strerror or error}); it needs "
            f"{nbytes / 1e6:.1f} MB. Free some space or choose another output folder."
        ) from error


def write_beside_others(
    path: Path, write: Callable[[Path, bool], Written], own: Callable[[Path], bool]
) -> Written:
    """``write(path, new)`` over nothing but what is ``own``: the first number whose name is free,
    or has such a file, is taken. ``write`` raises NameTaken where ``new`` and the name is gone.
    """
    while True:
        if own(path):
            return write(path, False)
        if not os.path.lexists(path):  # a link that leads nowhere has the name, too
            try:
                return write(path, True)
            except NameTaken:
                pass
        path = next_number(path)


def next_free(path: Path) -> Path:
    """``path``, or with the next number under which there is nothing."""
    while os.path.lexists(path):
        path = next_number(path)
    return path


def next_number(path: Path) -> Path:
    """subject_00001_ → subject_00002_; subject → subject_00002_."""
    number = _NUMBER.search(path.stem)
    if number is None:
        return path.with_name(f"{path.stem}_00002_{path.suffix}")
    count = f"{int(number[0]) + 1:0{len(number[0])}}"
    stem = f"{path.stem[: number.start()]}{count}{path.stem[number.end() :]}"
    return path.with_name(stem + path.suffix)


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
