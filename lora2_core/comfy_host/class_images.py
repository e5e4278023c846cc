"""Class images for prior preservation (DreamBooth): from a folder, or painted by the base model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from ..config.train import TrainConfig
from ..data.cache import TensorCache, content_key
from ..data.cropping import cut
from ..data.photos import Photo
from ..data.samples import Sample
from .encoding import Encoder
from .painting import Painter
from .running import raise_if_cancelled

_STEPS, _GUIDANCE = 25, 5.0  # how class images are painted


def paints(config: TrainConfig, given: Sequence[Photo]) -> bool:
    """Whether a run needs a painter: for validation samples, or for class images it lacks."""
    return bool(config.samples.prompts) or config.data.class_images > len(_distinct(given))


def _distinct(photos: Sequence[Photo]) -> list[Photo]:
    """Without photos of equal content: a copy of a file adds nothing."""
    return list({content_key(photo.pixels): photo for photo in photos}.values())


def class_images(
    given: Sequence[Photo],
    painter: Painter | None,
    config: TrainConfig,
    identity: str,
    disk: TensorCache,
) -> list[Photo]:
    """The class images: those given, and what lacks painted by the base model itself.

    ``identity``: changes with all that a painted picture depends on. ComfyUI's Cancel ends it.
    """
    prompt = config.data.class_prompt.strip()
    if not prompt:
        return []
    classes = [Photo(photo.pixels, prompt) for photo in _distinct(given)]
    missing = config.data.class_images - len(classes)
    if missing <= 0 or painter is None:
        return classes
    size = (config.resolution, config.resolution)
    for seed in range(missing):
        raise_if_cancelled()  # a hundred of them take minutes
        key = content_key("class", identity, prompt, seed, *size, _STEPS, _GUIDANCE)

        def paint(seed: int = seed) -> dict[str, Tensor]:
            logging.info("LoRA²: painting class image %d of %d, %r.", seed + 1, missing, prompt)
            found = painter.paint([prompt], seed, size, _STEPS, _GUIDANCE)
            return {"pixels": found[0]}

        classes.append(Photo(disk.get_or_make(key, paint)["pixels"].clone(), prompt))
    return classes


def class_samples(
    encoder: Encoder, classes: Sequence[Photo], samples: Sequence[Sample], config: TrainConfig
) -> list[Sample]:
    """Class images in every size that the photos come in: a batch holds one size only."""
    shapes = sorted({tuple(sample.latent.shape[1:]) for sample in samples})
    pixels = [(8 * width, 8 * height) for height, width in shapes]
    return [
        encoder.sample(cut(photo, size), (config.data.class_prompt.strip(),))
        for photo in classes
        for size in pixels
    ]
