"""Scenes: pictures with captions from which the tiny base model learns to paint.

Every scene is one of twelve objects in one of sixteen places, both in the wording of the paper's
table A1, in a named colour and pattern. A fifth of the pairs of object and place is held out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..drawing.artist import Look
from ..drawing.decor import Decor
from ..drawing.mood import Place
from ..drawing.objects.things import OBJECTS, THINGS, Thing
from ..drawing.palette import COLOURS, RGB, difference, named_colour
from ..drawing.patterns import BASE_PATTERNS
from ..drawing.places import PLACES as PLACE_WORDS
from ..drawing.stage import Pose, paint_mask, paint_scene

__all__ = [
    "COLOURS",
    "OBJECTS",
    "PATTERNS",
    "PLACES",
    "Scene",
    "caption",
    "is_held_out",
    "object_mask",
    "random_scene",
    "render",
]

PLACES = tuple(PLACE_WORDS)
PATTERNS = tuple(BASE_PATTERNS)
# The second colour must be told from the first when both are a few pixels wide.
CONTRAST = 0.3


@dataclass(frozen=True)
class Scene:
    """Everything that decides the pixels of a picture."""

    object: str
    place: str
    colour: str
    pattern: str
    second: str
    main: RGB
    accent: RGB
    # The larger extent of the object, and where it stands (or floats), as shares of the frame.
    scale: float
    x: float
    y: float
    tilt: float
    flip: bool
    # How far the object is turned to a side, -1..1.
    yaw: float
    # Where the light comes from: -1 left, 1 right.
    side: float
    # Cool (-1) to warm (1) light.
    warmth: float
    # Matte (0) to shiny (1).
    gloss: float
    seed: int
    decor: Decor | None = None


def is_held_out(object: str, place: str) -> bool:
    """Tell whether the base never sees this object in this place; true for a fifth of the pairs."""
    return (OBJECTS.index(object) + 3 * PLACES.index(place)) % 5 == 0


def random_scene(
    rng: random.Random,
    objects: Sequence[str] = OBJECTS,
    places: Sequence[str] = PLACES,
    held_out: bool | None = None,
) -> Scene:
    """Draw a scene by lot, if `held_out` is given only of pairs that are, or are not, held out."""
    pairs = [
        (thing, place)
        for thing in objects
        for place in places
        if held_out is None or is_held_out(thing, place) == held_out
    ]
    thing, place = rng.choice(pairs)
    colour = rng.choice(COLOURS)
    pattern = rng.choice(PATTERNS)
    main = named_colour(colour, rng)
    second, accent = second_colour(colour, main, rng)
    return place_thing(rng, thing, place, Colours(colour, pattern, second, main, accent))


@dataclass(frozen=True)
class Colours:
    """The colours and the pattern of a thing, by name and by value."""

    colour: str
    pattern: str
    second: str
    main: RGB
    accent: RGB
    decor: Decor | None = None


def second_colour(first: str, main: RGB, rng: random.Random) -> tuple[str, RGB]:
    """Choose a colour for a pattern on another one: white or black half of the time."""
    neutral = [name for name in ("white", "white", "black") if name != first]
    while True:
        name = rng.choice(neutral) if rng.random() < 0.5 else rng.choice(COLOURS)
        accent = named_colour(name, rng)
        if name != first and difference(main, accent) >= CONTRAST:
            return name, accent


def place_thing(
    rng: random.Random,
    thing: str,
    place: str,
    colours: Colours,
    least: float = 0.56,
    room: float = 1.0,
) -> Scene:
    """Put a thing into a place in a pose by lot, at least so large.

    `room` below 1 leaves room for a hat.
    """
    scenery, what = PLACE_WORDS[place], THINGS[thing]
    side = rng.choice((-1.0, 1.0))
    scale = rng.uniform(min(least, scenery.most - 0.04), scenery.most) * room
    tilt = rng.uniform(-1, 1) * scenery.lean
    x, y = _position(what, scenery, scale, tilt, side, rng)
    if scenery.ground is None:
        # The middle of what floats lies higher by its hat.
        y += 0.6 * (1 - room)
    return Scene(
        object=thing,
        place=place,
        colour=colours.colour,
        pattern=colours.pattern,
        second=colours.second,
        main=colours.main,
        accent=colours.accent,
        scale=scale,
        x=x,
        y=y,
        tilt=tilt,
        flip=rng.random() < 0.5,
        yaw=rng.uniform(-1, 1),
        side=side,
        warmth=rng.uniform(-1, 1),
        gloss=rng.random(),
        seed=rng.randrange(2**31),
        decor=colours.decor,
    )


def _position(
    what: Thing, scenery: Place, scale: float, tilt: float, side: float, rng: random.Random
) -> tuple[float, float]:
    """Return where the foot of a thing goes, so that all of it is in the frame."""
    sine, cosine = math.sin(math.radians(tilt)), math.cos(math.radians(tilt))
    # From the foot to the middle of the leaning thing, and from there to its sides.
    over, up = 0.5 * what.height * scale * sine, 0.5 * what.height * scale * cosine
    half = 0.5 * what.width * scale * cosine + abs(over)
    x = 0.5 - side * scenery.aside + rng.uniform(-0.05, 0.05)
    margin = min(half + 0.045, 0.5)
    x = min(max(x, margin), 1 - margin) - over
    if scenery.ground is None:
        return x, 0.5 + up + rng.uniform(-0.03, 0.03)
    return x, scenery.ground + rng.uniform(-0.012, 0.012)


def _look(scene: Scene) -> tuple[Look, Pose]:
    """Return the scene's object and its pose as the drawing wants them."""
    look = Look(
        main=scene.main,
        accent=scene.accent,
        pattern=scene.pattern,
        side=scene.side,
        gloss=scene.gloss,
        yaw=scene.yaw,
        variant=scene.seed,
        flip=scene.flip,
        decor=scene.decor,
    )
    return look, Pose(scene.scale, scene.x, scene.y, scene.tilt, scene.flip)


