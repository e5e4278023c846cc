"""Arithmetic of figures: shares of a way, comparisons by pairs, means, and their JSON."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

NOISE = 2.0  # standard errors; a smaller difference counts as none


def shares(
    after: Mapping[str, Any], base: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, float]:
    """Return for each judge which share of the way a method goes, and the mean of these.

    The way leads from the base's likeness, 0, to that of the subject itself, 1.
    """
    found = {
        judge: share_of_the_way(after[judge]["mean"], base[judge]["mean"], own[judge]["mean"])
        for judge in after
    }
    return found | {"mean": statistics.fmean(found.values())}


def share_of_the_way(reached: float, start: float, end: float) -> float:
    """Return where a value lies between two: 0 at the start, 1 at the end; NaN if they are one."""
    return (reached - start) / (end - start) if end != start else float("nan")


def comparison(
    lows: Sequence[Mapping[str, Any]], highs: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Compare two methods subject by subject, for each judge and for the mean of all judges.

    ``lows`` and ``highs`` hold for each subject each judge's likeness, prompt by prompt.
    """
    found = {}
    for judge in (*lows[0], "all"):
        pairs = [
            paired(_each(low, judge), _each(high, judge))
            for low, high in zip(lows, highs, strict=True)
        ]
        found[judge] = {
            "second minus first": statistics.fmean(difference for difference, _ in pairs),
            "second better": sum(difference > NOISE * error for difference, error in pairs),
            "first better": sum(difference < -NOISE * error for difference, error in pairs),
        }
    return found


def paired(low: Sequence[float], high: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of pairs and its standard error."""
    differences = [b - a for a, b in zip(low, high, strict=True)]
    if len(differences) < 2:
        return differences[0], float("inf")  # one pair tells nothing of the noise
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.fmean(differences), error


def mean_over(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over rows of each of their numbers."""
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


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


def _each(judged: Mapping[str, Any], judge: str) -> list[float]:
    """Return the likeness prompt by prompt of a judge, or the mean of all judges."""
    if judge != "all":
        return judged[judge]["each"]
    return [
        statistics.fmean(one) for one in zip(*(v["each"] for v in judged.values()), strict=True)
    ]
