"""Training of the judges: what is in a picture, and how much it looks like a subject.

Two small networks of different build (``lora2_core/tiny_sdxl/judge_networks.py``) learn from drawn
scenes to name object, place, colour and pattern, and from the judges' own subjects to tell one of a
kind from another whatever the place and the pose. They never see a sample of a model, nor a subject
that models are personalised to.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ....lora2_core.tiny_sdxl.judge_networks import ANSWERS, NETWORKS, Answer
from ....lora2_core.tiny_sdxl.judges import SIDE, new_network, resized
from ..pictures import to_pixels
from ..world.scenes import (
    OBJECTS,
    PATTERNS,
    PLACES,
    Colours,
    Scene,
    object_mask,
    place_thing,
    random_scene,
    render,
)
from ..world.subjects import JUDGE_SEEDS, SUBJECT_SEEDS, Subject, make_subject
from .run import Run, Schedule, read_average

UNKNOWN = -100  # an answer that is not asked for; cross_entropy passes it over


@dataclass(frozen=True)
class Recipe:
    """What a judge sees in a step, and what it is asked for."""

    scenes: int = 24  # of the base's world
    kinds: int = 2  # of object, in the part of the batch that shows subjects
    of_a_kind: int = 4  # subjects of each kind
    views: int = 3  # of each subject
    size: int = 128  # px that pictures are drawn at
    side: int = SIDE
    temperature: float = 0.1  # of the contrast between subjects
    seed: int = 0


SCHEDULES: dict[str, Schedule] = {
    "residual": Schedule(steps=2000, learning_rate=2e-3, warm_up=100, average=0.995),
    "patches": Schedule(steps=2500, learning_rate=1e-3, warm_up=150, average=0.995),
}


class Batch(NamedTuple):
    """Pictures with what is known of them."""

    images: Tensor  # (n, 3, side, side) in 0 to 1
    answers: dict[str, Tensor]  # (n,) each: numbers of words, or UNKNOWN
    subjects: Tensor  # (n,): the same number for views of the same subject
    grid: Tensor  # (n, side/8, side/8): 0 where the place is seen, else the object's number and 1


def train(
    name: str, file: Path, schedule: Schedule | None = None, recipe: Recipe | None = None
) -> None:
    """Train an architecture's judge to the end of the schedule, from where ``file`` stopped."""
    recipe = recipe or Recipe(seed=tuple(NETWORKS).index(name))
    network = new_network(name, recipe.side)

    def loss_of_step(step: int) -> Tensor:
        return loss_of(network, training_batch(step, recipe), recipe)

    Run(dict(network.named_parameters()), schedule or SCHEDULES[name], file).train(loss_of_step)


def loss_of(network: nn.Module, batch: Batch, recipe: Recipe) -> Tensor:
    """Return the error of all answers, plus that of the embedding."""
    # Twice as fast as fp32, where the processor can (measured: 7 and 13 ms a picture, 1 core).
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer: Answer = network(batch.images)
    errors = [
        F.cross_entropy(logits, batch.answers[question], ignore_index=UNKNOWN)
        for question, logits in answer.logits.items()
    ]
    errors.append(F.cross_entropy(answer.grid, batch.grid))
    errors.append(contrast(answer.embedding, batch.subjects, recipe.temperature))
    return torch.stack(errors).sum()


