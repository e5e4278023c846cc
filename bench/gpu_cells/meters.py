"""What a device tells of a step: time, memory and kernels. Only this file calls torch.cuda."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

_COPIES = ("Memcpy", "Memset")
# What spans kernels on a card's own line of a profile, or waits for them.
_SPANS = ("Optimizer.", "ProfilerStep", "Context Sync", "Stream Sync", "Event Sync", "Stream Wait")


@dataclass
class Profile:
    """Of one step; None where the profiler tells nothing.

    ``busy``: seconds in which the card computed anything.
    """

    kernels: int | None = None
    busy: float | None = None


@dataclass(frozen=True)
class Peak:
    """Bytes at their highest."""

    allocated: int
    reserved: int


class Meter(Protocol):
    device: torch.device

    def now(self) -> float:
        """Seconds, once all work so far is done."""
        ...

    def begin(self) -> None:
        """Forget the highest memory so far."""
        ...

    def peak(self) -> Peak | None:
        """The highest memory since :meth:`begin`; None where the device does not tell."""
        ...

    def held(self) -> int | None:
        """Bytes in use now."""
        ...

    def room(self) -> int | None:
        """Bytes that this process can have in all."""
        ...

    def release(self) -> None:
        """Give back what nothing holds any more."""
        ...

    def profiling(self) -> Any:
        """A context that fills the Profile it gives."""
        ...


class Cpu:
    """Time, and PyTorch's operators in the place of kernels; memory is not measured."""

    device = torch.device("cpu")

    def now(self) -> float:
        return time.perf_counter()

    def begin(self) -> None:
        """Nothing is remembered."""

    def peak(self) -> None:
        return None

    def held(self) -> None:
        return None

    def room(self) -> None:
        return None

    def release(self) -> None:
        gc.collect()

    @contextmanager
    def profiling(self) -> Iterator[Profile]:
        found = Profile()
        with profile(activities=[ProfilerActivity.CPU]) as running:
            yield found
        found.kernels = operators(raw_events(running))


class Cuda:
    """A card."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def begin(self) -> None:
        torch.cuda.empty_cache()  # so that what is reserved is of these steps
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> Peak:
        return Peak(
            torch.cuda.max_memory_allocated(self.device),
            torch.cuda.max_memory_reserved(self.device),
        )

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def room(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    @contextmanager
    def profiling(self) -> Iterator[Profile]:
        found = Profile()
        if ProfilerActivity.CUDA not in supported_activities():
            yield found  # this PyTorch was built without what watches a card
            return
        with profile(activities=[ProfilerActivity.CUDA]) as running:
            yield found
            torch.cuda.synchronize(self.device)
        kernels, busy = on_card(raw_events(running))
        if kernels:  # none: this user may not profile the card
            found.kernels, found.busy = kernels, busy


def meter(device: str) -> Meter:
    """The one of ``device``. Raises ValueError, with what to do, where there is no such device."""
    if device == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        raise ValueError(
            f"PyTorch {torch.__version__} finds no CUDA card here: run this on a machine with one, "
            "or try it out with --device cpu --tiny."
        )
    found = torch.device(device)
    if found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        raise ValueError(f"--device is {device}, and there are {count} cards: use cuda:0.")
    torch.cuda.set_device(found)
    return Cuda(found)


def raw_events(running: profile) -> list[Any]:
    """What the profiler has seen, as it has it: ``events()`` takes seconds to make its tree."""
    results = running.profiler and running.profiler.kineto_results
    return list(results.events()) if results else []


def operators(events: Iterable[Any]) -> int:
    """How many of a profile's events are calls of PyTorch's operators."""
    return sum(event.name().startswith("aten::") for event in events)


def on_card(events: Iterable[Any]) -> tuple[int, float]:
    """Kernels launched, and seconds in which the card was busy, copies included.

    What people name in a profile, optimizers among it, spans kernels and is none. Kernels that ran
    side by side count once in the time.
    """
    work = [event for event in events if _is_work(event)]
    busy, until = 0, 0
    for start, length in sorted((event.start_ns(), event.duration_ns()) for event in work):
        end = start + length
        busy += max(0, end - max(start, until))
        until = max(until, end)
    kernels = sum(not event.name().startswith(_COPIES) for event in work)
    return kernels, busy / 1e9


def _is_work(event: Any) -> bool:
    if event.device_type().name != "CUDA" or event.name().startswith(_SPANS):
        return False
    return not (hasattr(event, "is_user_annotation") and event.is_user_annotation())
