"""What the node files share: the category, the choice of no LoRA, advanced inputs, pictures."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..lora2_core import comfy_host

CATEGORY = "LoRA²"

NO_LORA = "none"  # the choice of a list that need not be used


def fingerprint(names: Iterable[str]) -> str:
    """Changes when one of these LoRA files does, so that ComfyUI reads it again."""
    return " ".join(comfy_host.lora_fingerprint(name) for name in names if name != NO_LORA)


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """Mark a widget as advanced; ComfyUI versions that know no such thing show it as usual."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget


def also_called(*words: str) -> dict[str, list[str]]:
    """For a schema: what else people may type to find its node, where ComfyUI knows such words."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return {"search_aliases": list(words)} if "search_aliases" in known else {}


def to_image(picture: Image.Image) -> torch.Tensor:
    """A ComfyUI IMAGE, (1, height, width, 3), from a PIL picture."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels)[None]


def to_pictures(images: Iterable[torch.Tensor]) -> list[Image.Image]:
    """PIL pictures from batches (n, height, width, 3) of any sizes, in 0 to 1."""
    found: list[Image.Image] = []
    for batch in images:
        pixels = (batch[..., :3].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
        found += map(Image.fromarray, pixels)
    return found
