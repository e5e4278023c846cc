"""LoRAs that were opened, and cut, lately: another strength reads no file and computes nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from ..config.load import Limits
from ..files.decode import in_our_layout
from ..files.header import LoRAFileError
from ..files.read import LoRAFile, check_finite, load, unused_alphas
from .shrink import shrink

_COUNT = 8
_MOST_BYTES = 1 << 30  # of all that is kept; the newest is kept whatever it takes


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
        while len(self._kept) > _COUNT or (len(self._kept) > 1 and self._bytes() > _MOST_BYTES):
            self._kept.popitem(last=False)

    def _bytes(self) -> int:
        """Of every tensor once: what was cut shares those that were left as they are."""
        tensors = {id(t): t for file in self._kept.values() for t in file.state.values()}
        return sum(tensor.nbytes for tensor in tensors.values())


def _read(path: Path) -> LoRAFile:
    file = load(path)
    unused = unused_alphas(file.parsed, {key: t.shape for key, t in file.state.items()})
    check_finite({key: t for key, t in file.state.items() if key not in unused}, str(path))
    try:
        ours = in_our_layout(file)
    except ValueError as error:
        raise LoRAFileError(f"{path} is damaged: {error}") from None
    if ours is not file:
        check_finite({k: t for k, t in ours.state.items() if k not in unused}, str(path))
    return ours


def _identity(path: Path) -> object:
    """Another one whenever the content of the file may be: no file is opened for it."""
    try:
        status = path.stat()
    except OSError:
        return str(path), None  # opening it will tell why
    return str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns
