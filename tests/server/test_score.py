"""Score Pictures as a node of a booted server: the judges of a folder, none that is not there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core.reports import scoring, vision
from lora2_pack.tests.core import judges
from lora2_pack.tests.server.graphs import Workflow
from lora2_pack.tests.server.studio import Studio
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(studio: Studio) -> dict[str, Any]:
    parent = studio.server.directory / "judges"
    return {"dino": judges.make_dino(parent / "d"), "clip": judges.make_clip(parent / "some" / "c")}


def _plain(colour: int, count: int = 1) -> dict[str, Any]:
    inputs = {"width": 40, "height": 30, "batch_size": count, "color": colour}
    return {"class_type": "EmptyImage", "inputs": inputs}


def _score(**inputs: Any) -> Workflow:
    given = {
        "images": ["3", 0], "real": ["1", 0], "prompts": "a mug\nin the snow", "without": "",
        "dino": "d", "clip": "some/c", **inputs,
    }  # fmt: skip
    batch = {"class_type": "ImageBatch", "inputs": {"image1": ["1", 0], "image2": ["2", 0]}}
    return {
        "1": _plain(0xFF2010), "2": _plain(0x10FF40), "3": batch,
        "s": {"class_type": "LoRA2Score", "inputs": given},
        "j": {"class_type": "PreviewAny", "inputs": {"source": ["s", 1]}},
    }  # fmt: skip


def test_it_says_what_the_core_says(studio: Studio, folders: dict[str, Any]):
    history = studio.run(_score())
    text = studio.server.outputs(history, "s")["text"][0]
    found = json.loads(studio.server.outputs(history, "j")["text"][0])
    red, green = (Image.new("RGB", (40, 30), c) for c in ((255, 32, 16), (16, 255, 64)))
    subject = scoring.Subject("subject", [red], {"a mug": [red], "in the snow": [green]})
    wanted = scoring.score([subject], vision.judges(folders["dino"], folders["clip"]))
    assert [one["metric"] for one in found] == ["DINO", "CLIP-I", "CLIP-T"]
    for told, exact in zip(found, wanted, strict=True):
        assert told["mean"] == pytest.approx(exact.mean, abs=1e-5)
        assert told["prompts"]["subject"] == pytest.approx(exact.prompts["subject"], abs=1e-5)
        assert f"{exact.metric}: {exact.judge}" in text
    assert found[0]["prompts"]["subject"]["a mug"] == pytest.approx(1, abs=1e-5)


def test_the_demos_judges_need_nothing_on_the_disk(studio: Studio):
    history = studio.run(_score(dino="", clip="", demo_judges=True))
    found = json.loads(studio.server.outputs(history, "j")["text"][0])
    assert [one["judge"] for one in found] == ["residual", "patches"]
    assert {one["metric"] for one in found} == {"Demo likeness"}
    for one in found:
        same, other = (one["prompts"]["subject"][p] for p in ("a mug", "in the snow"))
        assert same == pytest.approx(1, abs=1e-4) and other < 0.97


def test_without_prompts_likeness_alone_is_judged(studio: Studio, folders: dict[str, Any]):
    history = studio.run(_score(prompts="  ", dino=""))
    found = json.loads(studio.server.outputs(history, "j")["text"][0])
    assert [one["metric"] for one in found] == ["CLIP-I"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"prompts": "a\nb\nc"}, ["prompts has 3 lines for 2 pictures"]),
        ({"dino": "../judges/d"}, ["../judges/d", "leads out"]),
        ({"dino": "/etc"}, ["/etc", "leads out"]),
        ({"clip": "nobody/never"}, ["nobody/never", "hf download"]),
        ({"dino": "", "clip": ""}, ["no judge"]),
        ({"clip": "d"}, ["d cannot be used as a judge"]),
    ],
)
def test_what_cannot_judge(
    studio: Studio, folders: dict[str, Any], inputs: dict[str, Any], words: list[str]
):
    error = str(studio.refusal(_score(**inputs)))
    assert all(word in error for word in words), error
