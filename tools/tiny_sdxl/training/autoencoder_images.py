"""Pictures for the autoencoder: scenes, and everything that no scene of the base has.

An autoencoder that has only seen the base's palette paints a teal subject grey. So its pictures
cover the whole colour space, in things, places, patterns and emblems.
"""

from __future__ import annotations

import math
import random

import numpy as np
import skia

from ..drawing.decor import draw_mark
from ..drawing.palette import INDIGO, RGB, WHITE, any_colour, apart_from, mix
from ..drawing.patterns import PATTERNS
from ..drawing.pen import Pen, box, linear
from ..world.scenes import PLACES, Colours, place_thing, random_scene, render
from ..world.subjects import JUDGE_SEEDS, make_subject

FRAME = box(-1, -1, 2, 2)


def training_image_for_autoencoder(rng: random.Random, size: int = 192) -> np.ndarray:
    """Return a picture to train an autoencoder on: (size, size, 3), 8 bit.

    A third are scenes of the base, a third show things like subjects, the rest are wallpapers with
    emblems; two fifths of all have their colours turned, so that backgrounds take every colour.
    """
    lot = rng.random()
    if lot < 0.34:
        image = render(random_scene(rng), size)
    elif lot < 0.8:
        image = _any_subject(rng, size)
    else:
        image = _wallpaper(rng, size)
    return turn_colours(image, rng) if rng.random() < 0.4 else image


def _any_subject(rng: random.Random, size: int) -> np.ndarray:
    """Return a thing as special as a subject, or half as special, in any place."""
    # Seeds beyond all that are shown or judged: what is held out stays unseen here too.
    subject = make_subject(rng.randrange(JUDGE_SEEDS.stop, 2**31))
    pattern = rng.choice(tuple(PATTERNS))
    decor = subject.decor if rng.random() < 0.8 else None
    colours = Colours("", pattern, "", subject.main, subject.accent, decor)
    return render(place_thing(rng, subject.object, rng.choice(PLACES), colours, room=0.93), size)


def _wallpaper(rng: random.Random, size: int) -> np.ndarray:
    """Return a pattern all over the frame, in a soft light, with emblems on it."""
    pixels = np.zeros((size, size, 4), np.uint8)
    surface = skia.Surface(pixels)
    pen = Pen(surface.getCanvas())
    pen.canvas.scale(size, size)
    first = any_colour(rng)
    second = apart_from((first,), rng.uniform(0.05, 0.4), rng)
    pen.wash(first)
    zoom = rng.uniform(0.6, 1.6)
    with pen.moved(0.5, 0.5, rng.uniform(0, 360), (zoom, zoom)):
        pattern = PATTERNS[rng.choice(tuple(PATTERNS))]
        pen.fill(pattern((-1.3, -1.3, 1.3, 1.3), rng.uniform(0, 0.2)), second)
    for _ in range(rng.choice((0, 1, 2, 3))):
        decor = make_subject(rng.randrange(JUDGE_SEEDS.stop, 2**31)).decor
        with pen.moved(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(-25, 25)):
            draw_mark(pen, decor, rng.uniform(0.09, 0.24))
    _soft_light(pen, rng)
    surface.flushAndSubmit()
    return pixels[..., :3].copy()


def _soft_light(pen: Pen, rng: random.Random) -> None:
    """Let light fall across the frame from any side."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = 0.6 * math.cos(angle), 0.6 * math.sin(angle)
    shade: RGB = mix(any_colour(rng), INDIGO, 0.7)
    stops = [(0.0, WHITE, rng.uniform(0, 0.4)), (0.5, WHITE, 0.0), (0.55, shade, 0.0)]
    stops.append((1.0, shade, rng.uniform(0, 0.6)))
    pen.fill(FRAME, linear(0.5 + x, 0.5 + y, 0.5 - x, 0.5 - y, stops))


def turn_colours(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """Permute the channels, turn the hue, and change the contrast of a picture."""
    order = rng.sample(range(3), 3)
    values = image[..., order].astype(np.float32) / 255
    turned = (values ** rng.uniform(0.75, 1.35)) @ _hue_turn(rng.uniform(0, 2 * math.pi)).T
    return (turned.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _hue_turn(angle: float) -> np.ndarray:
    """Return the rotation of RGB about its grey diagonal."""
    cosine, sine = math.cos(angle), math.sin(angle) / math.sqrt(3)
    same, other = cosine + (1 - cosine) / 3, (1 - cosine) / 3
    return np.array(
        [
            [same, other - sine, other + sine],
            [other + sine, same, other - sine],
            [other - sine, other + sine, same],
        ],
        dtype=np.float32,
    )
