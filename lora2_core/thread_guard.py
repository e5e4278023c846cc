"""Silence one global function in one thread and leave it alone in all others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class ThreadGuard:
    """Replaces ``module.name`` by a version that does nothing in threads that ask for it.

    The original is back in place as soon as no thread asks any more.
    """

    def __init__(self, module: Any, name: str):
        self._module, self._name = module, name
        self._original: Callable[..., Any] = getattr(module, name)
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
