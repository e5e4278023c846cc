"""The demo's own judgement: what it collects, and when it says that it failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_tools import demo, demo_picture
from PIL import Image
from safetensors.torch import save_file

NUMBERS = ("", "-2", "-3", "-4")
SAVED = ("lora2_ranks", *(name + n for name in ("lora2_base", "lora2_sample") for n in NUMBERS))
GOOD = {"loss_first": 1.3, "loss_last": 1.0, "rank_min": 4, "rank_max": 34}


def write_run(output: Path, pictures: tuple[str, ...] = SAVED) -> None:
    """What ComfyUI's output folder holds after a run."""
    (output / "loras" / "lora2").mkdir(parents=True)
    entries = {"a": {"nu": 0.3, "rank": 4}, "b": {"nu": 0.1, "rank": 20}}
    metadata = {
        "lora2.components": json.dumps(entries),
        "lora2.loss": json.dumps({"training": [1.4, 1.1], "fixed_noise": [1.3, 1.0]}),
        "lora2.steps": "100",
    }
    file = output / "loras" / "lora2" / "robot_00001_.safetensors"
    save_file({"x": torch.zeros(3)}, file, metadata)
    for number, name in enumerate(pictures):
        picture = Image.new("RGB", (192, 192), shade(number))
        picture.save(output / f"{name}_00001_.png")


def shade(number: int) -> tuple[int, int, int]:
    """A colour of its own for each picture of a run."""
    return 20 * number, 255 - 20 * number, 128


def painted(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The samplers whose pictures a workflow saves, by the file name prefix."""
    found = {}
    for node in workflow.values():
        if node["class_type"] == "SaveImage" and node["inputs"]["images"][0] != "10":
            decode = workflow[node["inputs"]["images"][0]]
            found[node["inputs"]["filename_prefix"]] = workflow[decode["inputs"]["samples"][0]]
    return found


def test_it_paints_four_places_with_the_lora_and_without():
    workflow, train = demo.load_workflow(7)
    assert workflow[train]["inputs"]["steps"] == 7
    longer = demo.with_places(workflow, train)
    assert {name: longer[name] for name in workflow} == workflow
    samplers = painted(longer)
    assert set(samplers) == set(SAVED) - {"lora2_ranks"}
    for number, place in zip(NUMBERS, demo.PLACES.values(), strict=True):
        base, sample = samplers["lora2_base" + number], samplers["lora2_sample" + number]
        text = longer[base["inputs"]["positive"][0]]["inputs"]["text"]
        assert text == f"a sks robot {place}"
        assert sample["inputs"] == base["inputs"] | {"model": [train, 0]}
        first = samplers["lora2_base"]["inputs"]
        assert (
            first | {name: base["inputs"][name] for name in ("positive", "seed")} == base["inputs"]
        )
    assert len({node["inputs"]["seed"] for node in samplers.values()}) == len(demo.PLACES)


def test_it_learns_what_its_photos_show_and_paints_what_they_do_not():
    workflow, train = demo.load_workflow()
    photos = next(n for n in workflow.values() if n["class_type"] == "LoRA2ImageFolder")
    assert photos["inputs"]["folder"] == f"example: {demo.PHOTOS.name}"
    captions = [file.read_text().strip() for file in demo.PHOTOS.glob("*.txt")]
    assert len(captions) == len(list(demo.PHOTOS.glob("*.jpg"))) == 6
    subject = workflow[train]["inputs"]["instance_prompt"]
    assert all(caption.startswith(f"{subject} ") for caption in captions)
    assert not {f"{subject} {place}" for place in demo.PLACES.values()} & set(captions)


def test_the_picture_holds_every_picture_in_its_place(tmp_path: Path):
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        Image.new("RGB", (192, 192), shade(number)).save(file)
    rows = (
        demo_picture.Row("Three", "of LoRA²", files[:3]),
        demo_picture.Row("Two", "named", files[3:], ("one", "another")),
    )
    demo_picture.write(tmp_path / "all.png", rows)
    picture = Image.open(tmp_path / "all.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(picture.width * picture.height) or ()}
    assert {shade(number) for number in range(5)} <= colours
    assert picture.width == demo_picture.WIDTH
    margin = {picture.getpixel((demo_picture.MARGIN // 2, y)) for y in range(picture.height)}
    assert margin == {demo_picture.BACKGROUND}
    for row in rows:  # all rows end where the first does, but for a few px of division
        used = len(row.pictures) * (row.tile + demo_picture.GAP) - demo_picture.GAP
        assert 0 <= demo_picture.WIDTH - 2 * demo_picture.MARGIN - used < len(row.pictures)


def test_it_collects_everything(tmp_path: Path):
    output, out = tmp_path / "output", tmp_path / "out"
    write_run(output)
    out.mkdir()
    summary = demo.collect(output, out, 12.34)
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["loss_first"], summary["loss_last"], summary["steps"]) == (1.3, 1.0, 100)
    assert (summary["rank_min"], summary["rank_mean"], summary["rank_max"]) == (4, 12, 20)
    assert summary["bytes"] == (out / summary["file"]).stat().st_size
    assert {path.name for path in out.iterdir()} == {
        *demo.PICTURES.values(),
        "demo.png",
        "summary.json",
        "robot_00001_.safetensors",
    }
    picture = Image.open(out / "demo.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(picture.width * picture.height) or ()}
    shown = {shade(number) for number, name in enumerate(SAVED) if name != "lora2_ranks"}
    assert shown <= colours
    demo.check(summary, out)


@pytest.mark.parametrize("missing", SAVED)
def test_a_missing_picture_is_a_failure(tmp_path: Path, missing: str):
    write_run(tmp_path, tuple(name for name in SAVED if name != missing))
    (tmp_path / "out").mkdir()
    with pytest.raises(demo.DemoError, match=f"{missing}$"):
        demo.collect(tmp_path, tmp_path / "out", 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_last": 1.29}, "did not fall clearly"),
        ({"loss_last": 1.4}, "did not fall clearly"),
        ({"rank_min": 34}, "the same rank"),
        ({}, "changed nothing"),
    ],
)
def test_it_fails_when_there_is_nothing_to_show(tmp_path: Path, change: dict[str, Any], words: str):
    (tmp_path / "base.png").write_bytes(b"one picture")
    (tmp_path / "sample.png").write_bytes(b"another" if change else b"one picture")
    with pytest.raises(demo.DemoError, match=words):
        demo.check(GOOD | change, tmp_path)
