"""The finished steps of a run as a few arrays, to outlive its process.

A run of 5,000 steps on SDXL has 2.8 million ranks to tell, most of them those of the step before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..training.trainer import StepEvent

_FLOATS = ("loss", "prior_loss", "entropy", "rank_term", "gradient", "mean_rank", "seconds")


def pack_events(events: Sequence[StepEvent]) -> dict[str, Any]:
    """The steps 1, 2, … of a run as tensors and plain values; fp64, so nothing is rounded."""
    rows: list[tuple[int, ...]] = []
    row_of: list[int] = []
    for event in events:
        if not rows or event.ranks != rows[-1]:
            rows.append(event.ranks)
        row_of.append(len(rows) - 1)
    probes = [(event.step, event.probe) for event in events if event.probe is not None]
    return {
        **{
            name: torch.tensor([getattr(event, name) for event in events], dtype=torch.float64)
            for name in _FLOATS
        },
        "resized": torch.tensor([event.resized for event in events], dtype=torch.int32),
        "ranks": torch.tensor(rows, dtype=torch.int16),  # (changes, L); no rank is above 4096
        "ranks_of_step": torch.tensor(row_of, dtype=torch.int32),
        "probe_steps": torch.tensor([step for step, _ in probes], dtype=torch.int32),
        "probes": torch.tensor([probe for _, probe in probes], dtype=torch.float64),
    }


def unpack_events(state: Mapping[str, Any], steps: int) -> list[StepEvent]:
    """The events that :func:`pack_events` was given; ``steps``: of the whole run."""
    columns = {name: state[name].tolist() for name in (*_FLOATS, "resized", "ranks_of_step")}
    rows = [tuple(row) for row in state["ranks"].tolist()]  # one tuple for many steps, as before
    steps_of_probes = state["probe_steps"].tolist()
    probes = dict(zip(steps_of_probes, state["probes"].tolist(), strict=True))
    return [
        StepEvent(
            step=place + 1,
            steps=steps,
            ranks=rows[columns["ranks_of_step"][place]],
            resized=columns["resized"][place],
            probe=probes.get(place + 1),
            **{name: columns[name][place] for name in _FLOATS},
        )
        for place in range(len(columns["loss"]))
    ]
