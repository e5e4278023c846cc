"""Figures of the trained base: what its autoencoder keeps, what it paints, how fast it is.

Two judges of different build read the pictures; they have seen neither a sample of a model nor a
subject that it may be personalised to. ``python -m bench.paper`` measures how it learns those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .autoencoder import vae_figures
from .figures import flattened, write_json
from .parts import Parts, load_parts
from .prompts import base_figures
from .speed import speed_figures

PARTS = ("vae", "base", "speed")


def evaluate(out: Path, wanted: Sequence[str] = PARTS, prompts: int = 500) -> dict[str, Any]:
    """Return the figures of the wanted parts; print them and write them, and grids, to ``out``.

    Figures of other parts that ``out/evaluation.json`` holds stay there. Raises SystemExit for a
    part or a number that makes no sense, or when the judges' weights are missing.
    """
    _check(wanted, prompts)
    out.mkdir(parents=True, exist_ok=True)
    parts = load_parts(judged=any(name != "speed" for name in wanted))
    return run_parts(parts, out, wanted, prompts)


def run_parts(parts: Parts, out: Path, wanted: Sequence[str], prompts: int) -> dict[str, Any]:
    """Do what :func:`evaluate` does with a base that is loaded already."""
    work = {
        "vae": lambda: vae_figures(parts),
        "base": lambda: base_figures(parts, out / "samples.png", prompts),
        "speed": lambda: speed_figures(parts),
    }
    file = out / "evaluation.json"
    figures = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    weights = parts.fingerprint()  # parts may be of different days
    for name in wanted:
        figures[name] = {"weights": weights} | work[name]()
        write_json(file, figures)
        for path, value in flattened(figures[name], name):
            print(f"{path:<72} {value:.5g}", flush=True)
    return figures


def _check(wanted: Sequence[str], prompts: int) -> None:
    if unknown := sorted(set(wanted) - set(PARTS)):
        raise SystemExit(f"--parts knows no {unknown[0]!r}; choose from {', '.join(PARTS)}.")
    if prompts < 1:
        raise SystemExit(f"--prompts is {prompts}; it takes at least 1, and 500 by default.")
