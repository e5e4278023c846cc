"""From photos to training samples: checks, cropping, captions, and the order of draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SMALLEST_SIDE = 64  # px; below that a photo holds nothing to learn from
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class DatasetError(ValueError):
    """The images or captions cannot be trained on; the message names the one at fault."""


@dataclass(frozen=True)
class Photo:
    """A checked photo with its caption. ``pixels``: (height, width, 3), fp32, 0 to 1."""

    pixels: Tensor
    caption: str


@dataclass(frozen=True)
class Crop:
    """A photo cut to the training resolution, and what SDXL wants to know about the cut."""

    pixels: Tensor  # (resolution, resolution, 3), fp32
    original_size: tuple[int, int]  # width, height of the photo, px
    offset: tuple[int, int]  # left, top of the cut in the resized photo, px


@dataclass(frozen=True)
class Sample:
    """What one photo becomes once the VAE and the text encoders have seen it."""

    latent: Tensor  # (channels, h, w), scaled for the U-Net, fp32
    context: Tensor  # (tokens, width) text embedding
    vector: Tensor  # (adm,) pooled text and size conditioning


def check_photos(
    images: Sequence[Tensor], captions: Sequence[str] | None, prompt: str
) -> list[Photo]:
    """Photos ready for training from ComfyUI image batches, (batch, height, width, 3) each.

    ``captions``: one per image in order, or None to give ``prompt`` to all. A single caption
    also serves all. Raises DatasetError for no image, a wrong shape, values that are not finite,
    an image below 64 px or captions that do not match in number.
    """
    frames = [frame for batch in images for frame in _frames(batch)]
    if not frames:
        raise DatasetError("images is empty; connect at least one photo of the subject.")
    for number, frame in enumerate(frames, 1):
        _check_frame(frame, number)
    texts = [(text or "").strip() for text in captions or []]
    if len(texts) in (0, 1):
        texts = (texts or [""]) * len(frames)
    if len(texts) != len(frames):
        raise DatasetError(
            f"captions has {len(texts)} entries for {len(frames)} images; give one caption per "
            "image in the same order, or none to use instance_prompt for all."
        )
    if not prompt.strip() and not all(texts):
        raise DatasetError(
            "instance_prompt is empty and not every image has a caption; write what the photos "
            "show, for example 'a photo of sks cat'."
        )
    return [
        Photo(frame[..., :3].float().clamp(0, 1), text or prompt.strip())
        for frame, text in zip(frames, texts, strict=True)
    ]


def crop(photo: Photo, resolution: int) -> Crop:
    """The largest centred square of ``photo``, resized to ``resolution`` px."""
    height, width, _ = photo.pixels.shape
    scale = resolution / min(height, width)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    image = Image.fromarray((photo.pixels * 255).round().byte().cpu().numpy())
    resized = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    cut = resized.crop((left, top, left + resolution, top + resolution))
    return Crop(_to_tensor(cut), (width, height), (left, top))


def load_folder(folder: Path) -> tuple[list[Tensor], list[str]]:
    """Images of a folder in the order of their names, with their kohya-style captions.

    A caption is the text file of the image's name beside it (``cat.png``, ``cat.txt``), empty
    where there is none. Returns images (1, height, width, 3) and as many captions. Raises
    DatasetError for a folder without images or a file that is no image.
    """
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        kinds = ", ".join(suffix.lstrip(".") for suffix in IMAGE_SUFFIXES)
        raise DatasetError(f"folder {folder.name!r} holds no image; put {kinds} files into it.")
    return [_read_image(path)[None] for path in paths], [_read_caption(path) for path in paths]


class SampleOrder:
    """Indices of a data set, each epoch shuffled anew by the generator given at each draw."""

    def __init__(self, count: int):
        self.count = count
        self._left: list[int] = []

    def draw(self, generator: torch.Generator, size: int) -> list[int]:
        """``size`` indices; every index comes once before any comes again."""
        while len(self._left) < size:
            self._left += torch.randperm(self.count, generator=generator).tolist()
        drawn, self._left = self._left[:size], self._left[size:]
        return drawn


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
    if not torch.isfinite(frame).all():
        raise DatasetError(
            f"images: number {number} holds pixels that are not numbers (NaN or infinite); check "
            "the node that made it."
        )


def _read_image(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            # Phones store the rotation beside the pixels; transparency becomes white.
            upright = _eight_bit(ImageOps.exif_transpose(image)).convert("RGBA")
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        raise DatasetError(f"{path.name} is not a readable image ({error}); remove it.") from error
    flat = Image.new("RGBA", upright.size, "white")
    return _to_tensor(Image.alpha_composite(flat, upright).convert("RGB"))


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion clips it to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))


def _read_caption(path: Path) -> str:
    sidecar = path.with_suffix(".txt")
    if not sidecar.is_file():
        return ""
    try:
        return sidecar.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{sidecar.name} is not readable UTF-8 text ({error}).") from error


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)
