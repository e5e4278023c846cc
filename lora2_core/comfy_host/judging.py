"""Judges of pictures that ComfyUI holds: folders of its own, and CLIP_VISION."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ..reports import vision
from ..reports.scoring import Likeness, Picture
from . import surface
from .errors import HostError
from .paths import leaves

_FOLDERS = "diffusers"  # where ComfyUI keeps networks that are a folder each


def judge_folder(name: str) -> Path | None:
    """The folder of a judge: below models/diffusers, else in Hugging Face's cache.

    None for an empty name. Raises HostError for a name that leaves these folders, and JudgeError
    where there is none.
    """
    name = name.strip()
    if not name:
        return None
    if leaves(name):
        raise HostError(f"{name[:120]!r} leads out of models/{_FOLDERS}; give a folder in it.")
    for parent in folder_paths.get_folder_paths(_FOLDERS):
        if (folder := Path(parent, name)).is_dir():
            return folder
    return vision.cached(name)


def clip_vision_judge(clip_vision: Any) -> Likeness:
    """A CLIP_VISION of ComfyUI as one more judge of likeness, by its projected features."""

    surface.need(surface.Part.SCORE)

    def embed(pictures: Sequence[Picture]) -> Tensor:
        parts: list[Tensor] = []
        for picture in pictures:  # each may be of another size
            pixels = vision.pixels(picture)[None]
            found = clip_vision.encode_image(pixels)["image_embeds"]  # (1, features)
            if found is None:
                raise HostError("clip_vision gives no features of pictures; connect another one.")
            parts.append(found.float().cpu())
        return torch.cat(parts)

    network = type(clip_vision.model).__name__
    return Likeness("CLIP_VISION", f"{network} of ComfyUI, {clip_vision.image_size} px", embed)
