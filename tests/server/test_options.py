"""The nodes of options on a booted server: each kind of run does what it should, and says so."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from lora2_pack.lora2_core.config.presets import PRESETS
from lora2_pack.lora2_core.data.cache import TensorCache
from lora2_pack.tests.server.graphs import Workflow, changed, training
from lora2_pack.tests.server.studio import Studio
from PIL import Image

SEED = 51
CLASS_IMAGES = 2


class Trained:
    """A file that a run wrote."""

    def __init__(self, path: Path):
        self.path = path
        with safetensors.safe_open(path, "pt") as file:
            self.metadata = dict(file.metadata())
            self.keys = set(file.keys())
            weights = [file.get_tensor(name).numpy().tobytes() for name in sorted(self.keys)]
        self.config = json.loads(self.metadata["lora2.config"])
        # Of the weights alone: the header holds the settings, and the file's own name.
        self.digest = hashlib.sha256(b"".join(weights)).hexdigest()
        self.steps = int(self.metadata["ss_steps"])


def _with_options(studio: Studio, workflow: Workflow, *chain: tuple[str, dict]) -> Workflow:
    """``workflow`` with nodes of options, one into the next, at the training node 3."""
    new, link = dict(workflow), None
    for number, (node, inputs) in enumerate(chain):
        earlier = {"options": link} if link else {}
        every = {**_defaults(studio, node), **inputs, **earlier}
        new[f"o{number}"] = {"class_type": node, "inputs": every}
        link = [f"o{number}", 0]
    return changed(new, "3", options=link) if link else new


def _defaults(studio: Studio, node: str) -> dict[str, Any]:
    spec = studio.server.get(f"/object_info/{node}")[node]["input"]["required"]
    return {name: options["default"] for name, (_, options) in spec.items()}


def _train(studio: Studio, workflow: Workflow) -> Trained:
    before = studio.lora_files()
    studio.run(workflow)
    [name] = studio.lora_files() - before
    return Trained(studio.loras / name)


@pytest.fixture(scope="module")
def plain(studio: Studio) -> Trained:
    return _train(studio, training(SEED))


@pytest.fixture(scope="module")
def folder(studio: Studio) -> str:
    """A portrait and a landscape with captions; the first is transparent on its right half."""
    path = studio.server.input / "two_shapes"
    path.mkdir()
    random = np.random.default_rng(3)
    for name, (height, width) in {"a": (256, 128), "b": (128, 256)}.items():
        pixels = random.integers(0, 255, (height, width, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        if name == "a":
            pixels[:, width // 2 :, 3] = 0
        Image.fromarray(pixels).save(path / f"{name}.png")
        (path / f"{name}.txt").write_text(f"red, blue, a drawing {name}", encoding="utf-8")
    return path.name


@pytest.fixture(scope="module")
def on_folder(studio: Studio, folder: str) -> Trained:
    """What the folder's photos give without captions, masks and options."""
    return _train(studio, _on_folder(folder))


def _on_folder(folder: str, **inputs: Any) -> Workflow:
    workflow = training(SEED, **inputs)
    return changed(workflow, "2", folder=folder)


def _scale_latent(file: Path) -> bool:
    """Double the latent that a file of the cache holds, if any, as the cache itself writes it."""
    with safetensors.safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    if "latent" not in tensors:
        return False
    file.unlink()
    TensorCache(file.parent).get_or_make(file.stem, lambda: {"latent": 2 * tensors["latent"]})
    return True


def _log(studio: Studio) -> str:
    return (studio.server.directory / "server.log").read_text(encoding="utf-8")


def test_what_a_run_takes_is_told_before_it_starts(studio: Studio, plain: Trained):
    assert plain.steps == 4
    told = re.search(r"LoRA²: This run takes about (\d+) MB of memory and (\d+) s", _log(studio))
    assert told, "no estimate in the log"
    # The untrained model in the demo's shape: 36 MB of weights, and 4 steps of a moment.
    assert 36 < int(told[1]) < 200 and int(told[2]) < 30


