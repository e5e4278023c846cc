"""Which cells there are, and in which order: the most interesting first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ...lora2_core.config.presets import PRESETS, build_config
from ...lora2_core.config.train import AS_PRECISION, TrainConfig

MODELS = ("SDXL", "KOALA-700m")
WANTED = (
    "12 GB",
    "paper (SDXL)",
    "paper (KOALA-700m)",
    "8 GB",
    "6 GB",
    "4 GB",
)  # where there is one
PRECISIONS = ("bf16", "fp16")
BATCHES = (1, 4)
SIZES = (1024, 768)  # px
TINY_SIZES = (128, 64)
# Every pair of a model, a size and a precision once; in fp16, which CPUs are slow at, one image.
_TINY = (
    ("SDXL", 128, 1, "bf16"),
    ("SDXL", 64, 1, "fp16"),
    ("KOALA-700m", 128, 1, "fp16"),
    ("KOALA-700m", 64, 4, "bf16"),
)
RANK = 16  # of every rival; the mean rank of our default
FLOOR, KOHYA, PEFT, NODE = "frozen floor", "plain LoRA, as kohya's", "PEFT", "TrainLoraNode"
RIVALS = (FLOOR, KOHYA, PEFT, NODE)
# What no preset names; the schedule and the loss on fixed noise have no part in a step's cost.
_WIDGETS = {"mode": "balanced", "learning_rate": 1e-4, "probes": 0}


@dataclass(frozen=True)
class Shape:
    """What all contestants of one group have in common."""

    model: str  # of MODELS
    size: int  # px
    batch: int
    precision: str
    checkpointing: bool
    optimizer: str

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model is {self.model!r}; choose one of {', '.join(MODELS)}.")
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precision is {self.precision!r}; choose one of {known}.")
        if self.size < 64 or self.size % 32 or self.batch < 1:
            raise ValueError(
                f"size is {self.size} px and batch {self.batch}; use a multiple of 32 from 64 on, "
                "and a batch of at least 1."
            )

    def text(self) -> str:
        """For people."""
        return f"{self.model}, {self.size} px, batch {self.batch}, {self.precision}"


@dataclass(frozen=True)
class Cell:
    """One contestant in one shape. ``preset``: of ours, whose settings ``config`` has; those of
    rivals lend it their optimizer and nothing else."""

    shape: Shape
    contestant: str
    config: TrainConfig
    preset: str = ""


def cells(tiny: bool = False) -> list[Cell]:
    """Every cell, grouped by shape, the most interesting first; ``tiny``: of four small shapes."""
    groups: dict[Shape, list[Cell]] = {}
    for shape, preset, config in _ours(TINY_SIZES if tiny else SIZES):
        found = groups.setdefault(shape, [])
        if all(cell.config != config for cell in found):  # presets may differ in the size alone
            found.append(Cell(shape, f"LoRA², {preset}", config, preset))
    found = []
    for shape in sorted(groups, key=_departures):
        if tiny and _facts(shape) not in _TINY:
            continue
        first, *others = groups[shape]
        rivals = [Cell(shape, name, first.config) for name in RIVALS]
        found += [first, *rivals, *others]
    return found


def _ours(sizes: tuple[int, ...]) -> Iterator[tuple[Shape, str, TrainConfig]]:
    for model, size, batch, precision in itertools.product(MODELS, sizes, BATCHES, PRECISIONS):
        for preset in WANTED:
            if preset not in PRESETS or (preset.startswith("paper") and model not in preset):
                continue
            config = dataclasses.replace(
                build_config(_WIDGETS, preset),
                resolution=size,
                batch_size=batch,
                precision=precision,
            )
            checkpointing, optimizer = config.gradient_checkpointing, config.optimizer.name
            yield Shape(model, size, batch, precision, checkpointing, optimizer), preset, config


def keeps_its_own(cell: Cell) -> bool:
    """Whether the contestant keeps frozen weights in a way of its own, and cannot share them."""
    config = cell.config
    own = config.frozen_weights != AS_PRECISION or config.block_swap is True
    return bool(cell.preset) and own


def _facts(shape: Shape) -> tuple[str, int, int, str]:
    return shape.model, shape.size, shape.batch, shape.precision


def _departures(shape: Shape) -> tuple[int, ...]:
    """How far a shape is from what most people train: batch 1 in bf16, large, on SDXL."""
    precision, batch = PRECISIONS.index(shape.precision), BATCHES.index(shape.batch)
    model, small = MODELS.index(shape.model), int(shape.size in (SIZES[1], TINY_SIZES[1]))
    return precision + batch + model + small, precision, batch, model, small
