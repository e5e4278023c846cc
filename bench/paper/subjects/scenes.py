"""How much a subject was seen of: in many scenes, in one, or in one picture; its place told or not.

A photograph's subject is crops of one picture with one caption, a drawn one six scenes with their
places in the captions: two differences at once. Here each is made alone, on the same subjects.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from ....lora2_core.tiny_sdxl.model import SIZE
from ....tools.tiny_sdxl.world.subjects import (
    RARE_WORD,
    VIEW_PLACES,
    View,
    make_subject,
    views_in_one_place,
)
from .demo import crop, drawn
from .study import Study

SEEN = ("many", "one", "picture")  # scenes, scene, crops of one picture
TOLD = ("told", "untold")  # in captions: the place
SUBJECTS = ((203, "backpack"), (205, "sneaker"), (208, "dog"), (210, "vase"))


def cells(prompts: int) -> list[Study]:
    """Every subject in every way, a way after the other."""
    every = [(drawn(seed, prompts, thing), seed, thing) for seed, thing in SUBJECTS]
    return [
        _told(_seen(study, seed, thing, seen), told)
        for seen in SEEN
        for told in TOLD
        for study, seed, thing in every
    ]


def _seen(study: Study, seed: int, thing: str, how: str) -> Study:
    """The same number of photos, by the subject's own lot in one of the usual places."""
    rng = random.Random(f"scenes {seed}")
    place = rng.choice(VIEW_PLACES["train"])
    photos: Sequence[View] = study.photos
    if how != SEEN[0]:
        photos = views_in_one_place(make_subject(seed, thing), place, len(study.photos), SIZE)
    if how == SEEN[2]:
        picture = Image.fromarray(photos[0].image)
        photos = [photos[0]._replace(image=np.asarray(crop(picture, rng))) for _ in photos]
    return replace(study, name=f"{study.name}-{how}", photos=photos)


def _told(study: Study, told: str) -> Study:
    photos = study.photos
    if told == TOLD[1]:
        photos = [view._replace(caption=f"a {RARE_WORD} {study.things[0]}") for view in photos]
    return replace(study, name=f"{study.name}-{told}", photos=photos)
