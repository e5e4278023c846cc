"""Subjects for the demo base: drawn ones, and photographs."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

from ....lora2_core.tiny_sdxl.model import SIZE
from ....tools.tiny_sdxl.world.scenes import PLACE_WORDS, object_mask
from ....tools.tiny_sdxl.world.subjects import (
    RARE_WORD,
    SUBJECT_SEEDS,
    VIEW_PLACES,
    View,
    make_subject,
    subject_scenes,
    subject_views,
)
from .study import Study

# Rates are tried on these: they are in no table.
TUNING_SUBJECTS = ((27, None), (201, "mug"), (202, "cat"))  # the first is a robot
# What is to be the default, on these too: one subject more of every other kind of thing.
SWEEP_SUBJECTS = (
    *TUNING_SUBJECTS, (203, "backpack"), (204, "clock"), (205, "sneaker"), (206, "teapot"),
    (207, "can"), (208, "dog"), (209, "bowl"), (210, "vase"), (211, "candle"),
)  # fmt: skip
CROPS = 5
_GREY = 128
# That scikit-image carries: its name, what it shows, where in the picture that is.
Photograph = tuple[str, str, tuple[int, int, int, int]]
PHOTOGRAPHS: tuple[Photograph, ...] = (
    ("chelsea", "cat", (60, 0, 360, 300)),
    ("coffee", "mug", (90, 40, 430, 380)),
    ("astronaut", "astronaut", (60, 0, 420, 360)),
    ("rocket", "rocket", (200, 20, 520, 340)),
    ("camera", "photographer", (70, 20, 420, 370)),
)
# Only of a photograph may the prompt be lost: a rate that is too high would go unnoticed.
TUNING_PHOTOGRAPH: Photograph = ("stereo_motorcycle", "motorcycle", (60, 30, 530, 500))
SWEEP_PHOTOGRAPH: Photograph = ("coins", "coin", (225, 150, 384, 303))


def drawn(seed: int, prompts: int, thing: str | None = None) -> Study:
    """A subject of ours in poses and places that the base never saw it in."""
    subject = make_subject(seed, thing)
    held_out: dict[str, View] = {}
    for view in subject_views(subject, "held_out", SIZE):
        held_out.setdefault(view.place, view)
    views = list(held_out.values())[:prompts]
    return Study(
        f"{subject.object}-{seed}",
        subject_views(subject, "train", SIZE),
        [view.caption for view in views],
        [view.place for view in views],
        [subject.object] * len(views),
        views,
    )


def greyed(study: Study) -> list[View]:
    """The subject itself in each place that is asked for, painted over in grey."""
    thing, _, seed = study.name.rpartition("-")
    scenes = subject_scenes(make_subject(int(seed), thing), "held_out")
    first = {scene.place: scene for scene in reversed(scenes)}  # as `drawn` takes them
    found: list[View] = []
    for view in study.own:
        covered = object_mask(first[view.place], SIZE)[..., None]  # (size, size, 1)
        found.append(view._replace(image=np.where(covered, np.uint8(_GREY), view.image)))
    return found


def photographed(which: Photograph, prompts: int) -> Study:
    """Crops of a real photograph; the base has never seen any."""
    import skimage.data

    name, word, box = which
    pixels = getattr(skimage.data, name)()
    if isinstance(pixels, tuple):  # as two eyes see it, and how far it is
        pixels = pixels[0]
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, -1)
    picture = Image.fromarray(pixels).crop(box)
    rng = random.Random(f"photograph {name}")
    photos = [
        View(np.asarray(crop(picture, rng)), f"a {RARE_WORD} {word}", "") for _ in range(CROPS)
    ]
    places = list(dict.fromkeys(VIEW_PLACES["held_out"]))[:prompts]
    return Study(
        f"photo-{name.removeprefix('stereo_')}",
        photos,
        [_in_place(word, place) for place in places],
        places,
    )


def _in_place(word: str, place: str) -> str:
    words = PLACE_WORDS[place]
    parts = ("a", words.adjectives[0], RARE_WORD, word, words.phrases[0])
    return " ".join(part for part in parts if part)


def crop(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A square of most of a picture, as one who has a single one makes several of it."""
    side = round(min(picture.size) * rng.uniform(0.82, 1.0))
    left, top = (rng.randint(0, whole - side) for whole in picture.size)
    return picture.crop((left, top, left + side, top + side)).resize(
        (SIZE, SIZE), Image.Resampling.LANCZOS
    )


def tested(prompts: int) -> list[Study]:
    """The subjects that are tested: eleven drawn ones, and five photographs."""
    seeds = [seed for seed in SUBJECT_SEEDS if seed != TUNING_SUBJECTS[0][0]]
    return [
        *(drawn(seed, prompts) for seed in seeds),
        *(photographed(which, prompts) for which in PHOTOGRAPHS),
    ]


def for_tuning(prompts: int) -> list[Study]:
    """The subjects that rates are chosen on."""
    found = [drawn(seed, prompts, thing) for seed, thing in TUNING_SUBJECTS]
    return [*found, photographed(TUNING_PHOTOGRAPH, prompts)]


def for_sweep(prompts: int) -> list[Study]:
    """The subjects that the default is chosen on: one of every kind, and two photographs."""
    found = [drawn(seed, prompts, thing) for seed, thing in SWEEP_SUBJECTS]
    return [*found, *(photographed(one, prompts) for one in (TUNING_PHOTOGRAPH, SWEEP_PHOTOGRAPH))]
