"""Photos with their captions and masks, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import checks
from .captions import Brackets, as_prompt, with_trigger

SMALLEST_SIDE = 64  # px; below that a photo holds nothing to learn from
MOST_REPEATS = 1_000_000  # of a photo, in all that is given
ASPECT_TOLERANCE = 0.02  # between a mask and its image; rounding of sides stays far below


class DatasetError(ValueError):
    """The images or captions cannot be trained on; the message names the one at fault."""


@dataclass(frozen=True)
class Photo:
    """A checked photo with its caption."""

    pixels: Tensor  # (height, width, 3), fp32, 0 to 1
    caption: str
    mask: Tensor | None = None  # (height, width), fp32, 0 to 1: 1 is learnt from, 0 is not
    repeats: int = 1  # how many times as often it is drawn as one that is there once

    def __post_init__(self) -> None:
        checks.whole("repeats", self.repeats, 1, MOST_REPEATS, "use 1")
        if self.mask is not None and self.mask.shape != self.pixels.shape[:2]:
            raise DatasetError(
                f"mask has shape {tuple(self.mask.shape)} beside pixels of "
                f"{tuple(self.pixels.shape)}; use check_photos, which fits it."
            )


def check_photos(
    images: Sequence[Tensor],
    captions: Sequence[str] | None,
    prompt: str,
    masks: Sequence[Tensor] | None = None,
    trigger: str = "",
    brackets: Brackets = "text",
) -> list[Photo]:
    """Photos ready for training from ComfyUI image batches, (batch, height, width, 3 or 4) each.

    ``captions``: one per image in order, or None to give ``prompt`` to all. A single caption
    also serves all. ``trigger`` is put before every text that does not hold it. ``brackets``: how
    texts are read, see :func:`.captions.as_prompt`. ``masks``: ComfyUI masks, (batch, height,
    width) or (height, width), 1 where there is something to learn; one per image in order, one for
    all, or None: then the alpha channel of an image that has one. A mask of ones is dropped. What
    comes more than once, the same tensor with the same caption and mask, is one photo with
    ``repeats``. Raises DatasetError for no image, a wrong shape, values that are not finite,
    an image below 64 px, captions or masks that do not match in number, a mask of another aspect
    ratio than its image's, or one that is zero everywhere.
    """
    frames = [frame for batch in images for frame in _frames(batch)]
    if not frames:
        raise DatasetError("images is empty; connect at least one photo of the subject.")
    seen = set[object]()
    for number, frame in enumerate(frames, 1):
        if (place := _place(frame)) not in seen:
            _check_frame(frame, number)
            seen.add(place)
    texts = _matched_texts(captions, prompt, trigger, len(frames), brackets)
    found = _matched_masks(masks, frames)
    places: dict[object, list[int]] = {}
    for number, (frame, text, mask) in enumerate(zip(frames, texts, found, strict=True)):
        places.setdefault((_place(frame), text, _place(mask)), []).append(number)
    return [_photo(numbers, frames, texts, found) for numbers in places.values()]


def _photo(
    numbers: list[int], frames: list[Tensor], texts: list[str], masks: list[Tensor | None]
) -> Photo:
    """The one of which there are so many."""
    first = numbers[0]
    frame, mask = frames[first], masks[first]
    if mask is not None:
        mask = _fitted_mask(mask, frame, first + 1)
    return Photo(_clamped(frame[..., :3]), texts[first], mask, len(numbers))


def _place(tensor: Tensor | None) -> object:
    """Equal for tensors that are the same memory, read in the same way."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _matched_texts(
    captions: Sequence[str] | None, prompt: str, trigger: str, count: int, brackets: Brackets
) -> list[str]:
    texts = [(text or "").strip() for text in captions or []]
    if len(texts) in (0, 1):
        texts = (texts or [""]) * count
    if len(texts) != count:
        raise DatasetError(
            f"captions has {len(texts)} entries for {count} images; give one caption per "
            "image in the same order, or none to use instance_prompt for all."
        )
    if not prompt.strip() and not trigger.strip() and not all(texts):
        raise DatasetError(
            "instance_prompt is empty and not every image has a caption; write what the photos "
            "show, for example 'a photo of sks cat'."
        )
    prompt, trigger = (as_prompt(text, brackets) for text in (prompt, trigger))
    return [with_trigger(as_prompt(text, brackets) or prompt, trigger) for text in texts]


