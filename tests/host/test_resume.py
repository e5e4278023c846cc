"""The demo model's training, stopped, killed and resumed: captions, buckets, class images, text."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.config.train import (
    DataConfig,
    KeepConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
)
from lora2_pack.lora2_core.data.photos import Photo
from lora2_pack.lora2_core.jobs.differences import differences
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.jobs.sampling import StripFile
from lora2_pack.lora2_core.reports.strip import strip_png
from lora2_pack.nodes.screen.curves import training_history
from lora2_pack.tests.host import demo
from PIL import Image

Parts = tuple[Any, Any, Any]
NAME = "cat_00001_.safetensors"
KEEP = KeepConfig(checkpoint_steps=2, checkpoint_minutes=0)
EVERYTHING: dict[str, Any] = {
    "steps": 8,
    "precision": "fp32",
    "keep": KEEP,
    "data": DataConfig(
        buckets=True,
        flip=True,
        trigger="sks",
        caption_dropout=0.3,
        caption_shuffle=True,
        class_prompt="a photo of a cat",
        class_images=2,
    ),
    "objective": ObjectiveConfig(min_snr_gamma=5.0, noise_offset=0.05),
}
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": OptimizerConfig(ema=0.9, accumulation=2, clip_norm=1.0)},
    "adamw8bit": {"optimizer": OptimizerConfig("adamw8bit", ema=0.9)},
    "prodigy": {"optimizer": OptimizerConfig("prodigy"), "learning_rate": 1.0},
    "fp8": {"frozen_weights": "fp8", "gradient_checkpointing": True},
    "text encoders": {"text": TextConfig(learning_rate=5e-3), "gradient_checkpointing": True},
}


def photos() -> list[Photo]:
    generator = torch.Generator().manual_seed(7)
    shapes = ((96, 64), (64, 96), (80, 80), (96, 64))
    return [
        Photo(torch.rand(*shape, 3, generator=generator), f"sks cat, {word}, indoors")
        for shape, word in zip(shapes, ("red", "blue", "old", "wet"), strict=True)
    ]


def job(parts: Parts, path: Path, config: TrainConfig, **options: Any) -> TrainingJob:
    """As the node makes it."""
    if strip := options.pop("strip_path", None):
        options["strip"] = StripFile(strip, strip_png)
    given = options.pop("given", photos())
    classes = [Photo(photo.pixels.flip(0), config.data.class_prompt) for photo in photos()[:2]]
    with torch.inference_mode():
        setup = comfy_host.prepare_training(*parts, given, config, classes)
    return TrainingJob(
        setup,
        path,
        guard=comfy_host.deaf_to_cancel,
        checkpoints=path.parent / "checkpoints",
        **options,
    )


def finish(found: TrainingJob) -> TrainingJob:
    found.start()
    assert found.wait(120)
    if found.progress.error is not None:
        raise found.progress.error
    return found


def at_draw(found: TrainingJob, number: int, act: Callable[[], None]) -> TrainingJob:
    assert found.setup is not None
    task, count = found.setup.task, [0]
    draw = task.draw

    def counted(*args: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            act()
        return draw(*args)

    task.draw = counted  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_with_the_same_bytes(
    parts: Parts, model: Any, tmp_path: Path, name: str
):
    config = demo.settings(**{**EVERYTHING, **RUNS[name]})
    whole = finish(job(parts, tmp_path / "whole" / NAME, config))
    path = tmp_path / NAME
    first = job(parts, path, config)
    finish(at_draw(first, 4, first.stop))
    assert first.progress.state == "stopped" and 0 < first.progress.step < config.steps
    assert lora_file.load(path).state
    second = job(parts, tmp_path / "cat_00002_.safetensors", config)
    assert second.run_hash == first.run_hash
    finish(second)
    assert second.path == path
    assert path.read_bytes() == whole.path.read_bytes()
    assert second.result is not None and whole.result is not None
    assert training_history(second.result) == training_history(whole.result)
    roots = {key.split("_")[1] for key in lora_file.component_keys(lora_file.load(path).state)}
    assert roots == ({"unet", "te1", "te2"} if "text" in RUNS[name] else {"unet"})


def test_samples_change_nothing_and_survive_a_resume(parts: Parts, model: Any, tmp_path: Path):
    optimizer = OptimizerConfig(ema=0.9)
    plain = demo.settings(**{**EVERYTHING, "optimizer": optimizer})
    samples = SampleConfig(prompts=("a photo of sks cat", "a red dog"), every=2, steps=3)
    painted = demo.settings(**{**EVERYTHING, "optimizer": optimizer, "samples": samples})
    whole = finish(job(parts, tmp_path / "plain" / NAME, plain))
    folder = tmp_path / "painted"
    seen = finish(job(parts, folder / NAME, painted, strip_path=folder / "cat_00001_.png"))
    assert seen.path.read_bytes() == whole.path.read_bytes()
    assert [event.step for event in seen.progress.samples] == [2, 4, 6, 8]
    pictures = seen.progress.samples[-1].pictures
    assert pictures.shape == (2, 64, 64, 3) and pictures.dtype == torch.uint8
    assert not torch.equal(pictures, seen.progress.samples[0].pictures), "nothing was learnt"
    # The same, stopped in the middle.
    path = tmp_path / "stopped" / NAME
    strip = path.with_suffix(".png")
    first = job(parts, path, painted, strip_path=strip)
    finish(at_draw(first, 5, first.stop))
    assert [event.step for event in first.progress.samples] == [2, 4]
    second = job(
        parts,
        path.with_name("cat_00002_.safetensors"),
        painted,
        strip_path=path.with_name("cat_00002_.png"),
    )
    finish(second)
    assert path.read_bytes() == whole.path.read_bytes()
    assert second.strip is not None and second.strip.path == strip, "the strip follows the file"
    both = [np.asarray(Image.open(p)) for p in (strip, folder / "cat_00001_.png")]
    assert np.array_equal(*both)
    assert not list(path.parent.glob("cat_00002_*"))


def test_gradient_checkpointing_in_the_middle_learns_the_same(
    parts: Parts, model: Any, tmp_path: Path
):
    config = demo.settings(steps=4, precision="fp32")
    whole = finish(job(parts, tmp_path / "whole" / NAME, config))
    retried = job(parts, tmp_path / NAME, config)
    finish(at_draw(retried, 3, lambda: torch.empty(10**15)))  # no machine has that
    assert "trying again with gradient checkpointing" in retried.progress.message
    assert retried.progress.state == "finished"
    losses = [[event.loss for event in found.progress.events] for found in (retried, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither kill nor fork")
def test_a_killed_process_loses_nothing(parts: Parts, model: Any, tmp_path: Path):
    config = demo.settings(**{**EVERYTHING, "steps": 16, **RUNS["adamw"]})
    whole = finish(job(parts, tmp_path / "whole" / NAME, config))
    path = tmp_path / NAME
    child = os.fork()
    if not child:
        try:
            finish(job(parts, path, config))
        finally:
            os._exit(0)
    while not list((path.parent / "checkpoints").glob("*.safetensors")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before its first checkpoint"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not path.exists(), "it must have been killed in the middle"
    resumed = finish(job(parts, path, config))
    assert "Going on after step" in resumed.progress.message
    assert path.read_bytes() == whole.path.read_bytes()


def test_what_made_it_another_run_is_told(parts: Parts, model: Any, tmp_path: Path):
    """Real photos, captions, CLIP and VAE; the unfinished run is neither touched nor lost."""
    path = tmp_path / NAME
    config = demo.settings(steps=4, precision="fp32", keep=KEEP)
    first = job(parts, path, config)
    before = first._keeper.made_of
    finish(at_draw(first, 3, first.stop))
    clip = parts[1].clone()
    clip.clip_layer(-1)
    given = [_changed(photo) for photo in photos()]
    data = job((parts[0], clip, parts[2]), path, dataclasses.replace(config, seed=1), given=given)
    base = job((demo.build(3)[0], *parts[1:]), path, config)
    assert differences(before, base._keeper.made_of) == ["another base model"]
    assert differences(before, data._keeper.made_of) == [
        "other photos", "other captions", "other masks", "another CLIP or VAE", "seed 0 → 1",
    ]  # fmt: skip
    data.stop()
    finish(data)
    assert data.progress.message.startswith(
        "This starts anew: cat_00001_ lies unfinished after step 3 of 4, but this is another run "
        "(other photos, other captions, other masks, and 2 more)."
    )
    same = finish(job(parts, path, config))
    assert same.progress.message.startswith("Going on after step 3 of 4")
    assert same.path == path and same.progress.state == "finished"


def test_photos_that_come_go_or_change_places_are_no_other_captions(
    parts: Parts, model: Any, tmp_path: Path
):
    def made_of(given: list[Photo]) -> dict[str, Any]:
        return job(parts, tmp_path / NAME, demo.settings(), given=given)._keeper.made_of

    given = [dataclasses.replace(photo, caption="a cat") for photo in photos()]
    before = made_of(given)
    for fewer in (given[1:], given[:-1]):
        assert differences(before, made_of(fewer)) == ["other photos"]
    assert differences(before, made_of(given[::-1])) == ["the photos in another order"]
    other = [*given[1:], dataclasses.replace(given[0], caption="a dog", repeats=2)]
    assert differences(before, made_of(other)) == ["other captions", "other repeats of photos"]


def _changed(photo: Photo) -> Photo:
    mask = torch.ones(photo.pixels.shape[:2])
    mask[:40] = 0
    return Photo(photo.pixels.flip(0), f"{photo.caption}!", mask)
