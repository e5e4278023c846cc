"""Figures of the trained base: what its autoencoder keeps, what it paints, what it can be taught.

Two judges of different build read the pictures; they have seen neither a sample of a model nor a
subject that it is personalised to.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .figures import flattened, share_of_the_way, write_json
from .grids import sample_grid
from .host import core
from .judges import ANSWERS, NETWORKS, WEIGHTS, Judge
from .latents import SIZE, to_pixels
from .personalising import (
    METHODS,
    Method,
    Parts,
    Plan,
    fingerprint,
    personal_figures,
    pixels_of,
    prepare,
    training_config,
)
from .scenes import OBJECTS, PLACES, Scene, caption, is_held_out, random_scene, render
from .subjects import SUBJECT_SEEDS, make_subject, subject_views

T = TypeVar("T")

PARTS = ("vae", "base", "personal", "speed")
AT_ONCE = 48  # pictures in memory
OTHERS = 5  # of a subject's kind
SAMPLES = 48  # pictures in the grid
LEGEND = "The base has never seen this object in this place."


def evaluate(
    out: Path, wanted: Sequence[str] = PARTS, prompts: int = 500, subjects: int = 8
) -> dict[str, Any]:
    """Return the figures of the wanted parts; print them and write them, and grids, to ``out``.

    Figures of other parts that ``out/evaluation.json`` holds stay there. Raises SystemExit for a
    part or a number that makes no sense, or when the judges' weights are missing.
    """
    _check(wanted, prompts, subjects)
    out.mkdir(parents=True, exist_ok=True)
    parts = load_parts(judged=any(name != "speed" for name in wanted))
    return run_parts(parts, out, wanted, prompts, subjects)


def run_parts(
    parts: Parts, out: Path, wanted: Sequence[str], prompts: int, subjects: int
) -> dict[str, Any]:
    """Do what :func:`evaluate` does with a base that is loaded already."""
    work = {
        "vae": lambda: vae_figures(parts),
        "base": lambda: base_figures(parts, out / "samples.png", prompts),
        "personal": lambda: personal_figures(parts, out / "personal", SUBJECT_SEEDS[:subjects]),
        "speed": lambda: speed_figures(parts),
    }
    file = out / "evaluation.json"
    figures = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    weights = fingerprint(parts)  # parts may be of different days
    for name in wanted:
        figures[name] = {"weights": weights} | work[name]()
        write_json(file, figures)
        for path, value in flattened(figures[name], name):
            print(f"{path:<72} {value:.5g}", flush=True)
    return figures


def load_parts(judged: bool = True) -> Parts:
    """Return the trained base as the demo's node gives it, with the judges if they are needed."""
    judges = load_judges() if judged else {}
    comfy_host, demo_model = core("comfy_host"), core("tiny_sdxl.model")
    try:
        model, clip = comfy_host.build_sdxl(
            demo_model.UNET_CONFIG, demo_model.text_configs(), demo_model.fill_trained
        )
        vae = comfy_host.build_autoencoder(demo_model.autoencoder_weights())
    except demo_model.DemoModelError as error:
        raise SystemExit(str(error)) from error
    return Parts(model, clip, vae, judges)


def load_judges(folder: Path = WEIGHTS) -> dict[str, Judge]:
    """Return all judges by name. Raises SystemExit when the weights of one are missing."""
    demo_judges = core("tiny_sdxl.judges")
    try:
        return {name: demo_judges.load_judges(name, folder) for name in NETWORKS}
    except core("reports.vision").JudgeError as error:
        raise SystemExit(str(error)) from error


# --- the autoencoder --------------------------------------------------------------------------


def vae_figures(
    parts: Parts, scenes: int = 48, readings: int = 480, subjects: Sequence[int] = SUBJECT_SEEDS
) -> dict[str, Any]:
    """Return what a trip through the autoencoder costs: PSNR in dB, answers, and likeness."""
    rng = random.Random("psnr")
    drawn = pictures([random_scene(rng) for _ in range(scenes)])
    views = [pixels_of(subject_views(make_subject(seed), "held_out")) for seed in subjects]
    rng = random.Random("readings")
    return {
        "psnr": {
            "scenes": mean_and_least(psnr(drawn, parts.through_vae(drawn))),
            "subjects": mean_and_least(
                torch.cat([psnr(images, parts.through_vae(images)) for images in views])
            ),
        },
        "answers": answers(parts, [random_scene(rng) for _ in range(readings)]),
        "likeness": likeness_figures(parts, subjects),
    }


