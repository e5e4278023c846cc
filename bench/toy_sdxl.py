"""A model with the attention layers of SDXL, all 560 by their names, and next to no width."""

from __future__ import annotations

from typing import Any

import torch
from lora2_pack.lora2_core.training.objective import Prediction
from torch import Tensor, nn

WIDTH, CONTEXT = 16, 24
# Transformer blocks by where they stand in the U-Net.
_DEPTHS = {
    "input_blocks": {4: 2, 5: 2, 7: 10, 8: 10},
    "middle_block": {1: 10},
    "output_blocks": {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2},
}


class _Attention(nn.Module):
    def __init__(self, context: int):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(context, WIDTH, bias=False)
        self.to_v = nn.Linear(context, WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        heads = [t[:, None] for t in (self.to_q(x), self.to_k(context), self.to_v(context))]
        return self.to_out(nn.functional.scaled_dot_product_attention(*heads)[:, 0])


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = _Attention(WIDTH), _Attention(CONTEXT)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + 0.1 * self.attn1(x, x)
        return x + 0.1 * self.attn2(x, context)


class _Transformer(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(_Block() for _ in range(depth))


class Model(nn.Module):
    """Frozen, seeded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, depths in _DEPTHS.items():
            places: dict[str, nn.Module] = {}
            for place, depth in depths.items():
                found: nn.Module = _Transformer(depth)
                if name != "middle_block":
                    found = nn.ModuleDict({"1": found})
                places[str(place)] = found
            setattr(self, name, nn.ModuleDict(places))
        self.requires_grad_(False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for module in self.modules():
            if isinstance(module, _Block):
                x = module(x, context)
        return x


class Denoising:
    """Noise in, another map of it out."""

    def __init__(self, model: Model):
        self.model = model
        self.matrix = torch.randn(WIDTH, WIDTH) / WIDTH**0.5

    def draw(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 8, WIDTH, generator=generator)
        return x, torch.randn(size, 5, CONTEXT, generator=generator)

    def spread(self, generator: torch.Generator, count: int, size: int) -> list[Any]:
        return [self.draw(generator, size) for _ in range(-(-count // size))]

    def predict(self, batch: tuple[Tensor, Tensor]) -> Prediction:
        x, context = batch
        return Prediction(self.model(x, context), x @ self.matrix)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Draws are new each time: there is no order to remember."""
