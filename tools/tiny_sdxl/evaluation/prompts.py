"""What the base paints of what it is asked for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ..world.scenes import OBJECTS, PLACES, Scene, caption, is_held_out, random_scene
from .answers import Tally, answers, portions
from .grids import sample_grid
from .parts import Parts

SAMPLES = 48  # pictures in the grid
LEGEND = "The base has never seen this object in this place."


def base_figures(
    parts: Parts, grid: Path, prompts: int = 500, samples: int = SAMPLES
) -> dict[str, Any]:
    """Return judges' answers to what the base paints; draw a grid of samples.

    Half as many prompts are of pairs of object and place that the base has never seen.
    """
    paint_samples(parts, grid, samples)
    return {
        "pairs seen": prompted_figures(parts, prompts, held_out=False),
        "pairs held out": prompted_figures(parts, max(1, prompts // 2), held_out=True),
    }


def prompted_figures(parts: Parts, count: int, held_out: bool) -> dict[str, Any]:
    """Return judges' answers to what the base paints, and to drawings of the very same scenes."""
    rng = random.Random(f"prompts {held_out}")
    scenes = [random_scene(rng, held_out=held_out) for _ in range(count)]
    prompts = [caption(scene, rng) for scene in scenes]
    painted, painter = Tally(parts.judges), parts.painter()
    for some in portions(range(count)):
        images = painter.paint([prompts[number] for number in some], some)
        painted.add([scenes[number] for number in some], images)
        kind = "held-out" if held_out else "seen"
        print(f"base: {painted.count}/{count} prompts of {kind} pairs", flush=True)
    return {"prompts": count, "painted": painted.shares(), **answers(parts, scenes)}


def paint_samples(parts: Parts, path: Path, count: int = SAMPLES) -> Path:
    """Write a grid of samples of all objects and places, with their prompts."""
    scenes = sample_scenes()[:count]
    prompts = [caption(scene, random.Random(number)) for number, scene in enumerate(scenes)]
    images = parts.painter().paint(prompts, range(len(prompts)))
    marked = [is_held_out(scene.object, scene.place) for scene in scenes]
    return sample_grid(path, images, prompts, marked, LEGEND)


def sample_scenes() -> list[Scene]:
    """Return the scenes of the grid: every object four times, every place three times."""
    columns = 8
    scenes = []
    for number in range(SAMPLES):
        row, column = divmod(number, columns)
        thing = OBJECTS[number % len(OBJECTS)]
        place = PLACES[(2 * column + 5 * row) % len(PLACES)]
        scenes.append(random_scene(random.Random(f"sample {number}"), (thing,), (place,)))
    return scenes
