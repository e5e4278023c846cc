"""ComfyUI's Cancel, its progress bar, its free memory, and outputs that are not there yet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import comfy.model_management
import comfy.utils
import comfy_execution.graph_utils

from . import surface
from .surface import Part

_CHECK = "throw_exception_if_processing_interrupted"


class ThreadGuard:
    """Replaces ``module.name`` by a version that does nothing in threads that ask for it.

    The original is back in place as soon as no thread asks any more.
    """

    def __init__(self, module: Any, name: str):
        self._module, self._name = module, name
        self._original: Callable[..., Any] = getattr(module, name, lambda: None)
        self._lock = threading.Lock()
        self._users = 0
        self._thread = threading.local()

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """In this thread the function does nothing while the block runs; may be nested."""
        outer = getattr(self._thread, "silent", False)
        with self._lock:
            if self._users == 0:
                self._original = getattr(self._module, self._name)
                setattr(self._module, self._name, self._call)
            self._users += 1
        self._thread.silent = True
        try:
            yield
        finally:
            self._thread.silent = outer
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    setattr(self._module, self._name, self._original)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self._thread, "silent", False):
            return self._original(*args, **kwargs)
        return None


# Cancel is one global flag that every operation checks and the first reader consumes: a training
# thread would steal a prompt's Cancel and die of it. Entered there, this makes it deaf to the flag.
_guard = ThreadGuard(comfy.model_management, _CHECK)


def deaf_to_cancel() -> AbstractContextManager[None]:
    """Inside, this thread does not see ComfyUI's Cancel."""
    return _guard.silenced() if surface.is_there(Part.CANCEL) else nullcontext()


def raise_if_cancelled() -> None:
    """Raises ComfyUI's own interruption when the running prompt was cancelled."""
    if surface.is_there(Part.CANCEL):
        comfy.model_management.throw_exception_if_processing_interrupted()


def progress_bar(total: int) -> Callable[[int], None]:
    """ComfyUI's progress bar of the node that runs now; call it with the steps done."""
    if not surface.is_there(Part.PROGRESS):
        return lambda _done: None
    return comfy.utils.ProgressBar(total).update_absolute


def free_memory() -> int | None:
    """Bytes that are free on the device that trains, as ComfyUI counts them, where it does."""
    if not surface.is_there(Part.MEMORY):
        return None
    device = comfy.model_management.get_torch_device()
    free: Any = comfy.model_management.get_free_memory(device)
    return int(free)


def total_memory() -> int | None:
    """Bytes of the device that trains, free or not, where ComfyUI tells."""
    if not surface.is_there(Part.MEMORY):
        return None
    total: Any = comfy.model_management.get_total_memory(comfy.model_management.get_torch_device())
    return int(total)


def blocked() -> Any:
    """An output of a node that has nothing to give: what depends on it is left out, silently."""
    surface.need(Part.BACKGROUND)
    return comfy_execution.graph_utils.ExecutionBlocker(None)
