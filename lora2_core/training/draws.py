"""What steps draw, in their order: ahead of need where a GPU computes meanwhile, and undone where
a step fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapters.pinning import empty_pinned
from .task import Task

Position = tuple[Tensor, Any]  # of the generator and of the task


class Draws:
    """Batches of ``size`` that ``task`` draws. ``position``: before the draw to come, whether it
    has been made ahead or not."""

    def __init__(self, task: Task, seed: int, size: int):
        self.task, self.size = task, size
        self.generator = torch.Generator().manual_seed(seed)
        self._ahead: tuple[Any, Position] | None = None

    def next(self) -> Any:
        """The next batch."""
        if self._ahead is None:
            return self.task.draw(self.generator, self.size)
        batch, self._ahead = self._ahead[0], None
        return batch

    def look_ahead(self) -> None:
        """Make the next draw now. One that fails is left to the step that it is for."""
        if self._ahead is not None:
            return
        before = self.position
        try:
            self._ahead = self.task.draw(self.generator, self.size), before
        except Exception:
            self.position = before

    @property
    def position(self) -> Position:
        if self._ahead is not None:
            return self._ahead[1]
        return self.generator.get_state(), self.task.state()

    @position.setter
    def position(self, position: Position) -> None:
        self._ahead = None
        self.generator.set_state(position[0])
        self.task.load_state(position[1])


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to bring ``tensor`` to the host; what is returned waits for it."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    host = empty_pinned(tensor.shape, tensor.dtype)
    if host is None:
        return tensor.cpu
    host.copy_(tensor, non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def wait() -> Tensor:
        there.synchronize()
        return host

    return wait


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` there, without waiting for what the device computes now."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        host = empty_pinned(tensor.shape, tensor.dtype)
        if host is not None:
            return host.copy_(tensor).to(device, non_blocking=True)
    return tensor.to(device)
