"""LoRAs that were opened, and cut, lately: another strength reads no file and computes nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from ..config.load import Limits
from ..files.decode import in_our_layout
from ..files.header import LoRAFileError
from ..files.read import LoRAFile, check_finite, load
from .shrink import shrink

_COUNT = 8
_CUT_BYTES = 1 << 30  # of what was computed; what is only mapped from a file takes no memory


class LoRACache:
    """The last few LoRAs by the content of their files. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[object, Limits], LoRAFile] = OrderedDict()

    def open(self, path: Path, limits: Limits) -> LoRAFile:
        """The LoRA in ``path`` within ``limits``, as any loader reads it; its weights are finite.

        Raises LoRAFileError for a file that is unreadable or damaged.
        """
        key = _identity(path), limits
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return kept
        made = _read(path) if limits.nothing else shrink(self.open(path, Limits()), limits)
        with self._lock:
            self._kept[key] = made
            self._forget()
        return made

    def _forget(self) -> None:
        while len(self._kept) > _COUNT or (len(self._kept) > 1 and self._computed() > _CUT_BYTES):
            self._kept.popitem(last=False)

    def _computed(self) -> int:
        return sum(
            sum(tensor.nbytes for tensor in file.state.values())
            for (_, limits), file in self._kept.items()
            if not limits.nothing
        )


def _read(path: Path) -> LoRAFile:
    file = load(path)
    check_finite(file.state, str(path))
    try:
        return in_our_layout(file)
    except ValueError as error:
        raise LoRAFileError(f"{path} is damaged: {error}") from None


def _identity(path: Path) -> object:
    """Another one whenever the content of the file may be: no file is opened for it."""
    try:
        status = path.stat()
    except OSError:
        return str(path), None  # opening it will tell why
    return str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns
