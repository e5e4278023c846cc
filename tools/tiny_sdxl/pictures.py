"""Pictures as arrays, as tensors, and as files that hold several."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pixels(images: Iterable[np.ndarray]) -> Tensor:
    """Return 8-bit pictures as (n, 3, h, w) in 0 to 1."""
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).float() / 255


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Return (n, 3, h, w) in 0 to 1 as 8-bit pictures."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)  # (n, h, w, 3)
    return [Image.fromarray(array) for array in pixels.cpu().numpy()]


def write_strip(path: Path, images: Tensor) -> None:
    """Write square pictures (n, 3, h, h) in 0 to 1 side by side as one file."""
    row = torch.cat(list(images), dim=-1)[None]  # (1, 3, h, n·h)
    to_pictures(row)[0].save(path)


def read_strip(path: Path) -> Tensor:
    """Return the square pictures of a strip, (n, 3, h, h) in 0 to 1, in steps of 1/255."""
    with Image.open(path) as strip:
        pixels = np.asarray(strip.convert("RGB"))  # (h, n·h, 3)
    return to_pixels(np.split(pixels, pixels.shape[1] // pixels.shape[0], axis=1))
