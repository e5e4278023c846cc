"""Folders of photos on a booted server: what is read, what is said of the rest, and brackets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import safetensors
from lora2_pack.tests.server.graphs import Workflow, changed, training
from lora2_pack.tests.server.studio import Studio
from PIL import Image

SEED = 61


def _folder(studio: Studio, name: str, **photos: int) -> Path:
    """Photos of these brightnesses; "__" in a name stands for "/"."""
    root = studio.server.input / name
    for place, shade in photos.items():
        path = root / f"{place.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 64), shade).save(path)
    return root


def _look(folder: str) -> Workflow:
    return {
        "f": {"class_type": "LoRA2ImageFolder", "inputs": {"folder": folder, "path": ""}},
        "s": {
            "class_type": "SaveImage",
            "inputs": {"images": ["f", 0], "filename_prefix": f"{folder}/x"},
        },
        "c": {"class_type": "PreviewAny", "inputs": {"source": ["f", 1]}},
    }


def _said(studio: Studio, workflow: Workflow) -> tuple[int, list[str]]:
    """How many images come out, and the lines that the node shows."""
    history = studio.run(workflow)
    images = studio.server.outputs(history, "s")["images"]
    return len(images), studio.server.outputs(history, "f")["text"][0].splitlines()


def test_what_is_left_out_is_said_in_the_node_and_in_the_log(studio: Studio):
    root = _folder(studio, "left_out", a=0, **{"3_b__b": 1, "other__c": 2})
    for name in ("raw.nef", "._a.png", "d.txt"):
        (root / name).write_bytes(b"x")
    count, lines = _said(studio, _look("left_out"))
    assert count == 4
    assert [line.split(" (")[0] for line in lines] == [
        "Left out: raw.nef",
        "Left out: other",
        "Repeats: the folder itself 1",
        "Captions of no photo here: d.txt.",
    ]
    log = (studio.server.directory / "server.log").read_text(encoding="utf-8")
    assert all(f"LoRA²: {line}" in log for line in lines)
    (root / "3_b" / "b.txt").write_text("b")  # a change there is seen
    assert _said(studio, _look("left_out"))[1][-2:] == [
        "Captions of no photo here: d.txt.",
        "Without a caption (they take the prompt): a.png.",
    ]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"the robot\x92s arm", "a.txt is not readable UTF-8 text; save it anew as UTF-8"),
        ("metadata.jsonl", b"{}", "metadata.jsonl, line 1 is not of the form"),
        ("b.tif", b"no picture", "b.tif is not a readable image"),
    ],
)
def test_what_cannot_be_read_is_named(studio: Studio, name: str, data: bytes, words: str):
    root = _folder(studio, "refused_" + name.replace(".", "_"), a=0)
    (root / name).write_bytes(data)
    assert words in studio.refusal(_look(root.name)).message


def _weights(studio: Studio, workflow: Workflow) -> str:
    before = studio.lora_files()
    studio.run(workflow)
    [name] = studio.lora_files() - before
    with safetensors.safe_open(studio.loras / name, "pt") as file:
        tensors = [file.get_tensor(key).numpy().tobytes() for key in sorted(file.keys())]
    return hashlib.sha256(b"".join(tensors)).hexdigest()


def _on(folder: str, prompt: str, **inputs: str) -> Workflow:
    workflow = changed(training(SEED, instance_prompt=prompt, steps=2), "2", folder=folder)
    workflow["3"]["inputs"].pop("caption_brackets")  # as of a workflow from before it was there
    return changed(workflow, "3", **inputs)


def test_brackets_in_texts_are_letters_unless_they_are_weights(studio: Studio):
    _folder(studio, "brackets", a=90)
    plain, escaped = "a robot (fate)", r"a robot \(fate\)"
    letters = _weights(studio, _on("brackets", plain))
    assert letters == _weights(studio, _on("brackets", escaped, caption_brackets="text"))
    assert letters != _weights(studio, _on("brackets", plain, caption_brackets="weights"))


def test_repeats_reach_the_training(studio: Studio):
    photos = {"2_a__a": 10, "2_b__b": 240}
    _folder(studio, "evenly", **photos)
    _folder(studio, "more_of_one", **{name.replace("2_b", "6_b"): n for name, n in photos.items()})
    evenly, more = (_weights(studio, _on(name, "a wall")) for name in ("evenly", "more_of_one"))
    assert evenly != more
