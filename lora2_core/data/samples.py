"""What training draws: encoded cuts and texts, in batches of one latent shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import checks
from .photos import MOST_REPEATS, DatasetError


@dataclass(frozen=True)
class Sample:
    """What one cut becomes once the VAE has seen it."""

    latent: Tensor  # (channels, h, w), scaled for the U-Net, fp32
    sizes: Tensor  # (1536,) SDXL's embedding of original size, offset and trained size
    captions: tuple[str, ...]  # the texts it may be drawn with, all equally often
    mask: Tensor | None = None  # (1, h, w), fp32, 0 to 1, at the size of the latent
    repeats: int = 1  # how many times as often it is drawn as one that is there once

    def __post_init__(self) -> None:
        checks.whole("repeats", self.repeats, 1, MOST_REPEATS, "use 1")
        if not self.captions:
            raise DatasetError("captions is empty; a sample has at least one, '' if need be.")
        if self.mask is not None and self.mask.shape != (1, *self.latent.shape[1:]):
            raise DatasetError(
                f"mask has shape {tuple(self.mask.shape)} beside a latent of "
                f"{tuple(self.latent.shape)}; resize it to (1, h, w) of the latent."
            )


@dataclass(frozen=True)
class Text:
    """What one caption becomes once the text encoders have seen it."""

    context: Tensor  # (tokens, width)
    pooled: Tensor  # (width,)


def merge_tokens(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """One batch of texts: contexts (batch, tokens, width) and pooled (batch, width).

    Prompts above 77 tokens come in several windows; the shorter ones are repeated to fit, as
    ComfyUI does when it samples them together.
    """
    tokens = math.lcm(*(text.context.shape[0] for text in texts))
    contexts = [text.context.repeat(tokens // text.context.shape[0], 1) for text in texts]
    return torch.stack(contexts), torch.stack([text.pooled for text in texts])


class SampleOrder:
    """Indices of a data set in batches of one latent shape, shuffled by the generator of a draw.

    ``shapes``: the latent shape of each sample. A deck that holds every sample's shape once says
    of which shape the next batch is, so over as many batches as there are samples each sample
    comes equally often. With one shape there is no deck: each epoch is shuffled anew. ``repeats``:
    how many times each sample is there in all this; once, where it is left out.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], repeats: Sequence[int] | None = None):
        if not shapes:
            raise ValueError("there is no sample to draw from; give at least one photo.")
        if repeats is not None and (len(repeats) != len(shapes) or min(repeats) < 1):
            raise ValueError(
                f"repeats is {repeats}; give a number from 1 on for each of the shapes."
            )
        members: dict[tuple[int, ...], list[int]] = {}
        for index, shape in enumerate(shapes):
            times = 1 if repeats is None else repeats[index]
            members.setdefault(tuple(shape), []).extend([index] * times)
        self._members = list(members.values())
        self._deck: list[int] = []
        self._left: list[list[int]] = [[] for _ in self._members]

    def draw(self, generator: torch.Generator, size: int) -> list[int]:
        """``size`` indices of one shape; each of a shape comes once, or as often as it repeats,
        before any comes again."""
        place = self._next_shape(generator)
        members, left = self._members[place], self._left[place]
        while len(left) < size:
            order = torch.randperm(len(members), generator=generator).tolist()
            left += [members[position] for position in order]
        drawn, self._left[place] = left[:size], left[size:]
        return drawn

    def state(self) -> dict[str, Any]:
        """What is left of the deck and of each shape's epoch; lists of whole numbers."""
        left = {str(place): list(indices) for place, indices in enumerate(self._left)}
        return {"deck": list(self._deck), "left": left}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ValueError if it is of other samples."""
        deck = [int(place) for place in state["deck"]]
        left = [[int(i) for i in state["left"].get(str(p), [])] for p in range(len(self._members))]
        strange = len(state["left"]) != len(left) or not set(deck) <= set(range(len(left)))
        known = zip(left, self._members, strict=True)
        if strange or not all(set(indices) <= set(members) for indices, members in known):
            raise ValueError(
                "the order of draws belongs to other photos than those given; use the same photos, "
                "buckets and resolution, or start anew."
            )
        self._deck, self._left = deck, left

    def _next_shape(self, generator: torch.Generator) -> int:
        if len(self._members) == 1:
            return 0
        if not self._deck:
            shapes = [p for p, members in enumerate(self._members) for _ in members]
            order = torch.randperm(len(shapes), generator=generator).tolist()
            self._deck = [shapes[position] for position in order]
        return self._deck.pop(0)