def _matched_masks(masks: Sequence[Tensor] | None, frames: Sequence[Tensor]) -> list[Tensor | None]:
    """A mask (height, width) for each of ``frames``, as it is given; None where there is none."""
    given = [mask for batch in masks or [] for mask in _mask_frames(batch)]
    found: list[Tensor | None]
    if not given:
        found = [frame[..., 3] if frame.shape[-1] == 4 else None for frame in frames]
    elif len(given) in (1, len(frames)):
        found = [*given] if len(given) == len(frames) else [*given] * len(frames)
    else:
        raise DatasetError(
            f"masks has {len(given)} entries for {len(frames)} images; give one mask per image in "
            "the same order, one for all, or none."
        )
    return found


def _mask_frames(batch: Tensor) -> list[Tensor]:
    if not torch.is_tensor(batch) or batch.ndim not in (2, 3):
        shape = tuple(batch.shape) if torch.is_tensor(batch) else type(batch).__name__
        raise DatasetError(
            f"masks holds {shape} where ComfyUI masks are (batch, height, width); connect a MASK "
            "output such as that of Load images from a folder."
        )
    return list(batch) if batch.ndim == 3 else [batch]


def _fitted_mask(mask: Tensor, frame: Tensor, number: int) -> Tensor | None:
    """``mask`` at the size of ``frame``, 0 to 1; None when it is 1 everywhere."""
    if not _finite(mask):
        raise DatasetError(
            f"masks: number {number} holds values that are not numbers (NaN or infinite); check "
            "the node that made it."
        )
    mask = _clamped(mask)
    if not mask.any():
        raise DatasetError(
            f"masks: number {number} is 0 everywhere, so there is nothing to learn (Load Image "
            "gives such a mask when a picture has no transparency); paint what is to be learnt, or "
            "disconnect masks."
        )
    (height, width), (rows, columns) = frame.shape[:2], mask.shape
    if abs(columns * height / (rows * width) - 1) > ASPECT_TOLERANCE:
        raise DatasetError(
            f"masks: number {number} is {columns}×{rows} px where its image is {width}×{height} "
            "px; their aspect ratios must agree within 2 %. Make the mask from that image."
        )
    if (mask == 1).all():
        return None
    if (rows, columns) != (height, width):
        mask = resized_mask(mask, (width, height), (0, 0, width, height))
    return mask


def resized_mask(mask: Tensor, size: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """``mask`` (height, width) resized to ``size`` (width, height), and of that the ``box``."""
    image = Image.fromarray(mask.cpu().numpy())
    # Bilinear in Pillow is an average over the area when it shrinks, and never leaves 0 to 1.
    resized = resized_part(image, size, box, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).clamp(0, 1)


def resized_part(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    way: Image.Resampling,
) -> Image.Image:
    """The ``box`` of ``image`` resized to ``size``, of which the rest is never made.

    A long strip would otherwise become a giant before its middle is cut out.
    """
    x, y = image.width / size[0], image.height / size[1]
    part = (box[0] * x, box[1] * y, min(box[2] * x, image.width), min(box[3] * y, image.height))
    return image.resize((box[2] - box[0], box[3] - box[1]), way, box=part)


def _frames(batch: Tensor) -> list[Tensor]:
    if not torch.is_tensor(batch) or batch.ndim != 4 or batch.shape[-1] not in (3, 4):
        shape = tuple(batch.shape) if torch.is_tensor(batch) else type(batch).__name__
        raise DatasetError(
            f"images holds {shape} where ComfyUI images are (batch, height, width, 3); connect an "
            "IMAGE output such as Load Image."
        )
    return list(batch)


def _check_frame(frame: Tensor, number: int) -> None:
    height, width = frame.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise DatasetError(
            f"images: number {number} is {width}×{height} px; both sides must be at least "
            f"{SMALLEST_SIDE} px. Use a larger photo."
        )
    if not _finite(frame):
        raise DatasetError(
            f"images: number {number} holds pixels that are not numbers (NaN or infinite); check "
            "the node that made it."
        )


def _finite(values: Tensor) -> bool:
    """Whether all are numbers; nothing of their size is made for it."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)  # both are NaN where one value is
    return math.isfinite(low) and math.isfinite(high)


def _clamped(values: Tensor) -> Tensor:
    """``values`` in fp32 and between 0 and 1: themselves where they are already."""
    values = values.float()
    if not values.numel():
        return values
    low, high = torch.aminmax(values)
    return values if low >= 0 and high <= 1 else values.clamp(0, 1)


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)
