"""A real checkpoint of the SDXL family as base, judged as the paper does: DINO, CLIP-I, CLIP-T."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ....lora2_core import comfy_host
from ....lora2_core.adapters.targets import find_targets
from ....lora2_core.reports import scoring, vision
from ....lora2_core.reports.scoring import Judge, Subject
from ....tools.tiny_sdxl.evaluation.painting import Painter, Sampling
from ....tools.tiny_sdxl.evaluation.parts import Parts
from ....tools.tiny_sdxl.pictures import to_pictures
from ....tools.tiny_sdxl.world.subjects import RARE_WORD
from .. import plan
from ..subjects.study import Study
from .protocol import Scores

_SDXL_STEPS, _KOALA_STEPS = 50, 25  # of sampling, section 4
_MEASURES = {"DINO": "likeness", "CLIP-I": "CLIP-I", "CLIP-T": "text"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, and the paper's judges from folders."""

    parts: Parts
    weights: str
    name: str
    width: int
    judges: Sequence[Judge]
    plan: plan.Plan
    resolution: int = 1024  # px; the paper's
    rates: tuple[float, ...] = (2.5e-5, 5e-5, 1e-4, 2e-4)  # the paper: 5e-5

    @classmethod
    def load(cls, file: Path, dino: Path, clip: Path, **settings: Any) -> Checkpoint:
        """Read it as ComfyUI's own loader does.

        Raises ValueError for a file that holds no model, CLIP or VAE, HostError for another
        family, and JudgeError for judges that cannot be used.
        """
        sd: Any = importlib.import_module("comfy.sd")
        model, clip_model, vae, *_ = sd.load_checkpoint_guess_config(str(file))
        lacks = [
            name
            for name, part in (("model", model), ("CLIP", clip_model), ("VAE", vae))
            if part is None
        ]
        if lacks:
            raise ValueError(f"{file.name} holds no {' and no '.join(lacks)}; give a checkpoint.")
        comfy_host.check_model(model)
        kind = type(model.model.model_config).__name__
        found = find_targets(model.model.diffusion_model)
        steps = _KOALA_STEPS if "KOALA" in kind else _SDXL_STEPS
        parts = Parts(model, clip_model, vae, {}, Sampling(steps=steps, guidance=5.0))
        return cls(
            parts,
            parts.fingerprint(),
            f"{file.stem} ({kind})",
            min(target.largest_rank for target in found),
            vision.judges(dino, clip, RARE_WORD, model.load_device),
            plan.KOALA if "KOALA" in kind else plan.SDXL,
            **settings,
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"resolution": self.resolution, "probes": 0, "gradient_checkpointing": True}

    def paint(self, prompts: Sequence[str], seeds: Sequence[int], lora: Path | None) -> Tensor:
        parts = self.parts
        model, clip = parts.with_lora(lora) if lora else (parts.model, parts.clip)
        painter = Painter(model, clip, parts.vae, parts.sampling, self.resolution, at_once=1)
        return painter.paint(prompts, seeds)

    def judge(self, study: Study, images: Tensor, prompts: Sequence[int]) -> Scores:
        painted: dict[str, list[scoring.Picture]] = {}
        for picture, prompt in zip(to_pictures(images), prompts, strict=True):
            painted.setdefault(study.prompts[prompt], []).append(picture)
        photos = [Image.fromarray(view.image) for view in study.photos]
        subject = Subject(study.name, photos, painted)
        found: Scores = {}
        for judge in self.judges:
            said = judge.judge(subject)
            values = [value for prompt in painted for value in said[prompt]]
            found[f"{judge.metric} {judge.name}"] = {_MEASURES[judge.metric]: values}
        return found
