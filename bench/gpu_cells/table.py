"""The result as a table in Markdown: every figure is one of the JSON object."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .rows import MEASURED, NOT_REACHED

COLUMNS = (
    "model", "px", "batch", "in", "who", "ms a step", "of the floor", "GB at the peak",
    "GB reserved", "GB told (scaled)", "kernels", "idle",
)  # fmt: skip
_LEFT = {"model", "in", "who"}


def markdown(found: dict[str, Any]) -> str:
    """A paragraph with the circumstances, the table, and what is not in it."""
    rows = found["rows"]
    reached = [row for row in rows if row["status"] != NOT_REACHED]
    parts = [_circumstances(found)]
    if reached:
        notes: list[str] = []
        lines = [_line(COLUMNS), _line("---" if c in _LEFT else "---:" for c in COLUMNS)]
        lines += [_line(_cells(row, notes)) for row in reached]
        parts += ["\n".join(lines)]
        parts += ["\n".join(f"{n}. {_escaped(note)}" for n, note in enumerate(notes, 1))]
    parts += [_not_reached(rows, found["minutes"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _circumstances(found: dict[str, Any]) -> str:
    card = found["card"]
    memory = f", {card['memory_mb'] / 1e3:.1f} GB" if card["memory_mb"] else ""
    shapes = " Shapes are tiny ones, which say nothing of real models." if found["tiny"] else ""
    on_cpu = " Memory and idle time are not measured on a CPU." if found["device"] == "cpu" else ""
    return (
        f"{card['name']}{memory}; driver {found['driver']}, PyTorch {found['torch']}, CUDA "
        f"{found['cuda']}, ComfyUI {found['comfyui']}; commit {found['commit'][:12]}, "
        f"{found['date'][:10]}: `{found['command']}`.{shapes}{on_cpu}"
    )


def _cells(row: dict[str, Any], notes: list[str]) -> list[str]:
    who = row["contestant"]
    if row["note"]:
        if row["note"] not in notes:
            notes.append(row["note"])
        who += f" ({notes.index(row['note']) + 1})"
    start = [row["model"], str(row["size_px"]), str(row["batch"]), row["precision"], who]
    if row["status"] != MEASURED:
        return [*start, row["status"], *[""] * (len(COLUMNS) - len(start) - 1)]
    told = _gigabytes(row["told_mb"])
    if row["scaled_mb"] is not None:
        told += f" ({_gigabytes(row['scaled_mb'])})"
    return [
        *start,
        f"{row['step_ms']:,.1f}",
        "" if row["of_floor"] is None else f"{row['of_floor']:.2f}",
        _gigabytes(row["peak_allocated_mb"]),
        _gigabytes(row["peak_reserved_mb"]),
        told,
        "" if row["kernels"] is None else f"{row['kernels']:,}",
        "" if row["idle"] is None else f"{row['idle']:.0%}",
    ]


def _not_reached(rows: list[dict[str, Any]], minutes: float) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        if row["status"] == NOT_REACHED:
            shape = f"{row['model']} {row['size_px']} px batch {row['batch']} {row['precision']}"
            counts[shape] = counts.get(shape, 0) + 1
    if not counts:
        return ""
    listed = ", ".join(f"{shape} ({count})" for shape, count in counts.items())
    return f"Not reached in {minutes:g} minutes, {sum(counts.values())} cells: {listed}."


def _gigabytes(megabytes: float | None) -> str:
    return "" if megabytes is None else f"{megabytes / 1e3:.2f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
