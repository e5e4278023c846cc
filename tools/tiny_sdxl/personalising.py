"""Teach the base subjects that it never saw, by several methods, and judge how far each one gets.

What takes long lies in files: a method's LoRA and what it paints. Both are made again only when
the base or a setting has changed, and are judged anew every time.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .figures import comparison, flattened, mean_over, shares, write_json
from .grids import Row, read_strip, subject_grid, write_strip
from .host import core
from .judges import Judge
from .latents import SIZE, to_pixels
from .painting import Painter, Sampling
from .subjects import SUBJECT_SEEDS, Subject, View, make_subject, subject_views

VAE_AT_ONCE = 16  # pictures
BASE = "base"  # in the place of a method's name: no LoRA at all


@dataclass(frozen=True)
class Parts:
    """What is evaluated, as ComfyUI's nodes hold it, and who judges it."""

    model: Any  # MODEL
    clip: Any
    vae: Any
    judges: Mapping[str, Judge]
    sampling: Sampling = field(default_factory=Sampling)

    def painter(self) -> Painter:
        """Return what paints with the base as it is."""
        return Painter(self.model, self.clip, self.vae, self.sampling)

    def with_lora(self, file: Path) -> tuple[Any, Any]:
        """Return MODEL and CLIP with a LoRA applied as the loader's node does it."""
        state = core("lora_file").load(file).state
        apply = core("comfy_host").apply_state
        return apply(self.model, self.clip, state, 1.0, 1.0, file.name)

    @torch.inference_mode()
    def through_vae(self, images: Tensor) -> Tensor:
        """Return pictures (n, 3, h, w) in 0 to 1 encoded and decoded, as users' are."""
        parts = []
        for some in images.split(VAE_AT_ONCE):
            latents = self.vae.encode(some.permute(0, 2, 3, 1))  # (n, 4, h/8, w/8)
            parts.append(self.vae.decode(latents).permute(0, 3, 1, 2).float().clamp(0, 1))
        return torch.cat(parts)


@dataclass(frozen=True)
class Method:
    """A way to train a LoRA."""

    label: str
    mode: str
    learning_rate: float
    entropy_weight: float = 0.0
    ranks: Mapping[str, float] = field(default_factory=dict)  # other than the mode's own


# Each at the best of the learning rates that were tried on one subject (docs/method.md).
METHODS = {
    "fixed-1": Method("LoRA, rank 1", "fixed", 8e-3, ranks={"target_rank": 1}),
    "fixed-8": Method("LoRA, rank 8", "fixed", 4e-3, ranks={"target_rank": 8}),
    "fixed-largest": Method("LoRA, largest rank", "fixed", 1e-3, ranks={"target_rank": 512}),
    "balanced": Method("LoRA²", "balanced", 4e-3, 1e-4, {"target_rank": 8}),
}


@dataclass(frozen=True)
class Plan:
    """How much is trained and painted for each subject and method."""

    steps: int = 400
    batch: int = 2
    prompts: int = 12  # of the 12 places that training does not show
    pictures: int = 2  # of each prompt, from noise of their own; the grids show the first


