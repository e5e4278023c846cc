"""Files that are whole or not there: written beside their place, then put there at once."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` when the block ends without an error.

    After an error, or a kill, ``path`` is as it was. Raises OSError for a full or closed disk.
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
        os.replace(temporary, path)
    except BaseException:
        if temporary is not None:
            with suppress(OSError):
                Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Delete what a process that was killed while it wrote ``path`` has left beside it."""
    leftover = re.compile(re.escape(f".{path.name}.") + r"[^.]{8}")
    with suppress(OSError):
        for file in path.parent.iterdir():
            if leftover.fullmatch(file.name):
                file.unlink()