def test_what_was_encoded_is_not_encoded_again(studio: Studio, folder: str, on_folder: Trained):
    cache = studio.server.directory / "user" / "lora2" / "cache"
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = _train(studio, _on_folder(folder, file_name="tests/again"))
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept
    assert again.digest == on_folder.digest
    # Other latents under the same keys: what is read is what is learnt from.
    keys = {file.name for file in cache.iterdir() if _scale_latent(file)}
    assert len(keys) >= 2
    try:
        other = _train(studio, _on_folder(folder, file_name="tests/other"))
        assert other.digest != on_folder.digest
    finally:
        for name in keys:
            (cache / name).unlink()


def test_buckets_keep_the_shape_of_photos(studio: Studio, folder: str, on_folder: Trained):
    shaped = _train(
        studio,
        _with_options(studio, _on_folder(folder), ("LoRA2DataOptions", {"flip": True})),
    )
    assert (on_folder.config["data"]["buckets"], shaped.config["data"]["buckets"]) == (False, True)
    assert shaped.metadata["ss_enable_bucket"] == shaped.metadata["ss_flip_aug"] == "True"
    assert shaped.digest != on_folder.digest


def test_captions_get_the_trigger_and_are_shuffled(studio: Studio, folder: str, on_folder: Trained):
    words = {"trigger": "sks", "caption_shuffle": True, "caption_dropout": 0.5, "buckets": False}
    found = _train(studio, _with_options(studio, _on_folder(folder), ("LoRA2DataOptions", words)))
    assert found.metadata["modelspec.trigger_phrase"] == "sks"
    assert found.metadata["ss_caption_dropout_rate"] == "0.5"
    tags = json.loads(found.metadata["ss_tag_frequency"])
    assert set(next(iter(tags.values()))) == {"sks", "red", "blue", "a drawing a", "a drawing b"}
    assert found.digest != on_folder.digest


def test_a_mask_changes_what_is_learnt(studio: Studio, folder: str, on_folder: Trained):
    masked = _train(studio, changed(_on_folder(folder), "3", masks=["2", 2]))
    assert masked.digest != on_folder.digest
    assert masked.config == on_folder.config


def test_class_images_are_painted_once_and_learnt_beside_the_photos(studio: Studio):
    prior = {
        "class_prompt": "a photo of a thing",
        "class_images": CLASS_IMAGES,
        "buckets": False,
    }
    runs = [
        _train(studio, _with_options(studio, training(SEED, seed=s), ("LoRA2DataOptions", prior)))
        for s in (3, 4)
    ]
    assert [run.metadata["ss_num_reg_images"] for run in runs] == [str(CLASS_IMAGES)] * 2
    assert _log(studio).count("painting class image") == CLASS_IMAGES, "the first run alone"
    assert runs[0].digest != _train(studio, training(SEED, seed=3)).digest


def test_class_images_without_a_word_for_them_are_refused(studio: Studio):
    error = studio.refusal(changed(training(SEED), "3", class_images=["2", 0]))
    assert "class_prompt is empty" in error.message and error.node_id == "3"


def test_text_encoders_get_adapters_of_their_own(studio: Studio, plain: Trained):
    rate = {"text_learning_rate": 5e-5}
    found = _train(studio, _with_options(studio, training(SEED), ("LoRA2OptimizerOptions", rate)))
    extra = {key.split("_text_model")[0] for key in found.keys - plain.keys}
    assert extra == {"lora_te1", "lora_te2"}
    assert plain.keys < found.keys
    assert found.metadata["ss_text_encoder_lr"] == "5e-05"


@pytest.mark.parametrize("optimizer", ["adamw8bit", "prodigy"])
def test_other_optimizers(studio: Studio, plain: Trained, optimizer: str):
    workflow = training(SEED, learning_rate=1.0 if optimizer == "prodigy" else 1e-4)
    choice = ("LoRA2OptimizerOptions", {"optimizer": optimizer})
    found = _train(studio, _with_options(studio, workflow, choice))
    assert found.config["optimizer"]["name"] == optimizer
    assert found.steps == 4 and found.digest != plain.digest


