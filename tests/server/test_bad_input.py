"""Bad input: one clear sentence that names the input, before any step, and the server lives on."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora2_pack.tests.server.graphs import Workflow, changed, training
from lora2_pack.tests.server.studio import Studio
from PIL import Image

SEED = 31


def check_refused(studio: Studio, workflow: Workflow, *words: str, node: str = "3") -> None:
    before = studio.lora_files()
    steps: list[Any] = []
    progress = lambda event, data: steps.append(data) if event == "progress" else None  # noqa: E731
    error = _error(studio, workflow, progress)
    assert error.node_id == node
    for word in words:
        assert word in error.message
    assert "\n" not in error.message and len(error.message) < 400
    assert not steps, "a step was spent"
    assert studio.lora_files() == before


def _error(studio: Studio, workflow: Workflow, progress: Any) -> Any:
    from lora2_tools.client import WorkflowError

    with pytest.raises(WorkflowError) as caught:
        studio.run(workflow, on_progress=progress)
    assert studio.server.alive()
    return caught.value


def _with(node: str, inputs: dict[str, Any], **sockets: list[Any]) -> Workflow:
    """A training that takes something from one more node, "b"."""
    extra = {"b": {"class_type": node, "inputs": inputs}}
    return changed({**training(SEED), **extra}, "3", **sockets)


def _without_captions(workflow: Workflow) -> Workflow:
    workflow["3"]["inputs"].pop("captions")
    return workflow


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no image", ["images", "empty"]),
        ("empty batch", ["images", "empty"]),
        ("NaN", ["images", "number 2", "NaN"]),
        ("infinite", ["images", "number 2", "infinite"]),
        ("latent", ["images", "(1, 4, 16, 16)"]),
    ],
)
def test_images_that_are_none(studio: Studio, kind: str, words: list[str]):
    workflow = _with("LoRA2TestBadImages", {"kind": kind}, images=["b", 0])
    check_refused(studio, _without_captions(workflow), *words)


@pytest.mark.parametrize(("width", "height"), [(63, 128), (128, 32), (1, 1)])
def test_small_images(studio: Studio, width: int, height: int):
    size = {"width": width, "height": height, "batch_size": 1, "color": 0}
    workflow = _without_captions(_with("EmptyImage", size, images=["b", 0]))
    check_refused(studio, workflow, "images", f"{width}×{height}", "64")


def test_captions_that_do_not_match_in_number(studio: Studio):
    size = {"width": 128, "height": 128, "batch_size": 3, "color": 0}
    check_refused(studio, _with("EmptyImage", size, images=["b", 0]), "captions", "6", "3 images")


def test_no_words_at_all(studio: Studio):
    check_refused(
        studio, _without_captions(training(SEED, instance_prompt="  ")), "instance_prompt"
    )


@pytest.mark.parametrize("kind", ["SD1.5", "Flux", "SDXL inpainting"])
def test_models_of_other_families(studio: Studio, kind: str):
    workflow = _with("LoRA2TestOtherFamily", {"kind": kind}, model=["b", 0])
    check_refused(studio, workflow, "model", "SDXL")


def test_parts_of_another_checkpoint(studio: Studio):
    check_refused(studio, _with("LoRA2TestOtherParts", {}, vae=["b", 0]), "vae", "SDXL")
    check_refused(
        studio, _with("LoRA2TestOtherParts", {}, clip=["b", 1]), "clip", "same checkpoint"
    )


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"max_rank": 4000}, ["max_rank", "4000"]),
        ({"max_rank": 8, "target_rank": 9.0}, ["target_rank", "9"]),
        ({"max_rank": 128, "target_rank": 128.0}, ["target_rank", "128"]),
        ({"target_megabytes": 5000.0}, ["target_megabytes", "5000"]),
        ({"targets": "no_such_layer"}, ["targets", "no_such_layer"]),
        ({"targets": "("}, ["targets", "regular expression"]),
        ({"targets": "time_embed"}, []),
        ({"resolution": 100}, ["resolution", "100", "32"]),
        ({"resolution": 32}, ["resolution", "64"]),
        ({"steps": 0}, ["steps"]),
        ({"learning_rate": 2.0}, ["learning_rate"]),
        ({"precision": "fp4"}, ["precision"]),
        ({"mode": "best"}, ["mode"]),
    ],
)
def test_settings(studio: Studio, inputs: dict[str, Any], words: list[str]):
    if not words:
        studio.run(training(SEED, **inputs, file_name="tests/fine"))
    else:
        check_refused(studio, training(SEED, **inputs), *words)


@pytest.mark.parametrize(
    "name",
    [
        *("../escaped", "a/../../escaped", "..", "/tmp/escaped", "..\\escaped", "C:\\escaped"),
        *("", "   ", ".safetensors", "a\0b", "a/", "x" * 300, "con<>"),
    ],
)
def test_file_names(studio: Studio, name: str):
    check_refused(studio, training(SEED, file_name=name), "file_name")
    assert not list(studio.server.directory.rglob("escaped*"))
    assert not Path("/tmp/escaped_00001_.safetensors").exists()


def test_file_names_that_are_fine(studio: Studio):
    names = {
        "tests/plain": "tests/plain_00001_.safetensors",
        "tests/with.safetensors": "tests/with_00001_.safetensors",
        "tests/Ünïcødé ²": "tests/Ünïcødé ²_00001_.safetensors",
        "tests/v1.5": "tests/v1.5_00001_.safetensors",
    }
    for name, file in names.items():
        studio.run(training(SEED, file_name=name, steps=1))
        assert file in studio.lora_files()
    studio.run(training(SEED, file_name="tests/plain", steps=2))
    assert "tests/plain_00002_.safetensors" in studio.lora_files()


# --- folders ----------------------------------------------------------------------------------


def _folder(name: str) -> Workflow:
    return changed(training(SEED), "2", path=name)


@pytest.mark.parametrize("name", ["/etc", "/", "../..", "..", "a/../../..", "/proc/self"])
def test_folders_outside_comfyui(studio: Studio, name: str):
    check_refused(studio, _folder(name), "folder", name, node="2")


def test_a_link_out_of_the_input_folder(studio: Studio):
    link = studio.server.input / "link"
    link.symlink_to("/usr/share", target_is_directory=True)
    check_refused(studio, _folder("link"), "folder", "link", node="2")


def test_folders_without_photos(studio: Studio):
    (studio.server.input / "empty").mkdir()
    check_refused(studio, _folder("empty"), "empty", "no image", node="2")
    check_refused(studio, _folder("missing"), "missing", "does not exist", node="2")
    broken = studio.server.input / "broken"
    broken.mkdir()
    (broken / "photo.png").write_bytes(b"no picture")
    check_refused(studio, _folder("broken"), "photo.png", "not a readable image", node="2")


def test_a_folder_of_one_s_own(studio: Studio):
    own = studio.server.input / "own"
    own.mkdir()
    for number in range(2):
        pixels = np.full((100 + number, 140, 3), 60 * number, np.uint8)
        Image.fromarray(pixels).save(own / f"{number}.png")
    (own / "0.txt").write_text("a grey wall", encoding="utf-8")
    (own / "notes.md").write_text("not a photo")
    for name in ("own", str(own)):
        studio.run(changed(training(SEED, file_name="tests/own"), "2", path=name))


# --- the disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(studio: Studio) -> Iterator[Path]:
    """A disk of 64 KiB mounted in output/loras."""
    folder = studio.loras / "small"
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.name == "nt" or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root and the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_found_before_the_first_step(studio: Studio, small_disk: Path):
    check_refused(studio, training(SEED, file_name="small/x"), "disk", "full", "MB")


def test_a_disk_that_fills_while_training(studio: Studio, small_disk: Path):
    # One layer at rank 1 would fit.
    workflow = training(
        SEED,
        file_name="small/x",
        targets=r"input_blocks\.4.*attn2\.to_q",
        target_rank=1.0,
        steps=30,
    )

    def fill(event: str, data: dict[str, Any]) -> None:
        if event == "progress" and not (small_disk / "other").exists():
            with (small_disk / "other").open("wb", buffering=0) as file, suppress(OSError):
                while file.write(b"\0" * 4096):
                    pass

    error = _error(studio, workflow, fill)
    assert "could not be written" in error.message and "No space left" in error.message
    assert [path.name for path in small_disk.iterdir()] == ["other"]
    time.sleep(0.2)
    studio.run(training(SEED, file_name="tests/after_full_disk"))


def test_a_folder_that_is_not_ours_to_write(studio: Studio):
    (studio.loras / "tests").mkdir(parents=True, exist_ok=True)
    (studio.loras / "tests" / "a_file").write_text("in the way")
    check_refused(studio, training(SEED, file_name="tests/a_file/x"), "a_file")
