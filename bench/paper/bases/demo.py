"""The base that comes with the pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....lora2_core.reports import scoring
from ....lora2_core.tiny_sdxl.model import SIZE
from ....tools.tiny_sdxl.evaluation.painting import Painter
from ....tools.tiny_sdxl.evaluation.parts import DEMO_SETTINGS, Parts, load_parts
from ....tools.tiny_sdxl.pictures import to_pixels
from ..plan import DEMO, Plan
from ..subjects.study import Study
from . import outside
from .outside import Outside
from .protocol import Scores


@dataclass(frozen=True)
class Demo:
    """The base that comes with the pack, and the judges that were trained on its world."""

    parts: Parts
    weights: str
    name: str = "demo"
    width: int = 64
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    plan: Plan = DEMO
    resolution: int = SIZE  # px
    outside: Outside | None = None  # a judge that does not count, where it is installed

    @classmethod
    def load(cls) -> Demo:
        parts = load_parts()
        return cls(parts, parts.fingerprint(), outside=outside.find())

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**DEMO_SETTINGS, "resolution": self.resolution}

    def paint(self, prompts: Sequence[str], seeds: Sequence[int], lora: Path | None) -> Tensor:
        parts = self.parts
        model, clip = parts.with_lora(lora) if lora else (parts.model, parts.clip)
        painter = Painter(model, clip, parts.vae, parts.sampling, self.resolution)
        return painter.paint(prompts, seeds)

    def judge(self, study: Study, images: Tensor, prompts: Sequence[int]) -> Scores:
        """Likeness to the photos, and the place's and the object's probability, as far as the
        judges have words for them; of several subjects also whether each is most like itself."""
        asked = torch.tensor([[study.subject_of(prompt)] for prompt in prompts])  # (images, 1)
        photos = [to_pixels(view.image for view in views) for views in study.subjects]
        found: Scores = {}
        for name, judge in self.parts.judges.items():
            embedded, said = judge.look(images)
            alike = _alike(embedded, photos, judge.embed)  # (images, subjects)
            told = {"likeness": alike.gather(1, asked)[:, 0].tolist()}
            if len(photos) > 1:
                told["apart"] = (alike.argmax(1) == asked[:, 0]).double().tolist()
            for question, words in (("place", study.places), ("object", study.things)):
                if words:
                    wanted = [words[prompt] for prompt in prompts]
                    told[question] = _probability(said[question], judge.words(question), wanted)
            found[name] = told
        if self.outside is not None:
            alike = _alike(self.outside.embed(images), photos, self.outside.embed)
            found[outside.NAME] = {"outside": alike.gather(1, asked)[:, 0].tolist()}
        return found


def _alike(embedded: Tensor, photos: Sequence[Tensor], embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean cosine of each picture to the photos of each subject; (pictures, subjects)."""
    return torch.stack([scoring.cosines(embedded, embed(some)).mean(1) for some in photos], 1)


def _probability(said: Tensor, words: Sequence[str], asked: Sequence[str]) -> list[float]:
    places = torch.tensor([words.index(word) for word in asked])
    return said.gather(1, places[:, None])[:, 0].tolist()
