"""Figures: shares of a way, nested ones told line by line, and their JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def share_of_the_way(reached: float, start: float, end: float) -> float:
    """Return where a value lies between two: 0 at the start, 1 at the end; NaN if they are one."""
    return (reached - start) / (end - start) if end != start else float("nan")


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    os.replace(temporary, file)


def flattened(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of nested figures with its path; not those of single prompts."""
    for name, value in values.items():
        path = f"{above} / {name}" if above else name
        if isinstance(value, Mapping):
            yield from flattened(value, path)
        elif isinstance(value, (int, float)):
            yield path, value
