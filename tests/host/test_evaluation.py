"""The tiny base's figures: their arithmetic, that they repeat, and what is drawn of them."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("skia", reason="scenes need skia-python", exc_type=ImportError)

from lora2_pack.lora2_core.tiny_sdxl import judges
from lora2_pack.lora2_core.tiny_sdxl.judge_networks import ANSWERS, NETWORKS
from lora2_pack.lora2_core.tiny_sdxl.judges import Reading
from lora2_pack.tools.tiny_sdxl import pictures
from lora2_pack.tools.tiny_sdxl.evaluation import (
    answers,
    autoencoder,
    figures,
    grids,
    painting,
    prompts,
    report,
    speed,
)
from lora2_pack.tools.tiny_sdxl.evaluation import (
    parts as parts_of_base,
)
from lora2_pack.tools.tiny_sdxl.evaluation.painting import Sampling
from lora2_pack.tools.tiny_sdxl.evaluation.parts import Parts
from lora2_pack.tools.tiny_sdxl.world.scenes import OBJECTS, PLACES, random_scene
from lora2_pack.tools.tiny_sdxl.world.subjects import SUBJECT_SEEDS, subject_views

SIDE = 64  # px


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at 64 px, with two views of a subject and one other of its kind."""

    def two_views(subject: Any, kind: Any = "train", size: int = SIDE) -> Any:
        return subject_views(subject, kind, SIDE)[:2]

    for module in (answers, painting, speed):
        monkeypatch.setattr(module, "SIZE", SIDE)
    for module in (autoencoder, speed):
        monkeypatch.setattr(module, "subject_views", two_views)
    monkeypatch.setattr(autoencoder, "OTHERS", 1)


@pytest.fixture(scope="module")
def tested(parts: Any) -> Parts:
    """An untrained base, painting in two steps, and judges that know nothing."""
    known = {name: judges.Judge(judges.new_network(name), name) for name in NETWORKS}
    return Parts(*parts, known, Sampling(steps=2))


def picture(count: int = 3, side: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


# --- arithmetic -------------------------------------------------------------------------------


def test_the_way_leads_from_the_base_to_the_subject() -> None:
    assert figures.share_of_the_way(0.5, 0.2, 0.8) == pytest.approx(0.5)
    assert figures.share_of_the_way(0.1, 0.2, 0.8) < 0
    assert math.isnan(figures.share_of_the_way(0.5, 0.8, 0.8))


def test_what_the_autoencoder_leaves_is_scaled_between_others_and_the_subject() -> None:
    names = (
        *("before", "after", "others before", "others after"),
        *("nearest other before", "nearest other after"),
    )
    first = dict(zip(names, (0.8, 0.6, 0.3, 0.2, 0.4, 0.3), strict=True))
    second = dict(zip(names, (0.8, 0.8, 0.1, 0.1, 0.2, 0.2), strict=True))
    found = autoencoder.retained({41: first, 23: second})
    assert found["subjects"]["41"]["scaled after"] == pytest.approx(0.6)
    assert found["subjects"]["41"]["ratio"] == found["least ratio"] == pytest.approx(0.75)
    assert found["ratio"] == pytest.approx(0.7 / 0.8)
    assert found["scaled after"] == pytest.approx((0.7 - 0.2) / (0.8 - 0.2))
    assert found["scaled others after"] == pytest.approx((0.15 - 0.2) / (0.8 - 0.2))


def test_psnr_is_in_decibels() -> None:
    images = picture(2) / 2
    again = images + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(autoencoder.psnr(images, again), torch.tensor([20.0, 40.0]))


def test_all_numbers_are_told_but_those_of_single_prompts() -> None:
    values = {"a": {"b": 1, "each": [1, 2]}, "c": 0.5}
    assert list(figures.flattened(values)) == [("a / b", 1), ("c", 0.5)]


# --- the parts --------------------------------------------------------------------------------


def test_the_autoencoder_s_figures_are_complete(tested: Parts) -> None:
    found = autoencoder.vae_figures(tested, scenes=2, readings=3, subjects=SUBJECT_SEEDS[:2])
    for of in ("scenes", "subjects"):
        assert 15 < found["psnr"][of]["least"] <= found["psnr"][of]["mean"] < 50
    for kind in ("drawn", "reconstructed"):
        assert set(found["answers"][kind]) == set(NETWORKS)
        for row in found["answers"][kind].values():
            assert set(row) == set(ANSWERS)
            assert all(0 <= share <= 1 for share in row.values())
    for name in NETWORKS:
        assert list(found["likeness"][name]["subjects"]) == [str(s) for s in SUBJECT_SEEDS[:2]]
        assert found["likeness"][name]["before"] <= 1.0001
    json.dumps(found)


def test_a_tally_counts_right_answers() -> None:
    class Knows:
        def read(self, images: torch.Tensor) -> Reading:
            return Reading(
                [scene.object for scene in scenes],
                [scene.place for scene in scenes],
                ["?"] * len(images),
                [scenes[0].pattern, "?"],
            )

    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(2)]
    tally = answers.Tally({"knows": Knows()})  # type: ignore[dict-item]
    tally.add(scenes, picture(2))
    assert tally.shares() == {"knows": {"object": 1, "place": 1, "colour": 0, "pattern": 0.5}}


