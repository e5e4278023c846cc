"""What the tests of bench/gpu.py share: cells of one tiny shape, and their measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lora2_pack.bench.gpu_cells import contestants, plan
from lora2_pack.bench.gpu_cells.contestants import Contestant
from lora2_pack.bench.gpu_cells.meters import Cpu
from lora2_pack.bench.gpu_cells.rows import Row
from lora2_pack.bench.gpu_cells.running import Bench, Rounds

QUICK = Rounds(warm_up=1, alone=1, together=1)
FIRST = plan.cells(tiny=True)[0].shape


def group(*names: str) -> list[plan.Cell]:
    """Cells of the first tiny shape."""
    return [
        cell
        for cell in plan.cells(tiny=True)
        if cell.shape == FIRST and any(name in cell.contestant for name in names)
    ]


def by_name(rows: Iterable[Row]) -> dict[str, Row]:
    return {row.contestant: row for row in rows}


def measure(cells: list[plan.Cell], meter: Any = None, **more: Any) -> dict[str, Row]:
    bench = Bench(meter or Cpu(), QUICK, more.pop("until", float("inf")), True, **more)
    return by_name(row for rows in bench.run(cells) for row in rows)


def stepping(step: Callable[[], Any]) -> Contestant:
    return Contestant(contestants._driving(step), step)
