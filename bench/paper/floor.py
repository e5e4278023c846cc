"""How much of each judge's likeness is left when the subject is painted over in grey.

Of the eleven drawn subjects themselves, in the ten places that the benchmark asks for. What is left
is the judge's floor: it comes from places and layout.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ...tools.tiny_sdxl.pictures import to_pixels
from ...tools.tiny_sdxl.world.subjects import View
from .bases.protocol import Base
from .subjects import demo
from .subjects.study import Study


def measured(base: Base, studies: Sequence[Study]) -> dict[str, dict[str, float]]:
    """Judge → its likeness of the subjects themselves, and what is left of it without them: the
    mean over subjects, and the most."""
    itself = [_judged(base, study, study.own) for study in studies]
    greyed = [_judged(base, study, demo.greyed(study)) for study in studies]
    found: dict[str, dict[str, float]] = {}
    for judge in itself[0]:
        left = [told[judge] for told in greyed]
        found[judge] = {
            "itself": round(statistics.fmean(told[judge] for told in itself), 3),
            "greyed": round(statistics.fmean(left), 3),
            "most": round(max(left), 3),
        }
    return found


def _judged(base: Base, study: Study, views: Sequence[View]) -> Mapping[str, float]:
    said = base.judge(study, to_pixels(view.image for view in views), range(len(views)))
    return {
        judge: statistics.fmean(told.get("likeness") or told["outside"])
        for judge, told in said.items()
    }
