"""Files that are whole or not there: written beside their place, then put there at once."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class NameTaken(FileExistsError):
    """There is a file under the name that a new one was to get."""


@contextmanager
def replacing(path: Path, new: bool = False) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` when the block ends without an error.

    After an error, or a kill, ``path`` is as it was. ``new``: nothing is ever replaced; raises
    NameTaken when there is something at ``path`` by then. Raises OSError for a full or closed disk.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's 0600 would hide the file from other users; exFAT, vfat and SMB have no such
        # modes and may refuse.
        with suppress(OSError):
            os.chmod(temporary, 0o644)
        if new:
            _put_new(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException:
        if temporary is not None:
            with suppress(OSError):
                Path(temporary).unlink(missing_ok=True)
        raise


def _put_new(temporary: str, path: Path) -> None:
    """Give ``temporary`` the name ``path``, which nothing may have: in one step where there are
    hard links; else (exFAT, vfat, some shares) the name is held by an empty file first."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise NameTaken(*error.args) from error
    except OSError:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError as error:
            raise NameTaken(*error.args) from error
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise
    else:
        with suppress(OSError):  # a name too many, and the file is there
            os.unlink(temporary)


def remove_leftovers(path: Path) -> None:
    """Delete what a process that was killed while it wrote ``path`` has left beside it."""
    leftover = re.compile(re.escape(f".{path.name}.") + r"[^.]{8}")
    with suppress(OSError):
        for file in path.parent.iterdir():
            if leftover.fullmatch(file.name):
                file.unlink()
