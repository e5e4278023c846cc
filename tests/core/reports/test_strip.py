"""Pictures while it trains: nothing learnt differently, a strip of bounded size, no accident."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.lora2_core.config.train import SampleConfig, TrainConfig
from lora2_pack.lora2_core.jobs.sampling import THUMBNAIL, SampleEvent, SampleStrip, thinned
from lora2_pack.lora2_core.reports.strip import _GAP, _PROMPT, _TOP, MARGIN, strip_picture
from lora2_pack.tests.core import toy_job
from lora2_pack.tests.core.toy_job import at_draw, config, finish, prompts
from PIL import Image

NAME = "cat_00001_.safetensors"


def event(step: int, side: int = 64, texts: tuple[str, ...] = ("a cat", "a dog")) -> SampleEvent:
    level = torch.full((len(texts), side, side, 3), step % 256, dtype=torch.uint8)
    return SampleEvent(step, texts, level)


# --- in a run -------------------------------------------------------------------------------------


def test_samples_come_every_so_many_steps_and_at_the_end(tmp_path: Path):
    strip = tmp_path / "cat_00001_.png"
    job = finish(
        toy_job.job(
            tmp_path / NAME, config(steps=20, samples=prompts("a", "b", every=8)), strip_path=strip
        )
    )
    assert [found.step for found in job.progress.samples] == [8, 16, 20]
    assert all(found.pictures.shape == (2, 64, 64, 3) for found in job.progress.samples)
    assert all(found.pictures.dtype == torch.uint8 for found in job.progress.samples)
    picture = Image.open(strip)
    assert picture.format == "PNG" and picture.mode == "RGB"


def test_the_weights_that_are_painted_are_those_that_are_saved(tmp_path: Path):
    """The averages: with them the last picture shows what a network of the saved file paints."""
    wanted = config(steps=20, samples=prompts("a", every=20))
    job = toy_job.job(tmp_path / NAME, wanted)
    network, painter = toy_job.setup_of(job).network, toy_job.painter_of(job)
    ups: list[torch.Tensor] = []
    importances: list[torch.Tensor] = []

    def look() -> None:
        ups.append(network.layers[0].lora_up.detach().clone())
        importances.append(network.layers[0].importance.detach().clone())

    painter.before = look
    finish(job)
    saved = job.result
    assert saved is not None
    assert not torch.equal(ups[0], network.layers[0].lora_up), "the averages were not swapped in"
    down = network.layers[0].lora_down
    assert importances[0].shape == (down.shape[0],)
    key = "lora_unet_blocks_0_attn1_to_q"
    stored = saved.file.state[f"{key}.lora_up.weight"].float()
    folded = ups[0] * importances[0].sqrt()
    cosine = torch.nn.functional.cosine_similarity(stored, folded, dim=0)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-3, rtol=0)


def test_a_painter_that_fails_costs_only_the_samples(tmp_path: Path):
    def fail() -> None:
        raise RuntimeError("no paint left")

    wanted = config(samples=prompts("a", every=8))
    job = toy_job.job(tmp_path / NAME, wanted, strip_path=tmp_path / "strip.png")
    painter = toy_job.painter_of(job)
    painter.before = fail
    finish(job)
    assert job.progress.message == "Samples are off for the rest of this run: no paint left"
    assert job.progress.samples == [] and not (tmp_path / "strip.png").exists()
    whole = finish(toy_job.job(tmp_path / "whole" / NAME, config()))
    assert job.path.read_bytes() == whole.path.read_bytes()


def test_a_strip_that_cannot_be_written_costs_only_the_samples(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    job = toy_job.job(
        tmp_path / NAME,
        config(samples=prompts("a", every=8)),
        strip_path=tmp_path / "file" / "strip.png",
    )
    finish(job)
    assert "Samples are off" in job.progress.message and "strip.png" in job.progress.message
    assert job.progress.state == "finished"


def test_a_stop_is_not_kept_waiting_by_the_painter(tmp_path: Path):
    job = toy_job.job(tmp_path / NAME, config(samples=prompts("a", "b", "c", every=8)))
    painter = toy_job.painter_of(job)
    painter.before = job.stop  # in the middle of the first painting
    finish(job)
    assert painter.painted == 1
    assert job.progress.step == 8 and job.progress.state == "stopped"
    assert job.progress.samples == []


def test_a_strip_goes_on_after_a_resume_also_without_its_file(tmp_path: Path):
    wanted = config(samples=prompts("a cat", every=5))
    strip = tmp_path / "whole" / "cat_00001_.png"
    finish(toy_job.job(tmp_path / "whole" / NAME, wanted, strip_path=strip))
    path = tmp_path / NAME
    first = toy_job.job(path, wanted, strip_path=path.with_suffix(".png"))
    finish(at_draw(first, 2 * 12, first.stop))
    path.with_suffix(".png").unlink()
    second = toy_job.job(path, wanted, strip_path=path.with_suffix(".png"))
    finish(second)
    assert [found.step for found in second.progress.samples] == [5, 10, 15, 20, 24]
    pair = [np.asarray(Image.open(p)) for p in (strip, path.with_suffix(".png"))]
    assert np.array_equal(*pair)


def test_other_prompts_after_a_resume_begin_a_new_strip(tmp_path: Path):
    path = tmp_path / NAME
    first = toy_job.job(path, config(samples=prompts("a cat", every=5)))
    finish(at_draw(first, 2 * 12, first.stop))
    second = finish(toy_job.job(path, config(samples=prompts("a dog", every=5))))
    assert [found.step for found in second.progress.samples] == [15, 20, 24]


# --- what is kept ---------------------------------------------------------------------------------


@given(
    steps=st.lists(st.integers(1, 10**6), min_size=1, max_size=60, unique=True).map(sorted),
    columns=st.integers(2, 12),
)
def test_a_thinned_strip_keeps_its_ends_and_its_order(steps: list[int], columns: int):
    kept = [found.step for found in thinned([event(s, 1) for s in steps], columns)]
    assert len(kept) == min(len(steps), columns)
    assert (kept[0], kept[-1]) == (steps[0], steps[-1]) or len(steps) == 1
    assert kept == sorted(kept) and set(kept) <= set(steps)


def test_a_long_run_keeps_few_small_pictures_evenly_spread(tmp_path: Path):
    class Noise:
        def paint(self, prompts, seed, size, steps, guidance) -> torch.Tensor:
            return torch.rand(len(prompts), *size, 3)

    wanted = TrainConfig(steps=1000, resolution=512, samples=SampleConfig(("a",), every=10))
    strip = SampleStrip(Noise(), wanted, None, "title")
    for step in range(10, 1001, 10):
        assert strip.due(step)
        strip.paint(step, lambda: False)
        assert not strip.due(step), "painted twice"
    steps = [found.step for found in strip.events]
    assert len(steps) == 12 and steps[0] == 10 and steps[-1] == 1000
    gaps = np.diff(steps)
    assert gaps.max() <= 4 * gaps.min() + 40
    assert strip.events[-1].pictures.shape == (1, 512, 512, 3), "the newest in full"
    sides = {found.pictures.shape[1] for found in strip.events[:-1]}
    assert sides == {THUMBNAIL}


# --- the picture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3, 12])
@pytest.mark.parametrize("side", [64, 224, 512])
def test_every_picture_has_its_place(columns: int, side: int):
    events = [event(20 * n + 15, side) for n in range(columns)]
    image = np.asarray(strip_picture(events, "title", THUMBNAIL))
    cell, gap, margin = THUMBNAIL, _GAP, MARGIN
    for column, found in enumerate(events):
        for row in range(2):
            left = margin + column * (cell + gap)
            top = _TOP + row * (cell + _PROMPT + gap)
            part = image[top + _PROMPT :, left:][:cell, :cell]
            assert (part == found.step % 256).all()


@pytest.mark.parametrize("text", ["", "x" * 5000, "猫 and 🐈\nanother line"])
def test_any_words_can_stand_above_a_row(text: str):
    usual = strip_picture([event(5, texts=("a",))], "t", THUMBNAIL).size
    image = strip_picture([event(5, texts=(text,))], text, THUMBNAIL)
    assert image.size == usual


def test_pictures_that_are_not_square_keep_their_shape():
    tall = dataclasses.replace(
        event(5), pictures=torch.full((2, 128, 64, 3), 200, dtype=torch.uint8)
    )
    image = np.asarray(strip_picture([tall], "t", THUMBNAIL))
    assert (image == 200).all(-1).sum() == pytest.approx(2 * 224 * 112, rel=0.01)
