"""The subjects of the DreamBooth data set, with the prompts of the paper's table A1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ....tools.tiny_sdxl.world.subjects import RARE_WORD, View
from . import table_a1
from .study import Study

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def read(folder: Path, prompts: int, word: str = RARE_WORD) -> list[Study]:
    """The data set as its authors publish it: a folder of photos for each subject.

    Raises ValueError for a folder that holds none of them.
    """
    if (folder / "dataset").is_dir():  # of the repository's clone
        folder = folder / "dataset"
    found = [
        _study(folder / name, prompts, word)
        for name in table_a1.PROMPTS
        if (folder / name).is_dir()
    ]
    if not found:
        raise ValueError(
            f"{folder} holds no subject of the DreamBooth data set; it must hold folders such as "
            "backpack/ and dog6/ with their photos."
        )
    return found


def complex_scenes(folder: Path, word: str = RARE_WORD) -> list[Study]:
    """The subjects of the paper's figures A6 to A9, by the prompts of these.

    Raises ValueError for a folder that holds neither.
    """
    found = [study for study in read(folder, 1, word) if study.name in table_a1.COMPLEX]
    if not found:
        raise ValueError(f"{folder} holds neither {' nor '.join(table_a1.COMPLEX)}.")
    return [
        replace(
            study,
            name=f"{study.name}-complex",
            prompts=table_a1.prompts_of(study.name, word, table_a1.COMPLEX),
        )
        for study in found
    ]


def _study(folder: Path, prompts: int, word: str) -> Study:
    files = sorted(one for one in folder.iterdir() if one.suffix.lower() in _ENDINGS)
    if not files:
        raise ValueError(f"{folder} holds no photo ({', '.join(_ENDINGS)}).")
    caption = f"a {word} {table_a1.class_of(folder.name)}"
    photos = []
    for file in files:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
        photos.append(View(np.asarray(upright), caption, ""))
    return Study(folder.name, photos, table_a1.prompts_of(folder.name, word)[:prompts])
