"""What a benchmark on the demo base is about, and its subjects."""

from __future__ import annotations

from ..plan import DEMO, Plan
from . import demo, scenes, several
from .study import Study

ONE = "one"  # subject in a LoRA: the paper's task
SCENES = "scenes"  # how much of the subject is seen, and told
COMPLEX = "complex"  # scenes of the paper's figures A6 to A9, of a checkpoint
OF_THE_DEMO = (SCENES, *(f"several-{size}" for size in several.SIZES))
TASKS = (ONE, COMPLEX, *OF_THE_DEMO)


def size_of(task: str) -> int:
    """How many subjects a LoRA has to learn."""
    return int(task.rpartition("-")[2]) if task.startswith("several-") else 1


def plan_of(task: str) -> Plan:
    """How much is trained and painted."""
    size = size_of(task)
    return Plan(steps=DEMO.steps // 4 * size, prompts=4) if size > 1 else DEMO


def tested(task: str, prompts: int) -> list[Study]:
    """The studies of a task."""
    if task == SCENES:
        return scenes.cells(prompts)
    size = size_of(task)
    return several.tested(size, prompts) if size > 1 else demo.tested(prompts)


def for_tuning(task: str, prompts: int) -> list[Study]:
    """The studies that its rates are chosen on."""
    size = size_of(task)
    return several.for_tuning(size, prompts) if size > 1 else demo.for_tuning(prompts)


def for_sweep(task: str, prompts: int) -> list[Study]:
    """The studies that the default is chosen on."""
    size = size_of(task)
    return several.for_sweep(size, prompts) if size > 1 else demo.for_sweep(prompts)