def psnr(images: Tensor, again: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each of two stacks of pictures in 0 to 1, dB."""
    return -10 * (images - again).square().mean(dim=(1, 2, 3)).log10()  # (n,)


def mean_and_least(values: Tensor) -> dict[str, float]:
    """Return the mean and the least of some values."""
    return {"mean": values.mean().item(), "least": values.min().item()}


def answers(parts: Parts, scenes: Sequence[Scene]) -> dict[str, dict[str, dict[str, float]]]:
    """Return each judge's share of right answers to each question, before and after the VAE."""
    before, after = Tally(parts.judges), Tally(parts.judges)
    for some in portions(scenes):
        images = pictures(some)
        before.add(some, images)
        after.add(some, parts.through_vae(images))
    return {"drawn": before.shares(), "reconstructed": after.shares()}


class Tally:
    """Right answers of judges, counted over pictures that come in portions."""

    def __init__(self, judges: Mapping[str, Judge]):
        self.judges = judges
        self.count = 0
        self.right = {name: dict.fromkeys(ANSWERS, 0) for name in judges}

    def add(self, scenes: Sequence[Scene], images: Tensor) -> None:
        """Let all judges read pictures (n, 3, h, w) that should show these scenes."""
        self.count += len(scenes)
        for name, judge in self.judges.items():
            reading = judge.read(images)
            for question in ANSWERS:
                for scene, word in zip(scenes, getattr(reading, question), strict=True):
                    self.right[name][question] += getattr(scene, question) == word

    def shares(self) -> dict[str, dict[str, float]]:
        """Return the share of right answers, by judge and question."""
        return {
            name: {question: number / self.count for question, number in right.items()}
            for name, right in self.right.items()
        }


def likeness_figures(
    parts: Parts, subjects: Sequence[int] = SUBJECT_SEEDS
) -> dict[str, dict[str, Any]]:
    """Return for each judge how much of the likeness to subjects survives the autoencoder.

    What is compared are held-out views, of the subject and of others of its kind in the same
    places, always with the subject's training views as they were drawn.
    """
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in parts.judges}
    for seed in subjects:
        thing = make_subject(seed).object
        family = [make_subject(one, thing) for one in (seed, *neighbours(seed))]
        photos = pixels_of(subject_views(family[0], "train"))
        drawn = [pixels_of(subject_views(one, "held_out")) for one in family]
        again = [parts.through_vae(images) for images in drawn]
        for name, judge in parts.judges.items():
            before, after = (
                [judge.likeness(images, photos).mean().item() for images in kind]
                for kind in (drawn, again)
            )
            found[name][seed] = _levels(before, after)
    return {name: retained(levels) for name, levels in found.items()}


def neighbours(seed: int) -> list[int]:
    """Return the seeds whose looks, on its kind of object, a subject is compared with."""
    first = SUBJECT_SEEDS.index(seed) + 1
    return [SUBJECT_SEEDS[(first + step) % len(SUBJECT_SEEDS)] for step in range(OTHERS)]


