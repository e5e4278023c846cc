"""What managers and model sites read of a file, held against what those standards publish."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.files.metadata import describe_run
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.fit import fit_to_megabytes
from lora2_pack.lora2_core.resizing.resize import resize_file
from lora2_pack.tests.core import toy

# ModelSpec 1.0.1: the form of each key that it defines and we may write.
MODELSPEC = {
    "sai_model_spec": r"1\.0\.1",
    "architecture": r"stable-diffusion-xl-v1-base/lora",
    "implementation": r"https://\S+",
    "title": r".+",
    "resolution": r"\d+x\d+",
    "usage_hint": r".+",
    "trigger_phrase": r".+",
    "hash_sha256": r"0x[0-9a-f]{64}",
    "thumbnail": r"data:image/(jpeg|png|webp);base64,\S+",
}
# Of every model, and of one that makes pictures. What it says should be there is, but for an author
# and a description, which we do not know, and the date: with a clock in it, the same run would not
# give the same file.
MUST = {"sai_model_spec", "architecture", "implementation", "title", "resolution"}
SHOULD = {"hash_sha256"}
# kohya's trainer: text always; these are read as numbers, JSON or Python words by others.
NUMBERS = [
    "learning_rate",
    "unet_lr",
    "steps",
    "max_train_steps",
    "seed",
    "batch_size_per_device",
    "num_train_images",
    "lr_warmup_steps",
    "gradient_accumulation_steps",
    "total_batch_size",
    "max_grad_norm",
    "network_alpha",
    "caption_dropout_rate",
    "keep_tokens",
    "prior_loss_weight",
    "num_reg_images",
]
BOOLEANS = [
    "gradient_checkpointing",
    "shuffle_caption",
    "flip_aug",
    "enable_bucket",
    "bucket_no_upscale",
]
NUMBERS_OR_NONE = ["text_encoder_lr", "min_snr_gamma", "noise_offset"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """As a training writes it, above the megabyte that kohya's short hash looks behind."""
    config = TrainConfig(steps=40)
    text = describe_run(
        config,
        ["a photo of sks cat", "a photo of sks cat"],
        "ab" * 32,
        [8] * 30,
        [1.0] * 40,
        [],
        "mine",
    )
    components = [toy.component(f"b.{n}.attn1.to_q", 8, (1280, 1280), n) for n in range(30)]
    return lora_file.save(tmp_path / "mine.safetensors", components, text)


def test_modelspec(file: Path):
    with safetensors.safe_open(file, "pt") as opened:
        found = opened.metadata()
    spec = {
        key.split(".", 1)[1]: text for key, text in found.items() if key.startswith("modelspec.")
    }
    assert spec.keys() >= MUST | SHOULD and spec.keys() <= MODELSPEC.keys()
    for key, text in spec.items():
        assert re.fullmatch(MODELSPEC[key], text), (key, text)
    assert spec["trigger_phrase"] == "a photo of sks cat"


def test_kohya_s_own_keys(file: Path):
    with safetensors.safe_open(file, "pt") as opened:
        found = opened.metadata()
    for name in NUMBERS:
        assert float(found[f"ss_{name}"]) >= 0, name
    for name in BOOLEANS:
        assert found[f"ss_{name}"] in ("True", "False"), name
    for name in NUMBERS_OR_NONE:
        assert found[f"ss_{name}"] == "None" or float(found[f"ss_{name}"]) > 0, name
    frequency = json.loads(found["ss_tag_frequency"])
    assert all(isinstance(n, int) for tags in frequency.values() for n in tags.values())
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"
    assert found["ss_network_dim"] == "Dynamic" and found["ss_network_module"]
    json.loads(found["ss_network_args"])
    assert re.fullmatch(r"\(\d+, \d+\)", found["ss_resolution"])


def test_hashes_by_which_files_are_found(file: Path):
    """The long one over all behind the header (its start is AutoV3); the short one as kohya's
    trainer takes it, over a file that the library writes with the ``ss_*`` metadata alone."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    with safetensors.safe_open(file, "pt") as opened:
        found = opened.metadata()
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    digest = hashlib.sha256(data[8 + length :]).hexdigest()
    assert found["sshs_model_hash"] == digest
    assert found["modelspec.hash_sha256"] == "0x" + digest
    kohya = {key: text for key, text in found.items() if key.startswith("ss_")}
    written = safetensors.torch.save(state, kohya)
    window = written[0x100000 : 0x100000 + 0x10000]
    assert window and found["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]


def test_nothing_tells_when_or_where(file: Path, tmp_path: Path):
    with safetensors.safe_open(file, "pt") as opened:
        text = json.dumps(opened.metadata())
    assert str(tmp_path) not in text and "date" not in text and "/root" not in text


def test_a_picture_in_the_file_counts_and_stays(tmp_path: Path):
    """Training writes none: a file has the same bytes whatever is painted meanwhile. One that
    somebody put in is part of the size that was asked for, and of the file that is made of it."""
    picture = toy.thumbnail(256, "PNG") + " " * 20_000
    components = [toy.component(f"b.{n}.attn1.to_q", 8, (64, 64), n) for n in range(20)]
    spec = {"modelspec.thumbnail": picture}
    plain, _ = fit_to_megabytes(components, {}, 40_000)
    state, full = fit_to_megabytes(components, spec, 40_000)
    assert len(lora_file.encode(state, full)) <= 40_000
    assert sum(t.numel() for t in state.values()) < sum(t.numel() for t in plain.values()) / 2
    source = lora_file.save(tmp_path / "a.safetensors", components, spec)
    smaller = tmp_path / "b.safetensors"
    resize_file(source, smaller, Limits(megabytes=0.05))
    assert smaller.stat().st_size <= 50_000
    found = inspector.inspect(smaller)
    assert found.metadata["modelspec.thumbnail"] == picture and found.thumbnail() is not None
