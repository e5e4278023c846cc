"""Grids of what was painted, of the subjects that the paper's figures show, or of some others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...tools.tiny_sdxl.pictures import read_strip, to_pictures
from .methods import KEPT, OURS
from .report import grids
from .runs.trial import Bench, Work
from .subjects import table_a1
from .subjects.study import Study

MANY = 4  # subjects, where the paper names none


def draw(bench: Bench, studies: Sequence[Study], folder: Path) -> dict[str, Path]:
    """A grid of each subject whose pictures are still there, by its name: the paper's ranks 8, 64
    and 512, or what comes near, and ours, as it is saved."""
    plain = [name for name, method in bench.methods.items() if method.plain]
    names = [plain[0], plain[len(plain) // 2], plain[-1], OURS, OURS + KEPT]
    theirs = [study for study in studies if study.name in table_a1.FIGURES]
    chosen = theirs or studies[:: max(1, len(studies) // MANY)][:MANY]
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    for study in chosen:
        prompts = table_a1.shown(study.name, study.prompts)
        rows = {}
        for name in dict.fromkeys(names):
            strip = bench.file(Work(study, name, 0, bench.rates.get(name))).with_suffix(".png")
            if strip.is_file():
                title = bench.methods[name].label + " (calibrated)" * name.endswith(KEPT)
                rows[title] = _of(strip, prompts, bench.plan.pictures)
        if rows:
            found[study.name] = folder / f"painted-{len(found)}.png"
            texts = [study.prompts[place] for place in prompts]
            photo = study.subjects[study.subject_of(prompts[0])][0].image
            grids.draw(photo, texts, rows, found[study.name])
    return found


def _of(strip: Path, prompts: Sequence[int], pictures: int) -> list[np.ndarray]:
    """The first picture of each prompt."""
    images = read_strip(strip)[[place * pictures for place in prompts]]
    return [np.asarray(picture) for picture in to_pictures(images)]
