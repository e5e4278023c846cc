"""The header of a file says how it was trained, by kohya's names, and tells no secrets."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from lora2_pack.lora2_core.adapters.budget import METADATA_BYTES
from lora2_pack.lora2_core.config.train import (
    DataConfig,
    KeepConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
)
from lora2_pack.lora2_core.files.metadata import RUN, describe_run


def describe(config: TrainConfig, captions: tuple[str, ...] = ("a cat",), **options: Any):
    losses = [0.2] * 3
    return describe_run(config, captions, "b", [1, 2], losses, [0.1], "title", **options)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigy"])
def test_the_optimizer_is_the_class_that_is_used(name: Any):
    import torch
    from lora2_pack.lora2_core.training.optimizers.make import make_optimizer

    config = OptimizerConfig(name, weight_decay=0.01)
    used = type(make_optimizer(config, [([torch.nn.Parameter(torch.ones(2))], 1e-3)]))
    told = describe(TrainConfig(optimizer=config))["ss_optimizer"]
    assert told.startswith(f"{used.__module__}.{used.__name__}(weight_decay=0.01")


def test_every_setting_has_kohyas_name():
    config = TrainConfig(
        steps=200,
        batch_size=2,
        schedule="cosine",
        gradient_checkpointing=True,
        optimizer=OptimizerConfig(accumulation=4, clip_norm=1.0),
        data=DataConfig(
            buckets=True,
            flip=True,
            trigger="sks",
            caption_dropout=0.1,
            caption_shuffle=True,
            keep_tags=2,
            class_prompt="a cat",
            class_images=50,
            prior_weight=0.5,
        ),
        objective=ObjectiveConfig(min_snr_gamma=5.0, noise_offset=0.05),
        text=TextConfig(learning_rate=5e-5),
    )
    expected = {
        "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "10",
        "ss_text_encoder_lr": "5e-05",
        "ss_gradient_accumulation_steps": "4",
        "ss_total_batch_size": "8",
        "ss_gradient_checkpointing": "True",
        "ss_max_grad_norm": "1.0",
        "ss_min_snr_gamma": "5.0",
        "ss_noise_offset": "0.05",
        "ss_caption_dropout_rate": "0.1",
        "ss_shuffle_caption": "True",
        "ss_keep_tokens": "2",
        "ss_flip_aug": "True",
        "ss_enable_bucket": "True",
        "ss_bucket_no_upscale": "True",
        "ss_prior_loss_weight": "0.5",
        "ss_num_reg_images": "50",
        "modelspec.trigger_phrase": "sks",
    }
    told = describe(config)
    assert {name: told[name] for name in expected} == expected
    assert all(isinstance(text, str) for text in told.values())


def test_what_is_off_is_told_as_kohya_tells_it():
    told = describe(TrainConfig())
    names = ("ss_min_snr_gamma", "ss_noise_offset", "ss_text_encoder_lr")
    assert [told[name] for name in names] == ["None"] * 3
    assert told["ss_lr_scheduler"] == "constant" and told["ss_lr_warmup_steps"] == "0"
    warm = describe(TrainConfig(optimizer=OptimizerConfig(warm_up=0.1)))
    assert warm["ss_lr_scheduler"] == "constant_with_warmup"
    assert warm["ss_lr_warmup_steps"] == "50"


@pytest.mark.parametrize("steps", [1, 37, 500])
def test_the_warm_up_is_that_of_the_schedule(steps: int):
    from lora2_pack.lora2_core.training.optimizers.make import schedule_factor

    for schedule in ("constant", "cosine", "linear"):
        config = TrainConfig(steps=steps, schedule=schedule)
        told = int(describe(config)["ss_lr_warmup_steps"])
        constant = dataclasses.replace(config, schedule="constant")
        flat = [schedule_factor(constant, n) for n in range(1, steps + 1)]
        found = [schedule_factor(config, n) for n in range(1, steps + 1)]
        rising = sum(b > a for a, b in zip([0.0, *found], found, strict=False))
        assert flat == [1.0] * steps
        assert abs(rising - (told if schedule != "constant" else 0)) <= 1


def test_how_a_run_is_kept_and_watched_is_not_told():
    plain = TrainConfig()
    watched = dataclasses.replace(
        plain,
        keep=KeepConfig(checkpoint_steps=7, resume=False),
        samples=SampleConfig(prompts=("my secret prompt",)),
    )
    assert describe(plain) == describe(watched)
    assert "keep" not in json.loads(describe(plain)["lora2.config"])


def test_the_trigger_is_the_word_or_the_only_caption():
    assert describe(TrainConfig())["modelspec.trigger_phrase"] == "a cat"
    assert "modelspec.trigger_phrase" not in describe(TrainConfig(), ("a cat", "a dog"))


def test_the_run_is_named_where_it_is_known():
    assert describe(TrainConfig(), run="abc")[RUN] == "abc"
    assert RUN not in describe(TrainConfig())


def test_usual_metadata_fits_into_what_a_budget_sets_aside():
    captions = tuple(f"a photo of sks cat number {n}, on a table, in the sun" for n in range(20))
    told = describe(TrainConfig(), captions, run="f" * 64)
    assert len(json.dumps(told)) < METADATA_BYTES