def test_the_base_s_figures_and_samples(tested: Parts, tmp_path: Path) -> None:
    found = prompts.base_figures(tested, tmp_path / "samples.png", prompts=3, samples=2)
    assert found["pairs seen"]["prompts"] == 3
    assert found["pairs held out"]["prompts"] == 1
    for kind in ("painted", "drawn", "reconstructed"):
        assert set(found["pairs seen"][kind]) == set(NETWORKS)
    again = prompts.prompted_figures(tested, 1, held_out=True)
    assert again == found["pairs held out"]
    assert Image.open(tmp_path / "samples.png").width > 1600


def test_samples_show_all_objects_in_all_places() -> None:
    scenes = prompts.sample_scenes()
    assert Counter(scene.object for scene in scenes) == dict.fromkeys(OBJECTS, 4)
    assert Counter(scene.place for scene in scenes) == dict.fromkeys(PLACES, 3)
    assert len({(scene.object, scene.place) for scene in scenes}) == 48
    assert scenes == prompts.sample_scenes()


def test_speed_is_measured(tested: Parts) -> None:
    found = speed.speed_figures(tested, samples=1, steps=1, warm_up=1)
    assert found["seconds a sample"] > 0
    assert set(found["seconds a LoRA step"]) == {"fixed-16", "balanced"}
    assert all(seconds > 0 for seconds in found["seconds a LoRA step"].values())


# --- the whole --------------------------------------------------------------------------------


def test_parts_done_earlier_stay_in_the_file(
    tested: Parts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(report, "vae_figures", lambda parts: {"psnr": {"mean": 24.5}})
    monkeypatch.setattr(report, "speed_figures", lambda parts: {"threads": 2})
    report.run_parts(tested, tmp_path, ["vae"], 1)
    found = report.run_parts(tested, tmp_path, ["speed"], 1)
    weights = {"weights": tested.fingerprint()}
    assert found == {"vae": {**weights, "psnr": {"mean": 24.5}}, "speed": {**weights, "threads": 2}}
    assert json.loads((tmp_path / "evaluation.json").read_text("utf-8")) == found
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["vae", "/", "psnr", "/", "mean", "24.5"]


@pytest.mark.parametrize(
    ("wanted", "count", "says"), [(["vea"], 1, "vea"), (["vae"], 0, "--prompts")]
)
def test_a_bad_option_is_refused(wanted: list[str], count: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=says):
        report.evaluate(tmp_path / "out", wanted, count)
    assert not (tmp_path / "out").exists()


def test_judges_are_read_and_missed_by_name(tmp_path: Path) -> None:
    for name in NETWORKS:
        weights = judges.new_network(name).state_dict()
        about = {"architecture": name, "side": str(judges.SIDE)}
        save_file(
            {n: v.half() for n, v in weights.items()}, tmp_path / f"{name}.safetensors", about
        )
    assert list(parts_of_base.load_judges(tmp_path)) == list(NETWORKS)
    (tmp_path / "patches.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"patches.*restore"):
        parts_of_base.load_judges(tmp_path)


# --- pictures ---------------------------------------------------------------------------------


def test_strips_give_back_what_they_hold(tmp_path: Path) -> None:
    images = picture(3)
    pictures.write_strip(tmp_path / "strip.png", images)
    again = pictures.read_strip(tmp_path / "strip.png")
    torch.testing.assert_close(again, images, rtol=0, atol=0.51 / 255)


def test_grids_have_room_for_every_tile_and_line(tmp_path: Path) -> None:
    long = "a word after another " * 6

    def size(count: int, caption: str, marked: bool) -> tuple[int, int]:
        file = tmp_path / "grid.png"
        grids.sample_grid(file, picture(count), [caption] * count, [marked] * count, "why", 4, 64)
        return Image.open(file).size

    assert size(4, "a", False)[0] == 2 * grids.MARGIN + 4 * 64 + 3 * grids.GAP
    assert size(5, "a", False)[0] == size(4, "a", False)[0]
    assert size(5, "a", False)[1] > size(4, "a", False)[1]
    assert size(4, long, False)[1] > size(4, "a", False)[1]
    assert size(4, "a", True)[1] > size(4, "a", False)[1]
