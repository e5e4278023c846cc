"""What training left behind, as the files that people get: fp16, averaged weights alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .base import Base
from .run import read_average


def export(base_run: Path, autoencoder: Mapping[str, Tensor], file: Path) -> str:
    """Write U-Net, text towers and autoencoder to ``file`` and return its SHA-256.

    ``autoencoder`` holds weights by the names of ComfyUI's class. Names in the file are
    ``unet.…``, ``clip_l.…``, ``clip_g.…`` and ``vae.…``; ``words`` holds the tokens whose rows
    ``rows_l`` and ``rows_g`` are. Needs :func:`..host.open_comfyui`.
    """
    weights = read_average(base_run)
    weights |= {f"vae.{name}": value for name, value in autoencoder.items()}
    stored: dict[str, Tensor] = {n: v.half().contiguous() for n, v in weights.items()}
    stored["words"] = torch.tensor(Base().vocabulary, dtype=torch.int32)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file(stored, temporary, {"format": "pt"})
    os.replace(temporary, file)
    return hashlib.sha256(file.read_bytes()).hexdigest()
