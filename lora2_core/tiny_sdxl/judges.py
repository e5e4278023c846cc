"""Judges of what the demo model paints: what is in a picture, and how like a subject it is.

Two small networks of different build (:mod:`.judge_networks`) that know the demo model's drawn
world and nothing else. ``tools/tiny_sdxl/training/judges.py`` trained them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..reports import vision
from ..reports.scoring import EmbedPictures, Likeness, Picture
from .judge_networks import ANSWERS, NETWORKS, Answer

WEIGHTS = Path(__file__).parent / "judge_weights"
SIDE = 112  # px that networks see: an emblem's letter is then some 12 px high
AT_ONCE = 64  # pictures


def likeness_judges() -> list[Likeness]:
    """Each of the two as a judge of likeness. Raises JudgeError where its weights are missing."""
    return [Likeness("Demo likeness", name, _embed(load_judges(name))) for name in NETWORKS]


def load_judges(name: str, folder: Path = WEIGHTS) -> Judge:
    """The judge of an architecture. Raises JudgeError where its weights are missing."""
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        raise vision.JudgeError(
            f"The demo model's judge {name!r} has no weights in {file}. They come with this pack: "
            "install it again, or restore the file with git."
        )
    return Judge.load(file)


def _embed(judge: Judge) -> EmbedPictures:
    def embed(pictures: Sequence[Picture]) -> Tensor:
        shown = (vision.pixels(picture).movedim(-1, 0)[None] for picture in pictures)
        return torch.cat([judge.embed(one) for one in shown])  # each may be of another size

    return embed


class Reading(NamedTuple):
    """What a judge reads in pictures: a word for each."""

    object: list[str]
    place: list[str]
    colour: list[str]
    pattern: list[str]


class Judge:
    """A trained network that names what pictures show and compares them with a subject."""

    def __init__(self, network: nn.Module, architecture: str, side: int = SIDE):
        self.network = network.eval().requires_grad_(False)
        self.architecture, self.side = architecture, side

    @classmethod
    def load(cls, file: Path) -> Judge:
        """Read a judge as it was exported. Raises ValueError for a file that holds no judge."""
        with safe_open(file, "pt") as stored:
            about = stored.metadata() or {}
        name = about.get("architecture")
        if name not in NETWORKS:
            raise ValueError(f"{file} holds no judge.")
        network = new_network(name, int(about["side"]))
        network.load_state_dict(load_file(file))
        return cls(network, name, int(about["side"]))

    def read(self, images: Tensor) -> Reading:
        """Name what (n, 3, h, w) in 0 to 1 show."""
        answers = list(self._answers(images))
        return Reading(*(
            [words[index] for answer in answers for index in answer.logits[question].argmax(1)]
            for question, words in ANSWERS.items()
        ))  # fmt: skip

    def look(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what ``embed`` does, and for each question how likely each word is, (n, words)."""
        answers = list(self._answers(images))
        said = {
            question: torch.cat([answer.logits[question] for answer in answers]).softmax(1)
            for question in ANSWERS
        }
        return torch.cat([answer.embedding for answer in answers]), said

    def words(self, question: str) -> tuple[str, ...]:
        """Return what a question may be answered with."""
        return ANSWERS[question]

    def embed(self, images: Tensor) -> Tensor:
        """Return what likeness compares, (n, 64), each of length 1."""
        return torch.cat([answer.embedding for answer in self._answers(images)])

    def likeness(self, images: Tensor, views: Tensor) -> Tensor:
        """Return how much each picture looks like the subject of the views: (n,), 1 is the most."""
        return self.embed(images) @ F.normalize(self.embed(views).mean(0), dim=0)

    @torch.no_grad()
    def _answers(self, images: Tensor) -> Iterable[Answer]:
        for part in images.float().split(AT_ONCE):
            yield self.network(resized(part, self.side))


def new_network(architecture: str, side: int = SIDE) -> nn.Module:
    """Return an untrained network of an architecture, always the same."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(tuple(NETWORKS).index(architecture))
        return NETWORKS[architecture](side)


def resized(images: Tensor, side: int) -> Tensor:
    """Return (n, 3, h, w) at (n, 3, side, side), without aliasing."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
