"""One subject by one method and seed: train, paint, judge, and keep the record.

A record is written whole when all of it is done, so a run that was killed goes on with the next
one. The pictures and the LoRA lie beside it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ....lora2_core import lora_file
from ....lora2_core.adapters.budget import HEADROOM
from ....lora2_core.config.ranks import RankConfig
from ....lora2_core.config.train import TrainConfig
from ....lora2_core.training.trainer import TrainingError
from ....tools.tiny_sdxl.evaluation.figures import write_json
from ....tools.tiny_sdxl.pictures import read_strip, to_pixels, write_strip
from ..bases.protocol import Base, Scores
from ..methods import BASE, OWN, Method
from ..plan import Plan
from ..records import archive
from ..subjects.study import Study
from . import allocation, cuts, ours, rivals, strengths
from .measuring import with_peak

_FIRST_SEED = 1000  # of the noise of pictures; the same for every method and every subject
_DIGITS = 5  # of what judges say


@dataclass(frozen=True)
class Work:
    """What is to be done once."""

    study: Study
    name: str  # of the method, or BASE or OWN
    seed: int
    rate: float | None = None  # of learning; None for a method that does not train

    @property
    def stem(self) -> str:
        return archive.stem_of(self.name, self.seed, self.rate)


@dataclass(frozen=True)
class Needs:
    """Other work that some is made from."""

    of: Work | None = None  # whose LoRA is cut
    to: Work | None = None  # whose bytes, or a part of them, a file has to fit


@dataclass(frozen=True)
class Bench:
    """A base, where records go, and by what they are made."""

    base: Base
    folder: Path
    plan: Plan
    methods: Mapping[str, Method]
    rates: Mapping[str, float]  # of learning, of every method that trains
    tuned_as: str = ""  # under which name rates are kept

    def file(self, work: Work) -> Path:
        """Of the record; the LoRA and the pictures have its name with other endings."""
        return archive.file_of(self.folder, work.study.name, work.stem)

    def found(self, work: Work, with_lora: bool = False) -> dict[str, Any] | None:
        """The record of work that is done, with these settings; the LoRA beside it on request.

        Training that failed is done, too, and has no LoRA.
        """
        file = self.file(work)
        record = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        whole = "failed" in record or file.with_suffix(".safetensors").is_file()
        return record if self.is_of(record, work) and (whole or not with_lora) else None

    def is_of(self, record: Mapping[str, Any], work: Work) -> bool:
        """Whether a record was made by this work with these settings."""
        return record.get("settings") == self._settings(work)

    def needs(self, work: Work) -> Needs:
        """What must be done before: what a cut cuts, and whose size a file has to fit."""
        method = self.methods.get(work.name)
        of, to = (
            Work(work.study, name, work.seed, self.rates.get(name)) if name else None
            for name in ((method.of, method.to) if method else ("", ""))
        )
        return Needs(of, to)

    def record(self, work: Work, with_lora: bool = False) -> dict[str, Any]:
        """The record of some work; made when it is not there yet, with all done that it needs."""
        if (found := self.found(work, with_lora)) is not None:
            return found
        self.file(work).parent.mkdir(parents=True, exist_ok=True)
        found = {"settings": self._settings(work), **self._make(work, self.needs(work))}
        write_json(self.file(work), found)
        return found

    def _settings(self, work: Work) -> dict[str, Any]:
        """All that a record depends on, as JSON gives it back."""
        how = self._how(work.name) if work.name in self.methods else {}
        given = {
            "base": self.base.weights, "subject": work.study.name, "method": work.name,
            "how": how, "seed": work.seed, "rate": work.rate,
            "plan": {name: value for name, value in asdict(self.plan).items() if value},
            "sampling": asdict(self.base.parts.sampling),
        }  # fmt: skip
        return json.loads(json.dumps(given))

    def _how(self, name: str) -> dict[str, Any]:
        """A method's settings, those of the methods that its file is made from among them."""
        method = self.methods[name]
        told = asdict(method)
        how = {key: told[key] for key in ("kind", "mode", "rank", "entropy", "of", "to", "part")}
        how["change"] = ""  # kept records of the sweep name one, of code that is no more
        if method.mode in ("balanced", "paper"):
            how["rank"] = asdict(RankConfig.for_mode(method.mode, **method.rank))
        if method.kind == "ours" and method.to:
            how["room"] = HEADROOM
        if method.gives:
            how["gives"] = method.gives
        if method.mode == "strength":
            how |= {"strength": method.strength, "kept": method.kept}
        for key, other in (("of", method.of), ("to", method.to)):
            # A fixed rank takes the same bytes whatever it has learnt.
            if other and (key == "of" or self.methods[other].mode != "fixed"):
                how[f"{key}_how"] = {**self._how(other), "rate": self.rates.get(other)}
        return how

    def _make(self, work: Work, needs: Needs) -> dict[str, Any]:
        file, parts = self.file(work), self.base.parts
        strip, lora = file.with_suffix(".png"), file.with_suffix(".safetensors")
        if work.name == OWN:
            views = to_pixels(view.image for view in work.study.own)
            write_strip(strip, parts.through_vae(views))
            return {"scores": self._judged(work.study, strip, 1)}
        took: dict[str, Any] = {}
        for needed in (one for one in (needs.of, needs.to) if one is not None):
            if "failed" in (found := self.found(needed) or {}):
                return {"failed": f"{needed.name}, which it needs, failed: {found['failed']}"}
        if work.name != BASE:
            try:
                took, peak = with_peak(lambda: self._train(work, needs, lora))
            except TrainingError as error:  # too high a learning rate: that is a result, too
                return {"failed": str(error)}
            ranks = {one.key: one.rank for one in lora_file.inspect(lora)[0]}
            took |= {"peak_megabytes": peak, "bytes": lora.stat().st_size, "ranks": ranks}
            if needs.of is not None and not self.methods[work.name].trained:
                took |= self._training_of(needs.of)
        prompts = [prompt for prompt in work.study.prompts for _ in range(self.plan.pictures)]
        seeds = [_FIRST_SEED + number for number in range(len(prompts))]
        write_strip(strip, self.base.paint(prompts, seeds, lora if took else None))
        return {**took, "scores": self._judged(work.study, strip, self.plan.pictures)}

    def _train(self, work: Work, needs: Needs, lora: Path) -> dict[str, Any]:
        method = self.methods[work.name]
        megabytes = self._bytes(needs.to) / method.part / 1e6 if needs.to else None
        if needs.of is not None and not method.trained:
            source = self.file(needs.of).with_suffix(".safetensors")
            if method.mode == "strength":
                return self._weaken(work, needs.of, source, lora)
            assert megabytes is not None, "a cut is to a size"
            return cuts.cut(source, lora, megabytes, method.mode)
        assert work.rate is not None, "a method that trains has a learning rate"
        if megabytes is not None:
            method = replace(method, rank={**method.rank, "target_megabytes": megabytes})
        settings = training_config(method, self.base, self.plan, work.seed, work.rate)
        parts, photos = self.base.parts, work.study.photos
        if method.kind == "peft":
            return rivals.train(parts, photos, method, settings, lora)
        if not method.gives:
            return ours.train(parts, photos, settings, lora)
        if needs.of is not None:
            ranks = (self.found(needs.of) or {})["ranks"]
        else:
            assert megabytes is not None, "what is given out has a size"
            ranks = allocation.by_gradient(parts, photos, settings, megabytes)
        return ours.train(parts, photos, allocation.holding(settings, ranks), lora, ranks)

    def _weaken(self, work: Work, of: Work, source: Path, lora: Path) -> dict[str, Any]:
        origin = of
        while origin.rate is None:  # a cut of what was trained
            source_of = self.needs(origin).of
            assert source_of is not None, "a cut is of something"
            origin = source_of
        trained = self.methods[origin.name]
        settings = training_config(trained, self.base, self.plan, work.seed, origin.rate)
        method, photos = self.methods[work.name], work.study.photos
        return strengths.weaken(self.base.parts, photos, settings, method, source, lora)

    def _training_of(self, source: Work) -> dict[str, Any]:
        """What a cut took is what its source did: cutting takes no time and no memory beside it."""
        record = self.found(source) or {}
        return {key: record[key] for key in ("seconds", "peak_megabytes") if key in record}

    def _bytes(self, work: Work) -> int:
        """Of a file that need not be there any more: its record says."""
        return int((self.found(work) or {})["bytes"])

    def _judged(self, study: Study, strip: Path, pictures: int) -> Scores:
        """By prompt. Pictures are read back, so that what judges see is what was kept."""
        images = read_strip(strip)
        prompts = [number // pictures for number in range(len(images))]
        said = self.base.judge(study, images, prompts)
        return {
            judge: {key: _by_prompt(values, pictures) for key, values in told.items()}
            for judge, told in said.items()
        }


def training_config(method: Method, base: Base, plan: Plan, seed: int, rate: float) -> TrainConfig:
    """The ``TrainConfig`` of a method; of a rival only what is not about ranks counts."""
    mode, ranks = ("fixed", {}) if method.kind == "peft" else (method.mode, method.rank)
    return TrainConfig(
        steps=plan.plain_steps if method.plain and plan.plain_steps else plan.steps,
        learning_rate=rate,
        batch_size=plan.batch,
        seed=seed,
        entropy_weight=method.entropy,
        rank=RankConfig.for_mode(mode, **ranks),
        **base.settings,
    )


def _by_prompt(values: Sequence[float], pictures: int) -> list[float]:
    """The mean over the pictures of each prompt."""
    return [
        round(statistics.fmean(values[first : first + pictures]), _DIGITS)
        for first in range(0, len(values), pictures)
    ]
