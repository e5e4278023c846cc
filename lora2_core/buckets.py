"""Sizes that keep a photo's aspect ratio, and batches in which all samples have one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .config import TrainConfig
from .dataset import Crop, DatasetError, Photo, covering, crop, cut

__all__ = ["SampleOrder", "bucket_size", "crops", "cut"]

STEP, SMALL_STEP = 64, 32  # px; SDXL halves a latent twice, so a side is a multiple of 8 · 4
SMALL_RESOLUTION = 512  # px; below it the coarse step would leave too few shapes
WIDEST = 4  # 4:1 and 1:4; the range of SDXL's own training (arXiv 2307.01952, appendix I)


def bucket_size(
    width: int, height: int, resolution: int, step: int | None = None
) -> tuple[int, int]:
    """Width and height, px, at which a photo of ``width`` × ``height`` px is trained.

    Multiples of ``step`` (64, or 32 below 512 px; always a multiple of 32) with at most
    ``resolution``² px, none longer than the photo's own side, so nothing is enlarged; only a side
    below one step becomes one step. Among the sizes from 1:4 to 4:1 that cannot grow in width or
    cannot grow in height, the one whose aspect ratio is nearest to the photo's.
    Raises ValueError for a step or a resolution that gives no size. Source: multi-aspect training
    of SDXL (arXiv 2307.01952, section 2.3); the choice among sizes is ours.
    """
    step = step or (STEP if resolution >= SMALL_RESOLUTION else SMALL_STEP)
    if step % SMALL_STEP or resolution < step:
        raise ValueError(
            f"step is {step} at resolution {resolution}; it must be a multiple of 32 and at most "
            "the resolution: use 32."
        )
    wide, high = (max(1, side // step) for side in (width, height))
    area = resolution**2 // step**2  # all in steps from here on
    sizes = {(w, min(high, area // w, WIDEST * w)) for w in range(1, min(wide, area) + 1)}
    sizes |= {(min(wide, area // h, WIDEST * h), h) for h in range(1, min(high, area) + 1)}
    sizes = {(w, h) for w, h in sizes if w <= WIDEST * h and h <= WIDEST * w}
    limit = math.log(WIDEST)
    wanted = min(max(math.log(width) - math.log(height), -limit), limit)

    def badness(size: tuple[int, int]) -> tuple[float, int]:
        error = abs(math.log(size[0]) - math.log(size[1]) - wanted)
        # Rounded, so that equal ratios tie and the larger size wins.
        return round(error, 9), -size[0] * size[1]

    best = min(sizes, key=badness)
    return best[0] * step, best[1] * step


def crops(photos: Sequence[Photo], config: TrainConfig) -> list[tuple[Photo, Crop]]:
    """Each photo with its cut: centred squares, or buckets where ``config.data.buckets`` is on.

    With ``config.data.flip`` the mirror image of a cut follows it; the photo beside it stays the
    unmirrored one. Raises DatasetError when nothing of a photo's mask is left in its cut.
    """
    pairs: list[tuple[Photo, Crop]] = []
    for number, photo in enumerate(photos, 1):
        height, width = photo.pixels.shape[:2]
        if config.data.buckets:
            found = cut(photo, bucket_size(width, height, config.resolution))
        else:
            found = crop(photo, config.resolution)
        if found.mask is not None and not found.mask.any():
            raise DatasetError(
                f"masks: number {number} marks only what the centred cut of its image leaves out, "
                "so there is nothing to learn; switch buckets on, or crop the image yourself."
            )
        pairs.append((photo, found))
        if config.data.flip:
            pairs.append((photo, mirrored(found)))
    return pairs


def mirrored(found: Crop) -> Crop:
    """The cut as it lies in the mirror image of its photo."""
    height, width = found.pixels.shape[:2]
    resized, _ = covering(found.original_size, (width, height))
    left, top = found.offset
    return replace(
        found,
        pixels=found.pixels.flip(1),
        offset=(resized - left - width, top),
        mask=None if found.mask is None else found.mask.flip(1),
    )


class SampleOrder:
    """Indices of a data set in batches of one latent shape, shuffled by the generator of a draw.

    ``shapes``: the latent shape of each sample. A deck that holds every sample's shape once says
    of which shape the next batch is, so over as many batches as there are samples each sample
    comes equally often. With one shape there is no deck: each epoch is shuffled anew.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        if not shapes:
            raise ValueError("there is no sample to draw from; give at least one photo.")
        members: dict[tuple[int, ...], list[int]] = {}
        for index, shape in enumerate(shapes):
            members.setdefault(tuple(shape), []).append(index)
        self._members = list(members.values())
        self._deck: list[int] = []
        self._left: list[list[int]] = [[] for _ in self._members]

    def draw(self, generator: torch.Generator, size: int) -> list[int]:
        """``size`` indices of one shape; each of a shape comes once before any comes again."""
        place = self._next_shape(generator)
        members, left = self._members[place], self._left[place]
        while len(left) < size:
            order = torch.randperm(len(members), generator=generator).tolist()
            left += [members[position] for position in order]
        drawn, self._left[place] = left[:size], left[size:]
        return drawn

    def state(self) -> dict[str, Any]:
        """What is left of the deck and of each shape's epoch; lists of whole numbers."""
        left = {str(place): list(indices) for place, indices in enumerate(self._left)}
        return {"deck": list(self._deck), "left": left}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ValueError if it is of other samples."""
        deck = [int(place) for place in state["deck"]]
        left = [[int(i) for i in state["left"].get(str(p), [])] for p in range(len(self._members))]
        strange = len(state["left"]) != len(left) or not set(deck) <= set(range(len(left)))
        known = zip(left, self._members, strict=True)
        if strange or not all(set(indices) <= set(members) for indices, members in known):
            raise ValueError(
                "the order of draws belongs to other photos than those given; use the same photos, "
                "buckets and resolution, or start anew."
            )
        self._deck, self._left = deck, left

    def _next_shape(self, generator: torch.Generator) -> int:
        if len(self._members) == 1:
            return 0
        if not self._deck:
            shapes = [p for p, members in enumerate(self._members) for _ in members]
            order = torch.randperm(len(shapes), generator=generator).tolist()
            self._deck = [shapes[position] for position in order]
        return self._deck.pop(0)
