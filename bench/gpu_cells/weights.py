"""Members of the SDXL family with seeded weights, made where they are used."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...lora2_core.comfy_host.checkpointing import blocks_of
from ...lora2_core.comfy_host.models import DTYPES, keep_in_eight_bits, put_in_place
from ...lora2_core.config.train import TrainConfig
from ...lora2_core.data.samples import Sample, Text
from ...lora2_core.training.denoising import CachedTexts, DenoisingTask
from ..paper.bases import family

_CLASSES = {"SDXL": "SDXL", "KOALA-700m": "KOALA_700M"}  # in ComfyUI
_TINY: dict[str, Any] = {
    "model_channels": 32, "num_head_channels": 16, "channel_mult": [1, 2], "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 0, 1],
}  # fmt: skip
_MIDDLE = {"SDXL": 1, "KOALA-700m": -2}  # blocks in the middle of the tiny one; -2: no middle
_TOKENS, _CONTEXT, _POOLED, _SIZES = 77, 2048, 1280, 1536
_PHOTOS = 4  # the largest batch


class Frozen:
    """One model's weights on ``device``, once, whoever computes with them.

    Normal with a standard deviation of 1/√fan-in, so that activations stay finite; norms 1, biases
    0. Raises torch.OutOfMemoryError where they do not fit.
    """

    def __init__(self, model: str, precision: str, device: torch.device, tiny: bool = False):
        self.model, self.precision, self.device, self.tiny = model, precision, device, tiny
        generator = torch.Generator(device).manual_seed(0)
        named = self._on_meta().diffusion_model.named_parameters()
        self.weights = {name: _seeded(name, weight, device, generator) for name, weight in named}
        self._aside = False

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def held(self) -> int:
        """Bytes of the device that these weights take now."""
        return 0 if self._aside else self.nbytes

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, they are in RAM and nothing of the device is taken; nobody may use them meanwhile
        but by :meth:`base_kept`."""
        self._move(torch.device("cpu"))
        self._aside = True
        try:
            yield
        finally:
            self._aside = False
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        for name, weight in self.weights.items():  # one by one: there is no room for two
            self.weights[name] = weight.to(device)

    def base_kept(self, config: TrainConfig) -> Any:
        """A BaseModel with weights of its own, kept as ``config`` says."""
        base = self.base(torch.device("cpu"))
        if config.frozen_weights == "fp8":
            keep_in_eight_bits(base)
        waiting = blocks_of(base.diffusion_model) if config.block_swap is True else ()
        put_in_place(base, self.device, waiting)
        return base

    def base(self, device: torch.device | None = None) -> Any:
        """A BaseModel of its own, frozen, with these very weights or copies on ``device``."""
        base = self._on_meta()
        unet = base.diffusion_model
        for name, weight in self.weights.items():
            path, _, leaf = name.rpartition(".")
            held = weight.detach() if device is None else weight.to(device, copy=True)
            parameter = nn.Parameter(held, requires_grad=False)
            setattr(unet.get_submodule(path), leaf, parameter)
        base.model_sampling.to(self.device)
        left = [name for name, part in (*base.named_parameters(), *base.named_buffers())
                if part.is_meta]  # fmt: skip
        if left:
            raise RuntimeError(f"{self.model} has parts without data: {', '.join(left[:3])}.")
        return base.eval()

    def task(self, base: Any, config: TrainConfig) -> DenoisingTask:
        """Random latents of the configuration's size, each with a text of its own."""
        samples, texts = self.data(config.resolution)
        return DenoisingTask(
            base, samples, CachedTexts(texts, self.device),
            {"optimized_attention_override": _plain}, "EPS", config,
        )  # fmt: skip

    def data(self, size: int) -> tuple[list[Sample], dict[str, Text]]:
        """Latents of ``size`` px and the texts that they name, on the CPU, always the same."""
        generator = torch.Generator().manual_seed(1)
        numbers = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        side = size // 8
        names = [f"photo {number}" for number in range(_PHOTOS)]
        texts = {name: Text(numbers(_TOKENS, _CONTEXT), numbers(_POOLED)) for name in names}
        return [Sample(numbers(4, side, side), numbers(_SIZES), (name,)) for name in names], texts

    def _on_meta(self) -> Any:
        changes: dict[str, Any] = {}
        if self.tiny:
            changes = {**copy.deepcopy(_TINY), "transformer_depth_middle": _MIDDLE[self.model]}
        return family.on_meta(_CLASSES[self.model], DTYPES[self.precision], **changes)


def _seeded(name: str, like: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    made = torch.empty(like.shape, dtype=like.dtype, device=device)
    if made.dim() < 2:  # norms and biases
        return made.fill_(float(name.endswith("weight")))
    return made.normal_(0, 1 / math.sqrt(made[0].numel()), generator=generator)


def _plain(_chosen: object, *args: Any, **kwargs: Any) -> Tensor:
    """Attention as the pack computes it in training."""
    import comfy.ldm.modules.attention

    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
