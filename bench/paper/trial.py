"""One subject by one method and seed: train, paint, judge, and keep the record.

A record is written whole when all of it is done, so a run that was killed goes on with the next
one. The pictures and the LoRA lie beside it.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...lora2_core import comfy_host, config, lora_file, scoring
from ...tools.tiny_sdxl.figures import write_json
from ...tools.tiny_sdxl.grids import read_strip, write_strip
from ...tools.tiny_sdxl.latents import to_pixels
from ...tools.tiny_sdxl.painting import Painter
from ...tools.tiny_sdxl.personalising import Parts, demo_config, train_lora
from . import cuts, rivals
from .measuring import with_peak
from .methods import Method
from .plan import Plan
from .subjects import Study

BASE = "base"  # in a method's place: no LoRA at all
OWN = "own"  # the subject itself, as the autoencoder gives it back
_FIRST_SEED = 1000  # of the noise of pictures; the same for every method and every subject


@dataclass(frozen=True)
class Bench:
    """A base with its judges, and where records go."""

    parts: Parts
    weights: str  # of the base, as told by its fingerprint
    folder: Path
    plan: Plan
    methods: Mapping[str, Method]

    def record(self, study: Study, name: str, seed: int, rate: float | None = None) -> dict:
        """The record of a method on a subject; made when it is not there yet.

        ``rate``: the learning rate; None for a method that does not train.
        """
        stem = name if rate is None else f"{name}-{rate:g}"
        file = self.folder / "records" / study.name / f"{stem}-{seed}.json"
        settings = self._settings(study, name, seed, rate)
        if file.is_file():
            found = json.loads(file.read_text("utf-8"))
            if found["settings"] == settings:
                return found
        file.parent.mkdir(parents=True, exist_ok=True)
        found = {"settings": settings, **self._make(study, name, seed, rate, file)}
        write_json(file, found)
        gc.collect()
        return found

    def _settings(self, study: Study, name: str, seed: int, rate: float | None) -> dict[str, Any]:
        method = asdict(self.methods[name]) if name in self.methods else {}
        given = {
            "base": self.weights, "subject": study.name, "method": name, "how": method,
            "seed": seed, "rate": rate, "plan": asdict(self.plan), "prompts": list(study.prompts),
        }  # fmt: skip
        return json.loads(json.dumps(given))

    def _make(
        self, study: Study, name: str, seed: int, rate: float | None, file: Path
    ) -> dict[str, Any]:
        strip, lora = file.with_suffix(".png"), file.with_suffix(".safetensors")
        if name == OWN:
            views = to_pixels(view.image for view in study.own)
            write_strip(strip, self.parts.through_vae(views))
            return {"scores": self.judged(study, read_strip(strip), 1)}
        took: dict[str, Any] = {}
        if name != BASE:
            took, peak = with_peak(lambda: self._train(study, name, seed, rate, lora))
            took |= {"peak_megabytes": peak, "bytes": lora.stat().st_size, "ranks": _ranks(lora)}
        write_strip(strip, self._paint(study, lora if name != BASE else None))
        # Read back, so that judges see the same whether a run goes on or never stopped.
        return {**took, "scores": self.judged(study, read_strip(strip), self.plan.pictures)}

    def _train(
        self, study: Study, name: str, seed: int, rate: float | None, lora: Path
    ) -> dict[str, Any]:
        method = self.methods[name]
        if method.kind == "cut":
            source, size = (self._made(study, other, seed) for other in (method.of, method.to))
            return cuts.cut(source, lora, size.stat().st_size / 1e6, method.mode)
        assert rate is not None, "a method that trains has a learning rate"
        settings = training_config(method, self.plan, seed, rate)
        if method.kind == "peft":
            return rivals.train(self.parts, study.photos, method, settings, lora)
        return train_lora(self.parts, study.photos, settings, lora)

    def _made(self, study: Study, name: str, seed: int) -> Path:
        """The LoRA of another method, which comes earlier in the order of a table."""
        folder = self.folder / "records" / study.name
        named = re.compile(rf"{re.escape(name)}-[0-9.e-]+-{seed}\.safetensors")
        found = [one for one in folder.glob("*.safetensors") if named.fullmatch(one.name)]
        if len(found) != 1:
            raise ValueError(f"{study.name}: {name} (seed {seed}) must be run before what cuts it.")
        return found[0]

    def _paint(self, study: Study, lora: Path | None) -> Tensor:
        prompts = [prompt for prompt in study.prompts for _ in range(self.plan.pictures)]
        seeds = [_FIRST_SEED + number for number in range(len(prompts))]
        parts = self.parts
        model, clip = parts.model, parts.clip
        if lora is not None:
            state = lora_file.load(lora).state
            model, clip = comfy_host.apply_state(model, clip, state, 1.0, 1.0, lora.name)
        return Painter(model, clip, parts.vae, parts.sampling).paint(prompts, seeds)

    def judged(self, study: Study, images: Tensor, pictures: int) -> dict[str, Any]:
        """What each judge says, prompt by prompt: likeness to the photos, and the place's and the
        object's probability, as far as it has words for them."""
        photos = to_pixels(view.image for view in study.photos)
        found: dict[str, Any] = {}
        for name, judge in self.parts.judges.items():
            cosines = scoring.cosines(judge.embed(images), judge.embed(photos)).mean(1)
            said = judge.probabilities(images)
            told = {"likeness": cosines.tolist()}
            if study.places:
                asked = [place for place in study.places for _ in range(pictures)]
                told["place"] = _probability(said["place"], judge.words("place"), asked)
            if study.thing:
                asked = [study.thing] * len(images)
                told["object"] = _probability(said["object"], judge.words("object"), asked)
            found[name] = {key: _by_prompt(values, pictures) for key, values in told.items()}
        return found


def training_config(method: Method, plan: Plan, seed: int, rate: float) -> config.TrainConfig:
    """The ``TrainConfig`` of a method; of a rival only what is not about ranks counts."""
    mode, ranks = ("fixed", {}) if method.kind == "peft" else (method.mode, method.rank)
    return demo_config(
        mode,
        ranks,
        steps=plan.steps,
        learning_rate=rate,
        batch_size=plan.batch,
        seed=seed,
        entropy_weight=method.entropy,
    )


def _ranks(file: Path) -> dict[str, int]:
    components, _ = lora_file.inspect(file)
    return {one.key: one.rank for one in components}


def _probability(said: Tensor, words: Sequence[str], asked: Sequence[str]) -> list[float]:
    places = torch.tensor([words.index(word) for word in asked])
    return said.gather(1, places[:, None])[:, 0].tolist()


def _by_prompt(values: Sequence[float], pictures: int) -> list[float]:
    """The mean over the pictures of each prompt."""
    return [
        statistics.fmean(values[first : first + pictures])
        for first in range(0, len(values), pictures)
    ]
