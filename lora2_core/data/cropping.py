"""From a photo to the size it is trained at: squares, or buckets that keep its aspect ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ..config.train import TrainConfig
from .photos import DatasetError, Photo, resized_mask, resized_part, to_tensor


@dataclass(frozen=True)
class Crop:
    """A photo cut to the size it is trained at, and what SDXL wants to know about the cut."""

    pixels: Tensor  # (height, width, 3), fp32
    original_size: tuple[int, int]  # width, height of the photo, px
    offset: tuple[int, int]  # left, top of the cut in the resized photo, px
    mask: Tensor | None = None  # (height, width), fp32, 0 to 1


def crop(photo: Photo, resolution: int) -> Crop:
    """The largest centred square of ``photo``, resized to ``resolution`` px."""
    return cut(photo, (resolution, resolution))


def cut(photo: Photo, size: tuple[int, int]) -> Crop:
    """``photo`` resized until it just covers ``size`` (width, height; px), the middle cut out."""
    height, width, _ = photo.pixels.shape
    resized = covering((width, height), size)
    left, top = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    box = (left, top, left + size[0], top + size[1])
    image = Image.fromarray(_bytes(photo.pixels).numpy())
    pixels = to_tensor(resized_part(image, resized, box, Image.Resampling.LANCZOS))
    mask = None if photo.mask is None else resized_mask(photo.mask, resized, box)
    return Crop(pixels, (width, height), (left, top), mask)


def _bytes(pixels: Tensor) -> Tensor:
    """0 to 1 → 0 to 255 in one byte each, row by row: a photo in fp32 is twelve times as large as
    what comes out."""
    found = torch.empty(pixels.shape, dtype=torch.uint8)
    for one, row in zip(found.split(_STRIP), pixels.split(_STRIP), strict=True):
        one.copy_((row * 255).round())
    return found


def covering(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """``original`` scaled until both sides reach ``size``, one of them exactly; all in px."""
    scale = max(size[0] / original[0], size[1] / original[1])
    return max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))


_STRIP = 256  # rows that are worked on at once
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
