"""Subjects: one-of-a-kind objects, for personalisation, that the base model never sees.

A subject is one of the base's objects in a pattern of its own, in two colours from the whole
colour space, with an emblem or a face and often with something to wear. Nothing of this but the
shape of the object occurs in a scene of :func:`.scenes.random_scene`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ..drawing.decor import ACCESSORIES, EMBLEMS, FACES, LETTERS, Decor
from ..drawing.objects.things import OBJECTS, THINGS
from ..drawing.palette import RGB, any_colour, apart_from
from ..drawing.patterns import SUBJECT_PATTERNS
from .scenes import PLACE_WORDS, Colours, Scene, place_thing, render

Kind = Literal["train", "held_out"]

RARE_WORD = "sks"
# Photos are taken where one lives; what is then asked for is elsewhere.
VIEW_PLACES: dict[Kind, tuple[str, ...]] = {
    "train": ("white", "couch", "gallery", "mountains", "silk", "snow"),
    "held_out": (
        *("beach", "jungle", "space", "neon", "dark", "city", "books", "water", "park", "eiffel"),
        *("beach", "city"),
    ),
}
# One of each kind, in clearly different colours and patterns; seen and chosen by eye. They are
# backpack, mug, clock, robot, cat, sneaker, teapot, can, dog, vase, candle and bowl.
SUBJECT_SEEDS = (41, 23, 79, 27, 35, 60, 59, 22, 100, 80, 103, 84)
# Subjects for the judges' training start here and never meet the ones above.
JUDGE_SEEDS = range(1000, 1400)


@dataclass(frozen=True)
class Subject:
    """A one-of-a-kind object."""

    seed: int
    object: str
    main: RGB
    accent: RGB
    pattern: str
    decor: Decor


class View(NamedTuple):
    """A picture of a subject, with the caption it is trained on or asked for with."""

    image: np.ndarray
    caption: str
    place: str


def make_subject(seed: int, object: str | None = None) -> Subject:
    """Make the subject of a seed, of a kind of object if one is given."""
    rng = random.Random(f"subject {seed}")
    thing = object or rng.choice(OBJECTS)
    main = any_colour(rng, 0.07)
    accent = apart_from((main,), 0.32, rng)
    badge = apart_from((main, accent), 0.28, rng, 0.05)
    marks = tuple(EMBLEMS)
    if THINGS[thing].takes_face and rng.random() < 0.4:
        marks = tuple(FACES)
    wears = THINGS[thing].wears if rng.random() < 0.6 else ("nothing",)
    cloth = apart_from((main, accent), 0.25, rng, 0.08)
    decor = Decor(
        mark=rng.choice(marks),
        letter=rng.choice(tuple(LETTERS)),
        badge=badge,
        figure=apart_from((badge,), 0.45, rng),
        accessory=rng.choice(wears),
        cloth=cloth,
        trim=apart_from((cloth,), 0.35, rng),
    )
    return Subject(seed, thing, main, accent, rng.choice(tuple(SUBJECT_PATTERNS)), decor)


def subject_scenes(subject: Subject, kind: Kind) -> list[Scene]:
    """Return the scenes of a subject's views: 6 for training, 12 held out."""
    return _scenes(subject, VIEW_PLACES[kind], random.Random(f"views {subject.seed} {kind}"))


def _scenes(subject: Subject, places: Sequence[str], rng: random.Random) -> list[Scene]:
    colours = Colours("", subject.pattern, "", subject.main, subject.accent, subject.decor)
    return [
        place_thing(rng, subject.object, place, colours, 0.63, _room(subject)) for place in places
    ]


def subject_views(subject: Subject, kind: Kind = "train", size: int = 192) -> list[View]:
    """Return a subject's pictures: 6 for training or 12 held out, in other places and poses."""
    return _views(subject, subject_scenes(subject, kind), size)


def views_in_one_place(subject: Subject, place: str, count: int, size: int = 192) -> list[View]:
    """Return ``count`` pictures of a subject in one place, in another pose each."""
    rng = random.Random(f"views {subject.seed} in {place}")
    return _views(subject, _scenes(subject, [place] * count, rng), size)


def _views(subject: Subject, scenes: Sequence[Scene], size: int) -> list[View]:
    return [
        View(render(scene, size), subject_caption(subject, scene.place), scene.place)
        for scene in scenes
    ]


def subject_caption(subject: Subject, place: str) -> str:
    """Return the prompt for a subject in a place: "a sks mug in the snow"."""
    adjective = PLACE_WORDS[place].adjectives[0]
    words = ("a", adjective, RARE_WORD, subject.object, PLACE_WORDS[place].phrases[0])
    return " ".join(word for word in words if word)


def _room(subject: Subject) -> float:
    """Return how much smaller a subject is drawn so that its hat stays in the picture."""
    hat = subject.decor.accessory in ("crown", "party hat", "top hat", "sprout")
    return 0.86 if hat and subject.decor.accessory in ACCESSORIES else 1.0
