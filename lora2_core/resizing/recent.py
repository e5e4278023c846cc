"""LoRAs that were opened, and cut, lately: another strength reads no file and computes nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config.load import Limits
from ..files.decode import in_our_layout, is_foreign
from ..files.header import LoRAFileError
from ..files.read import LoRAFile, check_finite, load
from .shrink import shrink_state

_COUNT = 8
_CUT_BYTES = 1 << 30  # of what was computed; what is only mapped from a file takes no memory


@dataclass(frozen=True)
class Opened:
    """A LoRA as it is to be applied. ``state`` must not be changed."""

    path: Path
    state: Mapping[str, Tensor]
    metadata: Mapping[str, str]


class LoRACache:
    """The last few LoRAs by the content of their files. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[object, Limits], Opened] = OrderedDict()

    def open(self, path: Path, limits: Limits) -> Opened:
        """The LoRA in ``path`` within ``limits``; whether its weights are finite has been checked.

        Raises LoRAFileError for a file that is unreadable or damaged.
        """
        key = _identity(path), limits
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        if limits.nothing:
            file = load(path)
            check_finite(file.state, str(path))
            made = Opened(path, _readable(path, file), file.metadata)
        else:
            whole = self.open(path, Limits())
            made = Opened(path, shrink_state(whole.state, limits), whole.metadata)
        with self._lock:
            self._kept[key] = made
            self._forget()
        return made

    def _forget(self) -> None:
        while len(self._kept) > _COUNT or (len(self._kept) > 1 and self._computed() > _CUT_BYTES):
            self._kept.popitem(last=False)

    def _computed(self) -> int:
        return sum(
            sum(tensor.nbytes for tensor in opened.state.values())
            for (_, limits), opened in self._kept.items()
            if not limits.nothing
        )


def _readable(path: Path, file: LoRAFile) -> Mapping[str, Tensor]:
    """The state as any loader reads it."""
    if not is_foreign(file.state):
        return file.state
    try:
        return in_our_layout(file.state, file.metadata)
    except ValueError as error:
        raise LoRAFileError(f"{path} is damaged: {error}") from None


def _identity(path: Path) -> object:
    """Another one whenever the content of the file may be: no file is opened for it."""
    try:
        found = path.stat()
    except OSError:
        return str(path), None  # opening it will tell why
    return str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns
