"""ComfyUI's Cancel and its progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils

from ..thread_guard import ThreadGuard

# Cancel is one global flag that every operation checks and the first reader consumes: a training
# thread would steal a prompt's Cancel and die of it. Entered there, this makes it deaf to the flag.
deaf_to_cancel = ThreadGuard(
    comfy.model_management, "throw_exception_if_processing_interrupted"
).silenced


def raise_if_cancelled() -> None:
    """Raises ComfyUI's own interruption when the running prompt was cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def progress_bar(total: int) -> Callable[[int], None]:
    """ComfyUI's progress bar of the node that runs now; call it with the steps done."""
    return comfy.utils.ProgressBar(total).update_absolute


def free_memory() -> int:
    """Bytes that are free on the device that trains, as ComfyUI counts them."""
    device = comfy.model_management.get_torch_device()
    free: Any = comfy.model_management.get_free_memory(device)
    return int(free)
