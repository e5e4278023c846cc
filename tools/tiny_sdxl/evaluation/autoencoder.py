"""What a trip through the autoencoder costs."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pictures import to_pixels
from ..world.scenes import random_scene
from ..world.subjects import SUBJECT_SEEDS, View, make_subject, subject_views
from .answers import answers, pictures
from .figures import share_of_the_way
from .parts import Parts

OTHERS = 5  # of a subject's kind


def vae_figures(
    parts: Parts, scenes: int = 48, readings: int = 480, subjects: Sequence[int] = SUBJECT_SEEDS
) -> dict[str, Any]:
    """Return what a trip through the autoencoder costs: PSNR in dB, answers, and likeness."""
    rng = random.Random("psnr")
    drawn = pictures([random_scene(rng) for _ in range(scenes)])
    views = [_pixels_of(subject_views(make_subject(seed), "held_out")) for seed in subjects]
    rng = random.Random("readings")
    return {
        "psnr": {
            "scenes": mean_and_least(psnr(drawn, parts.through_vae(drawn))),
            "subjects": mean_and_least(
                torch.cat([psnr(images, parts.through_vae(images)) for images in views])
            ),
        },
        "answers": answers(parts, [random_scene(rng) for _ in range(readings)]),
        "likeness": likeness_figures(parts, subjects),
    }


def psnr(images: Tensor, again: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each of two stacks of pictures in 0 to 1, dB."""
    return -10 * (images - again).square().mean(dim=(1, 2, 3)).log10()  # (n,)


def mean_and_least(values: Tensor) -> dict[str, float]:
    """Return the mean and the least of some values."""
    return {"mean": values.mean().item(), "least": values.min().item()}


def likeness_figures(
    parts: Parts, subjects: Sequence[int] = SUBJECT_SEEDS
) -> dict[str, dict[str, Any]]:
    """Return for each judge how much of the likeness to subjects survives the autoencoder.

    What is compared are held-out views, of the subject and of others of its kind in the same
    places, always with the subject's training views as they were drawn.
    """
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in parts.judges}
    for seed in subjects:
        thing = make_subject(seed).object
        family = [make_subject(one, thing) for one in (seed, *neighbours(seed))]
        photos = _pixels_of(subject_views(family[0], "train"))
        drawn = [_pixels_of(subject_views(one, "held_out")) for one in family]
        again = [parts.through_vae(images) for images in drawn]
        for name, judge in parts.judges.items():
            before, after = (
                [judge.likeness(images, photos).mean().item() for images in kind]
                for kind in (drawn, again)
            )
            found[name][seed] = _levels(before, after)
    return {name: retained(levels) for name, levels in found.items()}


def neighbours(seed: int) -> list[int]:
    """Return the seeds whose looks, on its kind of object, a subject is compared with."""
    first = SUBJECT_SEEDS.index(seed) + 1
    return [SUBJECT_SEEDS[(first + step) % len(SUBJECT_SEEDS)] for step in range(OTHERS)]


def _levels(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Name the likeness of the subject, which comes first, and of the others."""
    (own, *others), (own_after, *others_after) = before, after
    return {
        "before": own,
        "after": own_after,
        "others before": statistics.fmean(others),
        "others after": statistics.fmean(others_after),
        "nearest other before": max(others),
        "nearest other after": max(others_after),
    }


def retained(levels: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Return means over subjects, how much of them is left after the VAE, and each subject's.

    ``ratio`` is that of the plain likeness. On the scale of ``scaled after``, 0 is the likeness of
    others of the kind and 1 that of the subject, both as drawn.
    """
    subjects = {str(seed): {**row, **_left(row)} for seed, row in levels.items()}
    first = next(iter(levels.values()))
    means = {name: statistics.fmean(row[name] for row in levels.values()) for name in first}
    least = {
        f"least {name}": min(row[name] for row in subjects.values())
        for name in ("ratio", "scaled after")
    }
    return {**means, **_left(means), **least, "subjects": subjects}


def _left(row: Mapping[str, float]) -> dict[str, float]:
    start, end = row["others before"], row["before"]
    return {
        "ratio": row["after"] / end,
        "scaled after": share_of_the_way(row["after"], start, end),
        "scaled others after": share_of_the_way(row["others after"], start, end),
    }


def _pixels_of(views: Sequence[View]) -> Tensor:
    return to_pixels(view.image for view in views)
