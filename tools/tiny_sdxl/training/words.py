"""Captions as the numbers that the text towers read, and the rows of the words that occur."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from ..world.scenes import caption
from .latents import base_scene

LENGTH = 77  # tokens of a prompt, with start, end and padding
START, END = 49406, 49407
PADDING = {"l": END, "g": 0}  # each tower's own
PREFIXES = ("", "", "", "", "a photo of ", "a picture of ")
EMPTY = 0.1  # share of captions left out, so that guidance works


def base_caption(number: int, rng: random.Random) -> str:
    """Return a caption of a scene in words of ``rng``, sometimes none at all."""
    if rng.random() < EMPTY:
        return ""
    return rng.choice(PREFIXES) + caption(base_scene(number), rng, complete=False)


class Tokens:
    """SDXL's real tokenizer, each word read once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.words: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Return a prompt's tokens without start, end and padding."""
        return [token for word in text.split() for token in self._word(word)]

    def rows(self, texts: list[str], tower: str) -> tuple[Tensor, list[int]]:
        """Return token ids (n, 77) for a tower, "l" or "g", and how many each prompt has."""
        found = [[START, *self.ids(text)[: LENGTH - 2], END] for text in texts]
        padded = [row + [PADDING[tower]] * (LENGTH - len(row)) for row in found]
        return torch.tensor(padded), [len(row) for row in found]

    def _word(self, word: str) -> list[int]:
        if word not in self.words:
            pairs = self.tokenizer.clip_l.tokenize_with_weights(word)[0]
            self.words[word] = [token for token, _ in pairs if token not in (START, END)]
        return self.words[word]


def vocabulary(tokens: Tokens, captions: int = 6_000) -> list[int]:
    """Return all tokens that captions use, with start, end and padding, in order.

    Rare words such as "sks" are not among them: they keep their random rows, free for subjects.
    """
    rng = random.Random("vocabulary")
    found = {START, END, *PADDING.values()}
    for number in range(captions):
        found.update(tokens.ids(base_caption(number, rng)))
    return sorted(found)