def test_several_options_in_a_chain(studio: Studio, plain: Trained):
    optimizer = {"accumulation": 2, "ema": 0.5, "min_snr_gamma": 5.0, "clip_norm": 1.0}
    ranks = {"cross_rank": 3.0, "self_rank": 1.0, "freeze_fraction": 0.5}
    safety = {
        "gradient_checkpointing": "on",
        "frozen_weights": "fp8",
        "block_swap": "on",
        "sample_prompts": "a photo of sks subject\n\n a cat ",
        "sample_every": 2,
        "sample_steps": 2,
    }
    found = _train(
        studio,
        _with_options(
            studio,
            training(SEED),
            ("LoRA2OptimizerOptions", optimizer),
            ("LoRA2RankOptions", ranks),
            ("LoRA2SafetyOptions", safety),
        ),
    )
    config = found.config
    assert (config["optimizer"]["accumulation"], config["optimizer"]["ema"]) == (2, 0.5)
    assert config["objective"]["min_snr_gamma"] == 5
    assert config["rank"]["group_targets"] == [["self", 1.0], ["cross", 3.0]]
    assert config["frozen_weights"] == "fp8" and "frozen_weights" not in plain.config
    assert found.metadata["ss_fp8_base"] == "True" and "ss_fp8_base" not in plain.metadata
    assert config["gradient_checkpointing"] and found.digest != plain.digest
    assert "block_swap" not in config and "the weights of 17 kept in RAM" in _log(studio)
    name = found.path.relative_to(studio.loras).with_suffix(".png")
    strip = studio.server.output / "lora2_samples" / name
    with Image.open(strip) as picture:
        width, height = picture.size
    assert width > 400 and height > 400


def test_a_preset_sets_what_it_names(studio: Studio):
    workflow = training(SEED, preset="paper (SDXL)", learning_rate=0.5, resolution=64)
    choice = ("LoRA2OptimizerOptions", {"optimizer": "adamw"})
    error = studio.refusal(_with_options(studio, workflow, choice))
    assert "optimizer is adamw" in error.message and "'paper (SDXL)'" in error.message
    error = studio.refusal(changed(training(SEED), "3", preset="24 GB"))
    # Our sentence, or from 0.8.0 on ComfyUI's own, which looks at lists before any node does.
    assert all(word in error.message for word in ("preset", "'24 GB'", "as set above"))


def test_a_preset_says_what_it_replaces(studio: Studio):
    # With a model of another family, so that 768 px need not be trained at.
    workflow = training(SEED, preset="8 GB", mode="paper", batch_size=3)
    workflow["m"] = {"class_type": "LoRA2TestOtherFamily", "inputs": {"kind": "SD1.5"}}
    assert "SDXL" in studio.refusal(changed(workflow, "3", model=["m", 0])).message
    told = "The preset 8 GB sets mode balanced (not paper), batch_size 1 (not 3), resolution 768"
    assert told in _log(studio)


def test_the_preset_s_tooltip_names_all_that_it_sets(studio: Studio):
    inputs = studio.server.get("/object_info/LoRA2Train")["LoRA2Train"]["input"]
    _, options = inputs["optional"]["preset"]
    shown = {name for part in inputs.values() for name in part}
    assert options["options"] == list(PRESETS)
    for preset in PRESETS.values():
        missing = [name for name in set(preset) & shown if name not in options["tooltip"]]
        assert missing == []


def test_a_bad_option_is_refused_at_its_own_node(studio: Studio):
    bad = {"class_images": 5, "class_prompt": " "}
    error = studio.refusal(_with_options(studio, training(SEED), ("LoRA2DataOptions", bad)))
    assert error.node_id == "o0" and "class_prompt is empty" in error.message


@pytest.mark.parametrize(
    ("node", "name", "value"),
    [
        ("o0", "block_swap", True),
        ("o0", "block_swap", "On"),
        ("o0", "gradient_checkpointing", True),
        ("o0", "frozen_weights", "fp16"),
        ("3", "run", "in the background"),
    ],
)
def test_what_no_list_offers_is_refused(studio: Studio, node: str, name: str, value: Any):
    """A script may say it, and older ComfyUIs let it through: it must not become the default."""
    workflow = _with_options(studio, training(SEED), ("LoRA2SafetyOptions", {}))
    told = studio.refusal(changed(workflow, node, **{name: value})).message
    assert name in told and str(value) in told
    assert "choose one of" in told or "not in" in told
