"""Files that are whole or not there: written beside their place, then put there at once."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_LEFT_SECONDS = 3600.0  # without a byte written, where nothing else tells that nobody writes


class NameTaken(FileExistsError):
    """There is a file under the name that a new one was to get."""


@contextmanager
def replacing(path: Path, new: bool = False) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` when the block ends without an error.

    After an error, or a kill, ``path`` is as it was. ``new``: nothing is ever replaced; raises
    NameTaken when there is something at ``path`` by then. Raises OSError for a full or closed disk.
    """
    temporary: str | None = None
    owner: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _begin(path)
        # Whoever looks for leftovers must see an owner until the file has its name.
        owner = None if sys.platform == "win32" else os.dup(handle)
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
    finally:
        if owner is not None:
            os.close(owner)


def _begin(path: Path) -> tuple[int, str]:
    """An open temporary beside ``path``, held against :func:`remove_leftovers`; and its name."""
    while True:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        _hold(handle, wait=True)
        if os.path.lexists(temporary):
            return handle, temporary
        os.close(handle)  # it was taken for a leftover before it was held


def _hold(handle: int, wait: bool) -> bool | None:
    """Hold an open file until this process ends or closes it; False where another holds it.

    None where that cannot be told: on Windows, which deletes no open file, and on file systems
    without locks.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


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
    """Delete what a process that was killed while it wrote ``path`` has left beside it.

    What a living process writes is held by it. Where nothing can be held, a file is left behind
    when nobody has written to it for an hour.
    """
    _sweep(path.parent, re.compile(re.escape(f".{path.name}.") + r"[^.]{8}"))


def remove_leftovers_in(folder: Path, suffix: str) -> None:
    """:func:`remove_leftovers` of every file of ``folder`` whose name ends in ``suffix``."""
    _sweep(folder, re.compile(r"\..+" + re.escape(suffix) + r"\.[^.]{8}"))


def _sweep(folder: Path, leftover: re.Pattern[str]) -> None:
    with suppress(OSError):
        for file in list(folder.iterdir()):
            if leftover.fullmatch(file.name):
                with suppress(OSError):
                    _remove_if_left(file)


def _remove_if_left(file: Path) -> None:
    old = time.time() - file.stat().st_mtime > _LEFT_SECONDS
    handle = os.open(file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        held = _hold(handle, wait=False)
        if held:
            file.unlink()
    finally:
        os.close(handle)
    if held is None and old:
        file.unlink()