def personal_figures(
    parts: Parts, folder: Path, seeds: Sequence[int] = SUBJECT_SEEDS[:8], plan: Plan = Plan()
) -> dict[str, Any]:
    """Return the figures of all subjects and what they come to; pictures go into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = fingerprint(parts)
    found = {}
    for seed in seeds:
        subject = make_subject(seed)
        found[f"{seed}-{subject.object}"] = Trial(parts, subject, plan, folder, state).figures()
    return {"summary": summary(found), "subjects": found}


def fingerprint(parts: Parts) -> str:
    """Return a name for the weights of the base, the same as long as they are."""
    import comfy.model_management

    # The weights of a clone with a LoRA are in the model until another one is asked for.
    comfy.model_management.load_models_gpu([parts.model], force_full_load=True)
    modules = (
        parts.model.model.diffusion_model,
        parts.clip.cond_stage_model,
        parts.vae.first_stage_model,
    )
    return "-".join(core("data.cache").weights_hash(module)[:12] for module in modules)


class Trial:
    """One subject: its photos, the prompts, and what each method makes of them."""

    def __init__(self, parts: Parts, subject: Subject, plan: Plan, folder: Path, state: str):
        self.parts, self.subject, self.plan, self.folder = parts, subject, plan, folder
        self.state = state  # of the base's weights
        self.photos = subject_views(subject, "train", SIZE)
        self.held_out = subject_views(subject, "held_out", SIZE)[: plan.prompts] * plan.pictures
        self.name = f"{subject.seed}-{subject.object}"

    def figures(self) -> dict[str, Any]:
        """Return what judges say of base and methods; write the subject's grid."""
        own = pixels_of(self.held_out)
        levels = {
            "own": self.judged(own),
            "own after vae": self.judged(self.parts.through_vae(own)),
        }
        tried = {name: self.attempt(name) for name in (BASE, *METHODS)}
        judged = {name: record["judged"] for name, record in tried.items()}
        methods = {
            name: tried[name]["training"]
            | {
                "likeness": judged[name],
                "share": shares(judged[name], judged[BASE], levels["own"]),
                "share of reachable": shares(judged[name], judged[BASE], levels["own after vae"]),
            }
            for name in METHODS
        }
        result = {"levels": levels | {BASE: judged[BASE]}, "methods": methods}
        self._write_grid(result)
        return result

    def attempt(self, name: str) -> dict[str, Any]:
        """Return the record of a method, or of the base alone; make what is not there yet."""
        record_file, strip = self._file(name, "json"), self._file(name, "png")
        settings = self._settings(name)
        record = json.loads(record_file.read_text("utf-8")) if record_file.is_file() else {}
        if record.get("settings") != settings or not strip.is_file():
            training = self._training(name, record, settings)
            write_strip(strip, self._paint(name))
            record = {"settings": settings, "training": training}
        # Always from the file, so that a run that goes on says the same as one that never stopped.
        record["judged"] = self.judged(read_strip(strip))
        write_json(record_file, record)
        likeness = statistics.fmean(each["mean"] for each in record["judged"].values())
        print(f"{self.name}, {name}: likeness {likeness:.3f}", flush=True)
        return record

    def judged(self, images: Tensor) -> dict[str, dict[str, Any]]:
        """Return for each judge how much pictures look like the photos, and where they are."""
        photos = pixels_of(self.photos)
        found = {}
        for name, judge in self.parts.judges.items():
            likeness = judge.likeness(images, photos).tolist()
            places = judge.read(images).place
            right = [view.place == place for view, place in zip(self.held_out, places, strict=True)]
            found[name] = {
                "mean": statistics.fmean(likeness),
                "place": statistics.fmean(right),
                "each": likeness,
            }
        return found

    def _training(
        self, name: str, record: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> dict[str, float]:
        """Return what a method's training took; train unless the same LoRA is there already."""
        if name not in METHODS:
            return {}
        known = record.get("settings", {})
        same = all(known.get(part) == settings[part] for part in ("base", "training"))
        if same and self._file(name, "safetensors").is_file():
            return record["training"]
        config = training_config(METHODS[name], self.plan, self.subject.seed)
        return train_lora(self.parts, self.photos, config, self._file(name, "safetensors"))

    def _paint(self, name: str) -> Tensor:
        """Return a picture of each prompt, from the same noise for all methods."""
        prompts, seeds = [view.caption for view in self.held_out], self._seeds()
        if name == BASE:
            return self.parts.painter().paint(prompts, seeds)
        # Read back, so that what is judged is the file.
        model, clip = self.parts.with_lora(self._file(name, "safetensors"))
        return Painter(model, clip, self.parts.vae, self.parts.sampling).paint(prompts, seeds)

    def _settings(self, name: str) -> dict[str, Any]:
        """Return everything that a method's pictures depend on, as JSON gives it back."""
        config = (
            training_config(METHODS[name], self.plan, self.subject.seed).as_dict()
            if name in METHODS
            else None
        )
        settings = {
            "base": self.state,
            "training": config,
            "sampling": asdict(self.parts.sampling),
            "prompts": [view.caption for view in self.held_out],
            "seeds": self._seeds(),
        }
        return json.loads(json.dumps(settings))

    def _seeds(self) -> list[int]:
        return [1000 * self.subject.seed + number for number in range(len(self.held_out))]

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{self.name}-{name}.{kind}"

    def _write_grid(self, result: Mapping[str, Any]) -> None:
        """Draw photos, the base's attempts, those of every method, and the subject itself."""
        levels = result["levels"]
        rows = [self._row("No LoRA", BASE, f"likeness {_mean(levels[BASE]):.2f}")]
        for name, method in METHODS.items():
            about = result["methods"][name]
            details = (
                f"mean rank {about['mean_rank']:.1f}, {about['megabytes']:.2f} MB",
                f"likeness {_mean(about['likeness']):.2f}",
                f"{about['share']['mean']:.0%} of the way",
            )
            rows.append(self._row(method.label, name, *details))
        own = ("drawn, in other poses", f"likeness {_mean(levels['own']):.2f}")
        rows.append(Row("The subject itself", own, pixels_of(self.held_out[: self.plan.prompts])))
        notes = (
            f"{self.plan.steps} steps of batch {self.plan.batch} on these {len(self.photos)}"
            " pictures and their captions.",
            "Below, every column is one prompt for a place that they do not show,",
            "painted from the same noise in every row.",
            "Likeness is to these pictures, 1 at most, the mean of two judges;",
            "the way leads from no LoRA to the subject itself.",
        )
        title = f"sks {self.subject.object}"
        places = [view.place for view in self.held_out[: self.plan.prompts]]
        file = self.folder / f"{self.name}.png"
        subject_grid(file, title, notes, pixels_of(self.photos), rows, places)

    def _row(self, label: str, name: str, *details: str) -> Row:
        return Row(label, details, read_strip(self._file(name, "png"))[: self.plan.prompts])


def training_config(method: Method, plan: Plan, seed: int) -> Any:
    """Return the ``TrainConfig`` of a method."""
    return demo_config(
        method.mode,
        method.ranks,
        steps=plan.steps,
        learning_rate=method.learning_rate,
        batch_size=plan.batch,
        seed=seed,
        entropy_weight=method.entropy_weight,
    )


def demo_config(mode: str, ranks: Mapping[str, Any], **settings: Any) -> Any:
    """Return a ``TrainConfig`` for the base, with what all methods that are compared share."""
    config = core("config.train")
    rank = config.RankConfig.for_mode(mode, **ranks)
    return config.TrainConfig(rank=rank, **demo_settings(), **settings)


def demo_settings() -> dict[str, Any]:
    """Return what all trainings on the base share."""
    return {"schedule": "cosine", "resolution": SIZE, "probes": 0}


def prepare(parts: Parts, views: Sequence[View], config: Any) -> Any:
    """Return the ``TrainingSetup`` for pictures and their captions."""
    photos = [
        core("data.photos").Photo(pixels_of([view])[0].permute(1, 2, 0).contiguous(), view.caption)
        for view in views  # each may be of another size
    ]
    return core("comfy_host").prepare_training(parts.model, parts.clip, parts.vae, photos, config)


def train_lora(parts: Parts, views: Sequence[View], config: Any, file: Path) -> dict[str, float]:
    """Train on pictures and their captions, write the LoRA, and return what it took."""
    setup = prepare(parts, views, config)
    trainer, lora_file = core("training.trainer"), core("lora_file")
    events = list(trainer.train(setup.network, setup.task, setup.config, setup.entropy))
    components = setup.network.components()
    about = core("files.metadata").describe_run(
        config=setup.config,
        captions=[view.caption for view in views],
        base_hash=setup.base_hash,
        ranks=[int(component.importance.numel()) for component in components],
        losses=[event.loss for event in events],
        probes=[],
        title=file.stem,
    )
    ranks = setup.config.rank
    lora_file.save(file, components, about, ranks.target_megabytes, ranks.min_rank)
    last = events[-max(1, len(events) // 5) :]
    return {
        "loss": statistics.fmean(event.loss for event in last),  # of the last fifth
        "mean_rank": events[-1].mean_rank,
        "megabytes": file.stat().st_size / 1e6,
        "seconds": sum(event.seconds for event in events),
    }


def summary(subjects: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return means over subjects, and for how many of them one method beats another."""
    records = list(subjects.values())
    levels = {
        level: mean_over([dict(flattened(record["levels"][level])) for record in records])
        for level in ("own", "own after vae", BASE)
    }
    methods = {
        name: mean_over([_numbers(record["methods"][name]) for record in records])
        for name in METHODS
    }
    pairs = {
        f"{low} against {high}": comparison(
            [record["methods"][low]["likeness"] for record in records],
            [record["methods"][high]["likeness"] for record in records],
        )
        for low, high in itertools.combinations(METHODS, 2)
    }
    return {"subjects": len(records), "levels": levels, "methods": methods, "pairs": pairs}


def pixels_of(views: Sequence[View]) -> Tensor:
    """Return the pictures of views, (n, 3, h, w) in 0 to 1."""
    return to_pixels(view.image for view in views)


def _mean(judged: Mapping[str, Any]) -> float:
    return statistics.fmean(each["mean"] for each in judged.values())


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a method for one subject."""
    place = statistics.fmean(each["place"] for each in record["likeness"].values())
    return dict(flattened(record)) | {"place": place}
