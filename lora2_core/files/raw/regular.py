"""Regular files alone, opened without ever waiting, and whether one changed meanwhile."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

# What another content changes: file number, bytes, when it was written and when anything of it
# changed in ns; many programs set the first time back.
Stamp = tuple[int, int, int, int]

# A loop of links, a name that is too long: there is no such file.
_NO_PATH = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EISDIR}
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class NotAFile(FileNotFoundError):
    """There is nothing at a path, or something that is no regular file: a pipe, a folder."""


def open_regular(path: Path) -> BinaryIO:
    """A regular file to read from.

    Raises NotAFile for whatever else is there (opening a pipe would wait for its writer), and for a
    path that cannot be one; OSError for a file that may not be read.
    """
    try:
        # Before it is opened, since opening a device may do something by itself; and after, since
        # it may have been replaced.
        _check(os.stat(path))
        handle = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotAFile(str(error)) from None
    except ValueError as error:  # a NUL, half a character
        raise NotAFile(str(error)) from None
    except OSError as error:
        if error.errno in _NO_PATH:
            raise NotAFile(str(error)) from None
        raise
    try:
        _check(os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def stamp_of(file: BinaryIO) -> Stamp:
    """Another one, mostly, once somebody has written to an open file or cut it."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _check(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotAFile("it is no regular file")
