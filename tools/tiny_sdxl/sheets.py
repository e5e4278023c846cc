"""Contact sheets: everything the renderer draws, to be looked at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from .drawing.palette import COLOURS, named_colour
from .training.autoencoder_images import training_image_for_autoencoder
from .world.scenes import OBJECTS, PATTERNS, PLACES, Scene, random_scene, render, second_colour
from .world.subjects import JUDGE_SEEDS, SUBJECT_SEEDS, make_subject, subject_views


def write_sheets(folder: Path, size: int = 192, tile: int = 192) -> list[Path]:
    """Write all sheets, of pictures rendered at `size` and shown at `tile`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    sheets = {
        "places": [[_scene(place, thing) for thing in OBJECTS] for place in PLACES],
        "patterns": [[_pattern(pattern, colour) for colour in COLOURS] for pattern in PATTERNS],
    }
    pictures = {
        name: [[render(scene, size) for scene in row] for row in rows]
        for name, rows in sheets.items()
    }
    for kind in ("train", "held_out"):
        pictures[f"subjects-{kind}"] = [_views(seed, kind, size) for seed in SUBJECT_SEEDS]
    strangers = [
        [_views(seed, "train", size)[0] for seed in JUDGE_SEEDS[row : row + 12]]
        for row in range(0, 96, 12)
    ]
    pictures["subjects-of-the-judges"] = strangers
    rng = random.Random(0)
    pictures["autoencoder"] = [
        [training_image_for_autoencoder(rng, size) for _ in range(12)] for _ in range(10)
    ]
    return [_write(folder / f"{name}.png", rows, tile) for name, rows in pictures.items()]


def _scene(place: str, thing: str) -> Scene:
    """Return a scene of a pair, always the same."""
    return random_scene(random.Random(f"{place} {thing}"), (thing,), (place,))


def _pattern(pattern: str, colour: str) -> Scene:
    """Return a scene with a colour and a pattern, always the same."""
    rng = random.Random(f"{pattern} {colour}")
    scene = random_scene(rng)
    main = named_colour(colour, rng)
    second, accent = second_colour(colour, main, rng)
    return replace(scene, colour=colour, pattern=pattern, second=second, main=main, accent=accent)


def _views(seed: int, kind: str, size: int) -> list[np.ndarray]:
    """Return the pictures of a subject."""
    views = subject_views(make_subject(seed), "train" if kind == "train" else "held_out", size)
    return [view.image for view in views]


def _write(path: Path, rows: Sequence[Sequence[np.ndarray]], tile: int) -> Path:
    """Write rows of pictures as one."""
    sheet = Image.new("RGB", (tile * len(rows[0]), tile * len(rows)))
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            picture = Image.fromarray(pixels)
            if picture.width != tile:
                picture = picture.resize((tile, tile), Image.Resampling.LANCZOS)
            sheet.paste(picture, (x * tile, y * tile))
    sheet.save(path)
    return path
