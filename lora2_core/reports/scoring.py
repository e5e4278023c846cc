"""How much pictures look like a subject, and how much like their prompts.

The paper's measure (sections 4 and 5.1): cosines between features, averaged over the pictures of a
prompt, over the prompts of a subject, then over subjects. Who judges is part of every figure, since
figures of two judges cannot be compared. Knows no network: see :mod:`.vision`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..config.checks import ConfigError

Picture = Image.Image | Path  # a file is opened when a judge looks at it
EmbedPictures = Callable[[Sequence[Picture]], Tensor]  # → (pictures, features)
EmbedTexts = Callable[[Sequence[str]], Tensor]  # → (texts, features)


@dataclass(frozen=True)
class Subject:
    """Photos of a subject, and what was painted of it for each prompt."""

    name: str
    real: Sequence[Picture]
    painted: Mapping[str, Sequence[Picture]]  # prompt → pictures

    def __post_init__(self) -> None:
        if not self.real:
            raise ConfigError(f"{self.name} has no photo to compare with; add at least one.")
        if not any(self.painted.values()):
            raise ConfigError(f"{self.name} has no painted picture; add at least one.")


class Judge(Protocol):
    """Something that gives every picture of a subject a number."""

    @property
    def metric(self) -> str:
        """DINO, CLIP-I, CLIP-T, …"""
        ...

    @property
    def name(self) -> str:
        """Of the network."""
        ...

    def judge(self, subject: Subject) -> dict[str, list[float]]:
        """Prompt → the number of each of its pictures."""
        ...


@dataclass(frozen=True)
class Likeness:
    """A judge of how much pictures look like the photos: cosine over all pairs, -1 to 1."""

    metric: str
    name: str
    embed: EmbedPictures

    def judge(self, subject: Subject) -> dict[str, list[float]]:
        photos = self.embed(subject.real)  # (photos, features)
        found: dict[str, list[float]] = {}
        for prompt, pictures in subject.painted.items():
            if pictures:
                found[prompt] = cosines(self.embed(pictures), photos).mean(1).tolist()
        return found


@dataclass(frozen=True)
class Obedience:
    """A judge of how much pictures show what their prompt says: cosine with the text, -1 to 1.

    A rare word that stands for the subject says nothing to it: ``without``, where it is given, is
    cut out of every prompt. The paper does not say whether it does so.
    """

    metric: str
    name: str
    embed: EmbedPictures
    embed_texts: EmbedTexts
    without: str = ""

    def judge(self, subject: Subject) -> dict[str, list[float]]:
        prompts = [prompt for prompt, pictures in subject.painted.items() if pictures]
        texts = self.embed_texts([self.asked(prompt) for prompt in prompts])  # (prompts, features)
        return {
            prompt: cosines(self.embed(subject.painted[prompt]), text[None])[:, 0].tolist()
            for prompt, text in zip(prompts, texts, strict=True)
        }

    def asked(self, prompt: str) -> str:
        """The prompt as the judge reads it."""
        cut = self.without.split()
        words = prompt.split()
        kept: list[str] = []
        while words:
            if cut and words[: len(cut)] == cut:
                del words[: len(cut)]
            else:
                kept.append(words.pop(0))
        return " ".join(kept)


@dataclass(frozen=True)
class Score:
    """What one judge says."""

    metric: str
    judge: str
    subjects: dict[str, float]  # each the mean of its prompts
    pictures: int  # in all
    prompts: dict[str, dict[str, float]] = field(default_factory=dict)  # subject → prompt → mean

    @property
    def mean(self) -> float:
        """Over subjects."""
        return statistics.fmean(self.subjects.values())

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, **asdict(self)}


def score(subjects: Sequence[Subject], judges: Sequence[Judge]) -> list[Score]:
    """What each judge says. Raises ConfigError without a subject or a judge."""
    if not subjects:
        raise ConfigError("there is no subject to score; add photos and painted pictures.")
    if not judges:
        raise ConfigError("there is no judge; choose a DINO, a CLIP or a CLIP_VISION model.")
    return [_score(subjects, judge) for judge in judges]


def _score(subjects: Sequence[Subject], judge: Judge) -> Score:
    given = {subject.name: judge.judge(subject) for subject in subjects}
    prompts = {
        name: {prompt: statistics.fmean(values) for prompt, values in of_prompts.items()}
        for name, of_prompts in given.items()
    }
    return Score(
        judge.metric,
        judge.name,
        {name: statistics.fmean(values.values()) for name, values in prompts.items()},
        sum(len(values) for of_prompts in given.values() for values in of_prompts.values()),
        prompts,
    )


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Between all rows of (n, features) and (m, features): (n, m), in fp32."""
    return F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).T


def table(scores: Sequence[Score]) -> str:
    """For a person: a line a subject, a column a judge."""
    names = list(scores[0].subjects)
    wide = max(len(name) for name in (*names, "Mean of subjects"))
    heads = [one.metric for one in scores]
    lines = [f"{'':<{wide}}  " + "  ".join(f"{head:>11}" for head in heads)]
    for name in names if len(names) > 1 else []:
        row = "  ".join(f"{one.subjects[name]:>11.4f}" for one in scores)
        lines.append(f"{name:<{wide}}  {row}")
    last = "Mean of subjects" if len(names) > 1 else names[0]
    lines.append(f"{last:<{wide}}  " + "  ".join(f"{one.mean:>11.4f}" for one in scores))
    lines += ["", *(f"{one.metric}: {one.judge}, {one.pictures} pictures" for one in scores)]
    return "\n".join(lines)