def _levels(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Name the likeness of the subject, which comes first, and of the others."""
    (own, *others), (own_after, *others_after) = before, after
    return {
        "before": own,
        "after": own_after,
        "others before": statistics.fmean(others),
        "others after": statistics.fmean(others_after),
        "nearest other before": max(others),
        "nearest other after": max(others_after),
    }


def retained(levels: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Return means over subjects, how much of them is left after the VAE, and each subject's.

    ``ratio`` is that of the plain likeness. On the scale of ``scaled after``, 0 is the likeness of
    others of the kind and 1 that of the subject, both as drawn.
    """
    subjects = {str(seed): {**row, **_left(row)} for seed, row in levels.items()}
    first = next(iter(levels.values()))
    means = {name: statistics.fmean(row[name] for row in levels.values()) for name in first}
    least = {
        f"least {name}": min(row[name] for row in subjects.values())
        for name in ("ratio", "scaled after")
    }
    return {**means, **_left(means), **least, "subjects": subjects}


def _left(row: Mapping[str, float]) -> dict[str, float]:
    start, end = row["others before"], row["before"]
    return {
        "ratio": row["after"] / end,
        "scaled after": share_of_the_way(row["after"], start, end),
        "scaled others after": share_of_the_way(row["others after"], start, end),
    }


# --- the base ---------------------------------------------------------------------------------


def base_figures(
    parts: Parts, grid: Path, prompts: int = 500, samples: int = SAMPLES
) -> dict[str, Any]:
    """Return judges' answers to what the base paints; draw a grid of samples.

    Half as many prompts are of pairs of object and place that the base has never seen.
    """
    paint_samples(parts, grid, samples)
    return {
        "pairs seen": prompted_figures(parts, prompts, held_out=False),
        "pairs held out": prompted_figures(parts, max(1, prompts // 2), held_out=True),
    }


def prompted_figures(parts: Parts, count: int, held_out: bool) -> dict[str, Any]:
    """Return judges' answers to what the base paints, and to drawings of the very same scenes."""
    rng = random.Random(f"prompts {held_out}")
    scenes = [random_scene(rng, held_out=held_out) for _ in range(count)]
    prompts = [caption(scene, rng) for scene in scenes]
    painted, painter = Tally(parts.judges), parts.painter()
    for some in portions(range(count)):
        images = painter.paint([prompts[number] for number in some], some)
        painted.add([scenes[number] for number in some], images)
        kind = "held-out" if held_out else "seen"
        print(f"base: {painted.count}/{count} prompts of {kind} pairs", flush=True)
    return {"prompts": count, "painted": painted.shares(), **answers(parts, scenes)}


def paint_samples(parts: Parts, path: Path, count: int = SAMPLES) -> Path:
    """Write a grid of samples of all objects and places, with their prompts."""
    scenes = sample_scenes()[:count]
    prompts = [caption(scene, random.Random(number)) for number, scene in enumerate(scenes)]
    images = parts.painter().paint(prompts, range(len(prompts)))
    marked = [is_held_out(scene.object, scene.place) for scene in scenes]
    return sample_grid(path, images, prompts, marked, LEGEND)


def sample_scenes() -> list[Scene]:
    """Return the scenes of the grid: every object four times, every place three times."""
    columns = 8
    scenes = []
    for number in range(SAMPLES):
        row, column = divmod(number, columns)
        thing = OBJECTS[number % len(OBJECTS)]
        place = PLACES[(2 * column + 5 * row) % len(PLACES)]
        scenes.append(random_scene(random.Random(f"sample {number}"), (thing,), (place,)))
    return scenes


# --- speed ------------------------------------------------------------------------------------


def speed_figures(
    parts: Parts, samples: int = 5, steps: int = 15, warm_up: int = 3
) -> dict[str, Any]:
    """Return the seconds of a sample with its decoding, and of a LoRA step, medians of several."""
    plain = Method(
        "LoRA, rank 16", "fixed", METHODS["fixed-8"].learning_rate, 0.0, {"target_rank": 16}
    )
    methods = {"fixed-16": plain, "balanced": METHODS["balanced"]}
    return {
        "threads": torch.get_num_threads(),
        "sampling steps": parts.sampling.steps,
        "seconds a sample": statistics.median(_sample_seconds(parts, samples)),
        "seconds a LoRA step": {
            name: statistics.median(_step_seconds(parts, method, steps, warm_up))
            for name, method in methods.items()
        },
    }


def _sample_seconds(parts: Parts, count: int) -> list[float]:
    """Return the seconds of each of some samples, after one that does not count."""
    painter, seconds = parts.painter(), []
    for seed in range(count + 1):
        started = time.perf_counter()
        painter.paint(["a red striped mug on a sandy beach at sunset"], [seed])
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _step_seconds(parts: Parts, method: Method, count: int, warm_up: int) -> list[float]:
    """Return the seconds of each of some steps at the start of a training, after a warm-up."""
    subject = make_subject(SUBJECT_SEEDS[0])
    setup = prepare(
        parts, subject_views(subject, "train", SIZE), training_config(method, Plan(), subject.seed)
    )
    events = core("training.trainer").train(setup.network, setup.task, setup.config, setup.entropy)
    return [event.seconds for event in itertools.islice(events, warm_up, warm_up + count)]


# --- helpers ----------------------------------------------------------------------------------


def pictures(scenes: Iterable[Scene]) -> Tensor:
    """Return scenes as they are drawn, (n, 3, 192, 192) in 0 to 1."""
    return to_pixels(render(scene, SIZE) for scene in scenes)


def portions(items: Sequence[T]) -> Iterable[Sequence[T]]:
    """Return a sequence in parts that fit into memory as pictures."""
    return (items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE))


def _check(wanted: Sequence[str], prompts: int, subjects: int) -> None:
    if unknown := sorted(set(wanted) - set(PARTS)):
        raise SystemExit(f"--parts knows no {unknown[0]!r}; choose from {', '.join(PARTS)}.")
    if prompts < 1:
        raise SystemExit(f"--prompts is {prompts}; it takes at least 1, and 500 by default.")
    if not 1 <= subjects <= len(SUBJECT_SEEDS):
        raise SystemExit(f"--subjects is {subjects}; there are 1 to {len(SUBJECT_SEEDS)} of them.")
