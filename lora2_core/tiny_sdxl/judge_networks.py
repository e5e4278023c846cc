"""The two networks that judge what the demo model paints: of convolutions, and of patches that
attend to each other.

They share nothing but their answers' form, so that a picture which fools one need not fool the
other. Neither has buffers, since a run stores parameters only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What each question may be answered with: the words of the demo model's drawn world.
ANSWERS: dict[str, tuple[str, ...]] = {
    "object": (
        "mug", "teapot", "backpack", "clock", "sneaker", "robot", "cat", "dog", "candle", "can",
        "bowl", "vase",
    ),
    "place": (
        "beach", "snow", "jungle", "space", "silk", "neon", "dark", "city", "mountains", "couch",
        "books", "water", "gallery", "white", "park", "eiffel",
    ),
    "colour": (
        "red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "black",
        "white",
    ),
    "pattern": ("plain", "striped", "polka-dot", "checkered", "zigzag", "two-tone"),
}  # fmt: skip
EMBEDDING = 64


class Answer(NamedTuple):
    """What a network says of pictures: a row of logits for each question, and what they show."""

    logits: dict[str, Tensor]
    embedding: Tensor  # (n, EMBEDDING), normalised
    grid: Tensor  # (n, 1 + objects, side/8, side/8): what is where, place first; for training


class Outlines(nn.Module):
    """Add to red, green and blue where outlines are, fine and coarse, whatever their colours.

    Objects come in every colour before every colour; without this a network takes thousands of
    pictures to find that a dark edge on light and a light one on dark are the same shape.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return (n, 5, h, w) for (n, 3, h, w)."""
        return torch.cat([2 * images - 1, self._edges(images, 1), self._edges(images, 3)], dim=1)

    @staticmethod
    def _edges(images: Tensor, blur: int) -> Tensor:
        """Return the steepness of the blurred picture against that of its neighbourhood."""
        images = F.avg_pool2d(images, blur, 1, blur // 2)
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
        steep = (across.square() + down.square()).sum(1, keepdim=True).add(1e-4).sqrt()
        return steep / (F.avg_pool2d(steep, 15, 1, 7) + 0.1)  # (n, 1, h, w)


class Heads(nn.Module):
    """One layer for each question and for what is where, and two for the embedding."""

    def __init__(self, width: int, grid_width: int):
        super().__init__()
        self.questions = nn.ModuleDict(
            {question: nn.Linear(width, len(words)) for question, words in ANSWERS.items()}
        )
        self.embedding = nn.Sequential(
            nn.Linear(width, 2 * EMBEDDING), nn.GELU(), nn.Linear(2 * EMBEDDING, EMBEDDING)
        )
        # Two hundred answers a picture: with them objects are learnt from far fewer pictures.
        self.grid = nn.Conv2d(grid_width, 1 + len(ANSWERS["object"]), 1)

    def forward(self, features: Iterable[Tensor], grid: Tensor) -> Answer:
        """Answer from (n, width) for each question, another for the embedding, and from a grid."""
        # What losses are taken of needs more than the eight bits of bf16.
        with torch.autocast("cpu", enabled=False):
            *asked, looks = (part.float() for part in features)
            logits = {
                question: head(part)
                for (question, head), part in zip(self.questions.items(), asked, strict=True)
            }
            embedding = F.normalize(self.embedding(looks), dim=-1)
            return Answer(logits, embedding, self.grid(grid.float()))


class Residual(nn.Module):
    """Convolutions in residual blocks; each answer looks where it has learnt to look."""

    def __init__(self, side: int, widths: tuple[int, ...] = (24, 48, 96, 128)):
        super().__init__()
        del side  # convolutions fit any
        first, *others = widths
        self.stem = nn.Sequential(Outlines(), nn.Conv2d(5, first, 5, stride=2, padding=2))
        stages = [
            nn.Sequential(Block(before, width, stride=2), Block(width, width))
            for before, width in zip(widths, others, strict=False)
        ]
        self.fine, self.coarse = nn.Sequential(*stages[:-1]), stages[-1]
        self.norm = BatchNorm(widths[-1])
        self.looks = nn.Conv2d(widths[-1], len(ANSWERS) + 1, 1)
        self.heads = Heads(2 * widths[-1], widths[-2])

    def forward(self, images: Tensor) -> Answer:
        """Answer for (n, 3, side, side) in 0 to 1."""
        fine = self.fine(self.stem(images))  # (n, width, side/8, side/8)
        features = F.relu(self.norm(self.coarse(fine).float()))  # (n, width, side/16, side/16)
        weights = self.looks(features).float().flatten(2).softmax(-1)  # (n, answers, places)
        pooled = weights @ features.flatten(2).mT  # (n, answers, width)
        # Where there is little to see, the strongest response says more than the mean.
        strongest = features.amax(dim=(2, 3))[:, None].expand_as(pooled)
        return self.heads(torch.cat([pooled, strongest], dim=-1).unbind(1), fine)


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, before: int, width: int, stride: int = 1):
        super().__init__()
        self.norm1, self.norm2 = BatchNorm(before), BatchNorm(width)
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.around = nn.Conv2d(before, width, 1) if before != width else nn.Identity()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, width, h/stride, w/stride)."""
        around = self.around(F.avg_pool2d(x, self.stride) if self.stride > 1 else x)
        x = self.conv1(F.relu(self.norm1(x)))
        return around + self.conv2(F.relu(self.norm2(x)))


class BatchNorm(nn.Module):
    """Batch normalisation whose running mean and variance are parameters that no gradient moves.

    A run stores parameters only. (Group and layer normalisation hide a picture's own mean, so its
    colour: after 80 steps they had learnt half as much.)
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.variance = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, width, h, w), in training by the batch's own statistics."""
        return F.batch_norm(
            x, self.mean, self.variance, self.weight, self.bias, self.training, momentum=0.05
        )


class Patches(nn.Module):
    """A transformer over patches of 8 px, with one more token for each answer."""

    def __init__(self, side: int, width: int = 128, depth: int = 3):
        super().__init__()
        # A transformer alone would need far more pictures to find edges and colours.
        self.stem = nn.Sequential(
            Outlines(),
            nn.Conv2d(5, 48, 4, stride=4),
            nn.GELU(),
            nn.Conv2d(48, width, 3, stride=2, padding=1),
        )
        self.positions = nn.Parameter(torch.randn((side // 8) ** 2, width) * 0.02)
        self.answers = nn.Parameter(torch.randn(len(ANSWERS) + 1, width) * 0.02)
        self.layers = nn.ModuleList([Layer(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.heads = Heads(width, width)

    def forward(self, images: Tensor) -> Answer:
        """Answer for (n, 3, side, side) in 0 to 1."""
        grid = self.stem(images)  # (n, width, side/8, side/8)
        patches = grid.flatten(2).mT + self.positions  # (n, patches, width)
        answers = self.answers.expand(len(images), -1, -1).to(patches.dtype)
        tokens = torch.cat([answers, patches], dim=1)  # (n, answers + patches, width)
        for layer in self.layers:
            tokens = layer(tokens)
        answered, patches = self.norm(tokens).split((len(self.answers), len(self.positions)), 1)
        return self.heads(answered.unbind(1), patches.mT.unflatten(2, grid.shape[2:]))


class Layer(nn.Module):
    """Attention, then two layers for each token."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (n, tokens, width)."""
        split = self.attend(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # (n, heads, tokens, width/heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.merge(mixed.transpose(1, 2).flatten(2))
        return tokens + self.think(self.norm2(tokens))


NETWORKS = {"residual": Residual, "patches": Patches}
