"""What a file does to the weights of the demo model, and what else is said of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.utils
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files.header import LoRAFileError
from lora2_pack.lora2_core.resizing.recent import LoRACache
from torch import Tensor

REFUSALS = (LoRAFileError, comfy_host.HostError)


def weights_of(patcher: Any) -> dict[str, Tensor]:
    """The patched weights alone, fp32, calculated as ComfyUI does when it loads the model."""
    found = {}
    for key, patches in patcher.patches.items():
        weight = comfy.utils.get_attr(patcher.model, key)
        assert isinstance(weight, Tensor), key
        with torch.inference_mode():
            found[key] = comfy.lora.calculate_weight(patches, weight.detach().float().clone(), key)
    return found


def loaded(parts: Any, path: Path, caplog: Any, strength: float = 1.0) -> Any:
    """The weights that a file changes, by key, and what a person is told; raises what refuses."""
    caplog.clear()
    model, clip, _ = parts
    file = LoRACache().open(path, Limits())
    with caplog.at_level(logging.ERROR):
        applied = comfy_host.apply_lora(model, clip, file, strength, strength, path.name)
        found = weights_of(applied.model) | weights_of(applied.clip.patcher)
    assert not caplog.records, caplog.text
    return found, applied.note


def said(refusal: Exception) -> str:
    """The one sentence of a refusal."""
    text = str(refusal)
    assert text.isprintable() and text.endswith(".") and len(text) < 600, text
    return text


def worst(parts: Any, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """How far weights are from what they should be, by the size of what changes them: of the
    worst weight. What is not among ``got`` was not changed."""
    off = [(0.0, "")]
    for key in got.keys() | wanted.keys():
        root = parts[0].model if key.startswith("diffusion_model.") else parts[1].cond_stage_model
        before = comfy.utils.get_attr(root, key).detach().double()
        after, should = got.get(key, before).double(), wanted.get(key, before)
        if after.shape != should.shape:
            return float("inf"), key
        change = float((should - before).norm())
        off.append((float((after - should).norm()) / (change or 1e-9), key))
    return max(off)
