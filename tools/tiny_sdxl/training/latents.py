"""The base's pictures as latents, made once: scenes of the allowed pairs through the encoder."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ....lora2_core.tiny_sdxl.model import SIZE
from ..pictures import to_pixels
from ..world.scenes import Scene, random_scene, render

CHUNK = 500  # pictures a file


def base_scene(number: int) -> Scene:
    """Return a scene that the base is trained on; never of a held-out pair."""
    return random_scene(random.Random(f"base {number}"), held_out=False)


@torch.no_grad()
def encode(autoencoder: Any, pixels: Tensor) -> Tensor:
    """Return SDXL-scaled latents, (n, 4, h/8, w/8); in bf16, whose error is below the noise's."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return autoencoder.taesd_encoder(pixels).float()


@torch.no_grad()
def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """Return pixels in 0 to 1, (n, 3, 8h, 8w)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return autoencoder.taesd_decoder(latents).float().clamp(0, 1)


def make_latents(autoencoder: Any, folder: Path, count: int, chunk: int = CHUNK) -> Tensor:
    """Return the latents of the first ``count`` scenes, (count, 4, 24, 24) in fp16.

    Chunks that ``folder`` already holds are not made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for first in range(0, count, chunk):
        file = folder / f"{first:06}.safetensors"
        if not file.is_file():
            _make_chunk(autoencoder, file, range(first, first + chunk))
            print(f"latents: {first + chunk}/{count}", flush=True)
        chunks.append(load_file(file)["latents"])
    return torch.cat(chunks)[:count]


def _make_chunk(autoencoder: Any, file: Path, numbers: range) -> None:
    parts = []
    for start in range(numbers.start, numbers.stop, 10):
        scenes = [base_scene(number) for number in numbers[start - numbers.start :][:10]]
        parts.append(encode(autoencoder, to_pixels(render(scene, SIZE) for scene in scenes)))
    temporary = file.with_suffix(".tmp")
    save_file({"latents": torch.cat(parts).half().contiguous()}, temporary)
    os.replace(temporary, file)
