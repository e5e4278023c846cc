"""The paper's judges through transformers: DINO (ViT-S/16) and CLIP (ViT-B/32).

Each prepares pictures as the configuration beside its weights says. Weights are read from
safetensors only, from a folder or from what is in Hugging Face's cache; nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.pictures import PictureError, decode, open_picture
from ..files.header import first_line
from .scoring import Judge, Likeness, Obedience, Picture

DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-base-patch32"  # the paper's
_AT_ONCE = 16  # pictures
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class JudgeError(ValueError):
    """A judge cannot be used; the message names it, the cause and the fix."""


def judges(
    dino: Path | None, clip: Path | None, without: str = "", device: str | torch.device = "cpu"
) -> list[Judge]:
    """DINO, CLIP-I and CLIP-T from folders; a folder that is None is left out.

    ``without``: words that CLIP-T is not asked for. Raises JudgeError.
    """
    found: list[Judge] = []
    if dino is not None:
        found.append(Likeness("DINO", _shown(dino), Dino(dino, device)))
    if clip is not None:
        network = Clip(clip, device)
        found.append(Likeness("CLIP-I", _shown(clip), network.pictures))
        found.append(Obedience("CLIP-T", _shown(clip), network.pictures, network.texts, without))
    return found


def cached(name: str) -> Path:
    """The folder of a network in Hugging Face's cache. Raises JudgeError where it is not there."""
    from huggingface_hub import snapshot_download

    if not _NAME.fullmatch(name):
        raise JudgeError(f"{name!r} is no name of a network; give one such as {DINO}.")
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise JudgeError(
            f"{name} is not in Hugging Face's cache on this machine; download it first (with "
            f"`hf download {name}`), or give a folder that holds it."
        ) from error


def located(name: str) -> Path:
    """A folder by its path, or a network's in Hugging Face's cache. Raises JudgeError."""
    return Path(name) if Path(name).is_dir() else cached(name)


class Dino:
    """The feature of a ViT's class token after its last norm: (pictures, features)."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu"):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        config = _read(folder, AutoConfig)
        # What a ViT has behind the class token is not in DINO's file, and not asked.
        options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        self._network = _network(folder, device, AutoModel, **options)
        self._prepare = _read(folder, AutoImageProcessor)

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        def embed(pixels: Tensor) -> Tensor:
            return self._network(pixel_values=pixels).last_hidden_state[:, 0]

        return _in_parts(pictures, self._prepare, embed, self._network.device)


class Clip:
    """CLIP's projected features of pictures and of texts: (n, features) each."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu"):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self._network = _network(folder, device, CLIPModel)
        self._prepare = _read(folder, AutoImageProcessor)
        self._tokenize = _read(folder, AutoTokenizer)

    def pictures(self, pictures: Sequence[Picture]) -> Tensor:
        def embed(pixels: Tensor) -> Tensor:
            seen = self._network.vision_model(pixel_values=pixels).pooler_output
            return self._network.visual_projection(seen)

        return _in_parts(pictures, self._prepare, embed, self._network.device)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """What is longer than CLIP can read is cut."""
        longest = self._network.config.text_config.max_position_embeddings
        tokens = self._tokenize(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self._network.device)
        read = self._network.text_model(**tokens).pooler_output
        return self._network.text_projection(read).float().cpu()


def _network(folder: Path, device: str | torch.device, kind: Any, **options: Any) -> Any:
    """A network for inference. Raises JudgeError where a weight is not in its file."""
    found, about = _read(
        folder, kind, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
    )
    if lost := sorted({*about["missing_keys"], *map(str, about["mismatched_keys"])}):
        raise JudgeError(
            f"{_shown(folder)} cannot be used as a judge: {len(lost)} of its weights are not in "
            f"the file, as {lost[0][:100]}. Download it again."
        )
    return found.eval().requires_grad_(False).to(device)


def _read(folder: Path, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    # transformers reports what it lacks by many kinds of errors.
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise JudgeError(
            f"{_shown(folder)} cannot be used as a judge ({first_line(error)[:200]}). It must hold "
            "config.json, model.safetensors and the configuration of its input, as transformers "
            "writes them."
        ) from error


@torch.inference_mode()
def _in_parts(
    pictures: Sequence[Picture], prepare: Any, embed: Any, device: torch.device
) -> Tensor:
    found: list[Tensor] = []
    for start in range(0, len(pictures), _AT_ONCE):
        some = [opened(picture) for picture in pictures[start : start + _AT_ONCE]]
        pixels = prepare(images=some, return_tensors="pt")["pixel_values"]  # (n, 3, side, side)
        found.append(embed(pixels.to(device)).float().cpu())
    return torch.cat(found)


def pixels(picture: Picture) -> Tensor:
    """(height, width, 3), 0 to 1. Raises JudgeError for a file that is no picture."""
    return torch.from_numpy(np.asarray(opened(picture), dtype=np.float32) / 255)


def opened(picture: Picture) -> Image.Image:
    """As red, green and blue. Raises JudgeError for a file that is no picture."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    try:
        return decode(open_picture(picture)).convert("RGB")
    except PictureError as error:
        raise JudgeError(f"{picture} {error}.") from error


def _shown(folder: Path) -> str:
    """``owner/name`` of a folder in the cache, else the folder's own name."""
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return folder.name