def contrast(embedding: Tensor, subjects: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss: views of a subject together, all else apart.

    A picture that is alone in showing what it shows only pushes others away.
    """
    alike = embedding @ embedding.T / temperature  # (n, n)
    itself = torch.eye(len(alike), dtype=torch.bool)
    share = alike.masked_fill(itself, -torch.inf).log_softmax(dim=1)
    same = (subjects[:, None] == subjects) & ~itself
    return -share[same].mean()


def training_batch(step: int, recipe: Recipe) -> Batch:
    """Return what a step sees: scenes of the base's world, and subjects with their likes."""
    rng = random.Random(f"judges {recipe.seed} {step}")
    scenes = [random_scene(rng) for _ in range(recipe.scenes)]
    subjects = list(range(len(scenes)))
    for _, thing in zip(range(recipe.kinds), rng.sample(OBJECTS, len(OBJECTS)), strict=False):
        # All in the same places, so that no place tells them apart.
        places = rng.sample(PLACES, recipe.views)
        for look in looks_of_a_kind(rng, thing, recipe.of_a_kind):
            scenes += [_view(rng, thing, look, place) for place in places]
            subjects += [subjects[-1] + 1] * recipe.views
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    drawn = torch.cat([
        resized(to_pixels(render(scene, recipe.size) for scene in scenes), recipe.side),
        resized(_masks(scenes, recipe.size // 2), recipe.side),
    ], dim=1)  # (n, 3 + 1, side, side)  # fmt: skip
    images, masks = moved(drawn, generator).split((3, 1), dim=1)
    answers = _answers_for(scenes)
    covered = F.avg_pool2d(masks, 8)[:, 0] > 0.5
    grid = torch.where(covered, 1 + answers["object"][:, None, None], 0)
    return Batch(soften(images, rng, generator), answers, torch.tensor(subjects), grid)


def _masks(scenes: Sequence[Scene], size: int) -> Tensor:
    """Return where the objects are, (n, 1, size, size) in 0 to 1."""
    masks = np.stack([object_mask(scene, size) for scene in scenes])
    return torch.from_numpy(masks)[:, None].float()


def looks_of_a_kind(rng: random.Random, thing: str, count: int) -> list[Colours]:
    """Return a subject's look and others for the same thing, most of them hard to tell from it."""
    subject, *others = (judges_subject(seed, thing) for seed in rng.sample(JUDGE_SEEDS, count))
    looks = [_look(subject)]
    for other in others:
        looks.append(_look(other if rng.random() < 0.4 else _crossed(rng, subject, other)))
    if count > 1 and rng.random() < 0.6:
        # What a model paints that has learnt the colours, and nothing else.
        looks[-1] = replace(looks[0], pattern=rng.choice(PATTERNS), decor=None)
    return looks


def judges_subject(seed: int, thing: str) -> Subject:
    """Return a subject that judges may learn from.

    Raises ValueError for those that they are to judge.
    """
    if seed not in JUDGE_SEEDS or seed in SUBJECT_SEEDS:
        raise ValueError(f"Judges must not learn from subject {seed}.")
    return make_subject(seed, thing)


def _crossed(rng: random.Random, subject: Subject, other: Subject) -> Subject:
    """Return the other with one or two traits of the subject, of the four that it has."""
    decor, own = other.decor, subject.decor
    traits = rng.sample(("colours", "pattern", "mark", "clothes"), rng.choice((1, 2)))
    if "mark" in traits:
        decor = replace(decor, mark=own.mark, letter=own.letter, badge=own.badge, figure=own.figure)
    if "clothes" in traits:
        decor = replace(decor, accessory=own.accessory, cloth=own.cloth, trim=own.trim)
    if "colours" in traits:
        other = replace(other, main=subject.main, accent=subject.accent)
    if "pattern" in traits:
        other = replace(other, pattern=subject.pattern)
    return replace(other, decor=decor)


def _look(subject: Subject) -> Colours:
    return Colours("", subject.pattern, "", subject.main, subject.accent, subject.decor)


def _view(rng: random.Random, thing: str, look: Colours, place: str) -> Scene:
    """Put a look into a place in any pose, with room for a hat."""
    return place_thing(rng, thing, place, look, room=rng.uniform(0.84, 0.98))


def _answers_for(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Return the numbers of the words for scenes; a subject's look has no words."""
    return {
        question: torch.tensor([
            words.index(word) if (word := getattr(scene, question)) in words else UNKNOWN
            for scene in scenes
        ])
        for question, words in ANSWERS.items()
    }  # fmt: skip


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures a little shifted, and nearer or farther."""
    count = len(images)
    change = torch.eye(2, 3).repeat(count, 1, 1)  # (n, 2, 3): from output to input places
    change[:, :, :2] *= 1 + 0.1 * _between(generator, (count, 1, 1))
    change[:, :, 2] = 0.06 * _between(generator, (count, 2))
    places = F.affine_grid(change, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="reflection", align_corners=False)


def soften(images: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor:
    """Return pictures as rough as those to be judged: blurred, noisy, a little off in colour.

    Colours may drift less than lies between two of their names.
    """
    count = len(images)
    blurred = torch.cat([_blurred(image[None], rng) for image in images])
    light = 1 + 0.06 * _between(generator, (count, 1, 1, 1))
    tint = 1 + 0.04 * torch.randn(count, 3, 1, 1, generator=generator)
    grain = 0.03 * torch.rand(count, 1, 1, 1, generator=generator).square()
    noise = torch.randn(images.shape, generator=generator) * grain
    return (blurred**light * tint + noise).clamp(0, 1)


def _blurred(image: Tensor, rng: random.Random) -> Tensor:
    """Return (1, 3, h, w), two times of three as it is after being scaled down and up again."""
    side = image.shape[-1]
    small = round(side * rng.uniform(0.4, 1.3))
    if small >= side:
        return image
    image = F.interpolate(image, size=(small, small), mode="bilinear", antialias=True)
    mode = rng.choice(("bilinear", "bicubic"))
    return F.interpolate(image, size=(side, side), mode=mode).clamp(0, 1)


def _between(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Return numbers from -1 to 1."""
    return 2 * torch.rand(shape, generator=generator) - 1


def architecture_of(weights: Mapping[str, Tensor]) -> str:
    """Return the architecture that has weights of these names; raises ValueError if none has."""
    for name in NETWORKS:
        if new_network(name).state_dict().keys() == weights.keys():
            return name
    raise ValueError("These are not the weights of a judge.")


def export(run_file: Path, out_file: Path) -> None:
    """Write a run's averaged weights alone, in fp16, whole or not at all."""
    weights = read_average(run_file)
    about = {"architecture": architecture_of(weights), "side": str(SIDE)}
    out_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_file.with_suffix(".tmp")
    save_file({name: value.half() for name, value in weights.items()}, temporary, about)
    os.replace(temporary, out_file)