def render(scene: Scene, size: int = 192) -> np.ndarray:
    """Paint a scene: (size, size, 3), 8 bit, the same bytes for the same scene."""
    look, pose = _look(scene)
    return paint_scene(size, scene.object, scene.place, look, pose, scene.seed, scene.warmth)


def object_mask(scene: Scene, size: int = 192) -> np.ndarray:
    """Return where the object is, as (size, size) booleans (what lies before it not cut out)."""
    look, pose = _look(scene)
    return paint_mask(size, scene.object, look, pose)


def caption(scene: Scene, rng: random.Random, complete: bool = True) -> str:
    """Describe a scene as table A1 does: "a red striped mug on a sandy beach at sunset".

    A caption that need not be complete leaves out the colour, the pattern or both now and then, so
    that the model also paints what a prompt does not say.
    """
    scenery = PLACE_WORDS[scene.place]
    words = [rng.choice(scenery.adjectives)]
    if scene.gloss > 0.8 and not words[0]:
        words.append("shiny")
    keep_colour = complete or rng.random() > 0.12
    keep_pattern = complete or rng.random() > 0.12
    words.append(_surface(scene, rng, keep_colour, keep_pattern))
    words.append(scene.object)
    text = " ".join(word for word in words if word)
    article = "an" if text[0] in "aeiou" else "a"
    return f"{article} {text} {rng.choice(scenery.phrases)}"


def _surface(scene: Scene, rng: random.Random, colour: bool, pattern: bool) -> str:
    """Return the words for colour and pattern."""
    if not pattern:
        return scene.colour if colour else ""
    if scene.pattern == "plain":
        plain = "plain" if rng.random() < 0.3 else ""
        return f"{plain} {scene.colour if colour else ''}".strip()
    if not colour:
        return scene.pattern
    return rng.choice(
        (
            f"{scene.colour} {scene.pattern}",
            f"{scene.colour} {scene.pattern}",
            f"{scene.pattern} {scene.colour}",
            f"{scene.colour} and {scene.second} {scene.pattern}",
        )
    )
