"""What is personalised: a base with its judges, its usual settings, and how it paints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...lora2_core.reports import scoring
from ...tools.tiny_sdxl.evaluation import load_parts
from ...tools.tiny_sdxl.latents import to_pixels
from ...tools.tiny_sdxl.painting import Painter
from ...tools.tiny_sdxl.personalising import Parts, demo_settings, fingerprint
from .plan import DEMO, Plan
from .subjects import Study

Scores = dict[str, dict[str, list[float]]]  # judge → measure → by picture


class Base(Protocol):
    """A model that can be personalised, painted with and judged."""

    @property
    def name(self) -> str:
        """In tables."""
        ...

    @property
    def parts(self) -> Parts: ...

    @property
    def weights(self) -> str:
        """A fingerprint."""
        ...

    @property
    def width(self) -> int:
        """Of the narrowest attention."""
        ...

    @property
    def rates(self) -> tuple[float, ...]:
        """That every method is tried at."""
        ...

    @property
    def plan(self) -> Plan:
        """How much is usually trained on it."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of its TrainConfig, the same for all methods."""
        ...

    def paint(self, prompts: Sequence[str], seeds: Sequence[int], lora: Path | None) -> Tensor:
        """A picture of each prompt: (n, 3, height, width), 0 to 1."""
        ...

    def judge(self, study: Study, images: Tensor, prompts: Sequence[int]) -> Scores:
        """What each judge says of each picture; ``prompts`` says which prompt it is of."""
        ...


@dataclass(frozen=True)
class Demo:
    """The base that comes with the pack, and the judges that were trained on its world."""

    parts: Parts
    weights: str
    name: str = "demo"
    width: int = 64
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    plan: Plan = DEMO

    @classmethod
    def load(cls) -> Demo:
        parts = load_parts()
        return cls(parts, fingerprint(parts))

    @property
    def settings(self) -> Mapping[str, Any]:
        return demo_settings()

    def paint(self, prompts: Sequence[str], seeds: Sequence[int], lora: Path | None) -> Tensor:
        parts = self.parts
        model, clip = parts.with_lora(lora) if lora else (parts.model, parts.clip)
        return Painter(model, clip, parts.vae, parts.sampling).paint(prompts, seeds)

    def judge(self, study: Study, images: Tensor, prompts: Sequence[int]) -> Scores:
        """Likeness to the photos, and the place's and the object's probability, as far as the
        judges have words for them."""
        photos = to_pixels(view.image for view in study.photos)
        found: Scores = {}
        for name, judge in self.parts.judges.items():
            embedded, said = judge.look(images)
            photographed, _ = judge.look(photos)
            told = {"likeness": scoring.cosines(embedded, photographed).mean(1).tolist()}
            if study.places:
                asked = [study.places[prompt] for prompt in prompts]
                told["place"] = _probability(said["place"], judge.words("place"), asked)
            if study.thing:
                asked = [study.thing] * len(images)
                told["object"] = _probability(said["object"], judge.words("object"), asked)
            found[name] = told
        return found


def _probability(said: Tensor, words: Sequence[str], asked: Sequence[str]) -> list[float]:
    places = torch.tensor([words.index(word) for word in asked])
    return said.gather(1, places[:, None])[:, 0].tolist()
