"""One line of the result, as the JSON has it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .plan import Cell

MEASURED, NO_ROOM, MISSING = "measured", "does not fit", "missing"
NOT_REACHED, FAILED = "not reached", "failed"
STATUSES = (MEASURED, NO_ROOM, MISSING, NOT_REACHED, FAILED)


@dataclass(frozen=True)
class Row:
    """A cell and what was found; None where a device does not tell it, or nothing was measured.

    Memory in MB (10⁶ bytes), times in milliseconds.
    """

    model: str
    size_px: int
    batch: int
    precision: str
    checkpointing: bool
    contestant: str
    preset: str  # of ours; empty for others
    status: str  # of STATUSES
    note: str = ""  # why there is no figure, or what a figure is of
    step_ms: float | None = None  # median
    steps_timed: int = 0
    in_turns: bool = False  # whether they were timed between those of the others
    of_floor: float | None = None  # step_ms of the floor's
    peak_allocated_mb: float | None = None  # of this contestant alone on the card
    peak_reserved_mb: float | None = None
    told_mb: float | None = None  # training.memory.counted on this model
    scaled_mb: float | None = None  # training.memory.scaled of SDXL's, or of the first one counted
    told_of_taken: float | None = None  # told_mb of peak_allocated_mb
    told_ms: float | None = None  # what training.estimate makes of two forward passes
    kernels: int | None = None  # in a step; on a CPU calls of PyTorch's operators
    idle: float | None = None  # share of step_ms in which the card computed nothing

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            known = ", ".join(STATUSES)
            raise ValueError(f"status is {self.status!r}; choose one of {known}.")
        if self.status == MEASURED and not (self.step_ms and math.isfinite(self.step_ms)):
            raise ValueError(f"step_ms is {self.step_ms}; a measured step takes time.")
        if self.status != MEASURED and not self.note:
            raise ValueError(f"A row that is {self.status!r} needs a note that says why.")

    @classmethod
    def of(cls, cell: Cell, status: str, note: str, **figures: Any) -> Row:
        """What ``cell`` came to."""
        shape = cell.shape
        return cls(
            shape.model, shape.size, shape.batch, shape.precision, shape.checkpointing,
            cell.contestant, cell.preset, status, note, **figures,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def share(part: float | None, whole: float | None) -> float | None:
    """``part`` of ``whole``; None where one of them is not known."""
    return None if part is None or not whole else part / whole
