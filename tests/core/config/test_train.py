"""Settings: every bad value is refused when the configuration is made, by name."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from lora2_pack.lora2_core.config import train as config
from lora2_pack.lora2_core.config.checks import ConfigError
from lora2_pack.lora2_core.config.ranks import Prior, RankConfig
from lora2_pack.lora2_core.config.train import (
    DataConfig,
    KeepConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
)

NAN, INFINITE = math.nan, math.inf

BAD: dict[type, dict[str, list[Any]]] = {
    RankConfig: {
        "mode": ["literal", "", None],
        "quantile": [0, 1, -0.1, 1.5, NAN, INFINITE, "0.9"],
        "min_rank": [0, 129, 1.5, True, None],
        "max_rank": [0, -1, 4097, 8.0, True, "8", NAN],
        "target_rank": [0, -3, 129, NAN, INFINITE, True, "16"],
        "target_megabytes": [0, -1.0, NAN, INFINITE, "4"],
        "start": ["minimum", None],
        "rank_learning_rate": [0, -1e-3, 1.01, NAN, INFINITE, None],
        "rank_weight": [-1e-9, NAN, INFINITE],
        "controller_gain": [-1, 1001, NAN],
        "freeze_fraction": [-0.1, 1.01, NAN],
        "growth": ["ones", None],
        "growth_std": [-0.1, NAN, INFINITE],
        "hysteresis": ["no", 1, None],
        "nu_prior": [None, 0.5],
        "weight_prior": [None, 0.5],
    },
    OptimizerConfig: {
        "name": ["adam", "", None],
        "weight_decay": [-0.01, 10.1, NAN, INFINITE, True, "0"],
        "warm_up": [-0.1, 1.1, NAN, INFINITE, "no"],
        "accumulation": [0, 1025, 2.0, True, None],
        "clip_norm": [-1, 1e10, NAN, INFINITE, None],
        "ema": [-0.1, 1.0, 0.9999999, NAN, None],
    },
    DataConfig: {
        "buckets": [1, "yes", None],
        "flip": [0, "no", None],
        "trigger": [None, 5, ("sks",)],
        "caption_dropout": [-0.1, 1.1, NAN, None],
        "caption_shuffle": [1, "yes", None],
        "keep_tags": [-1, 1001, 1.5, True, None],
        "class_prompt": [None, 5],
        "class_images": [-1, 10_001, 2.0, True, None],
        "prior_weight": [-0.1, 1001, NAN, INFINITE, None],
    },
    ObjectiveConfig: {
        "min_snr_gamma": [-1, 1e7, NAN, INFINITE, None],
        "noise_offset": [-0.1, 1.1, NAN, None],
        "timestep_low": [-0.1, 1.0, NAN, None],
        "timestep_high": [0, 1.1, NAN, None],
    },
    TextConfig: {
        "learning_rate": [-1e-5, 1.01, NAN, INFINITE, True, None],
        "targets": ["", "  ", None, 5],
    },
    KeepConfig: {
        "checkpoint_steps": [-1, 1_000_001, 1.5, True, None],
        "checkpoint_minutes": [-1, 1e7, NAN, INFINITE, None],
        "resume": [1, "yes", None],
    },
    SampleConfig: {
        "every": [0, 1_000_001, 1.5, True, None],
        "seed": [-1, 2**63, 1.0, None],
        "steps": [0, 1001, 20.0, True, None],
        "guidance": [-1, 101, NAN, INFINITE, None],
    },
    TrainConfig: {
        "steps": [0, -5, 1_000_001, 1.5, True, "100", None],
        "schedule": ["polynomial", None],
        "learning_rate": [0, -1e-4, 1.01, NAN, INFINITE, True, "1e-4"],
        "batch_size": [0, 257, 2.0, False],
        "resolution": [0, 32, 63, 100, 513, 4128, 512.0],
        "seed": [-1, 2**63, 1.0, None],
        "precision": ["fp8", "float32", None],
        "frozen_weights": ["auto", "fp16", True, None],
        "gradient_checkpointing": [1, "yes", None],
        "block_swap": [1, "on", None],
        "kept_gain": [0.4, 1.1, "all", True],
        "entropy_weight": [-1e-4, NAN, INFINITE, None],
        "probes": [-1, 10_001, 2.5],
        "targets": ["", "  ", None],
        "rank": [None, {"mode": "paper"}],
        "optimizer": [None, "adamw", {}],
        "data": [None, {}],
        "objective": [None, {}],
        "text": [None, 5e-5],
        "keep": [None, {}],
        "samples": [None, ("a cat",)],
    },
}
# Values that cannot be shown as they are; they have tests of their own below.
BY_THEMSELVES = {RankConfig: {"group_targets"}, SampleConfig: {"prompts"}}
# Where the name of a field means nothing without that of its part.
SHOWN = {
    (OptimizerConfig, "name"): "optimizer",
    (TextConfig, "learning_rate"): "text_learning_rate",
    (TextConfig, "targets"): "text targets",
    **{(SampleConfig, name): f"sample_{name}" for name in ("every", "seed", "steps", "guidance")},
}
CASES = [
    (kind, name, bad) for kind, fields in BAD.items() for name, v in fields.items() for bad in v
]


@pytest.mark.parametrize(("kind", "name", "bad"), CASES)
def test_a_bad_value_is_refused_by_name_with_a_fix(kind: type, name: str, bad: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: bad})
    message = str(caught.value)
    shown = SHOWN.get((kind, name), name)
    assert message.startswith((f"{shown} is {bad};", f"{shown} is {bad!r};"))
    assert message.endswith(".") and "\n" not in message
    fix = message.removesuffix(".").partition("; ")[2]
    assert ": " in fix or "choose one of " in fix  # what is valid, then what to do


def test_every_field_has_its_bad_values() -> None:
    """A new setting must come with a check, and with cases here."""
    parts = {kind for kind in vars(config).values() if dataclasses.is_dataclass(kind)}
    assert parts == set(BAD)
    for kind, fields in BAD.items():
        cases = set(fields) | BY_THEMSELVES.get(kind, set())
        assert {f.name for f in dataclasses.fields(kind)} == cases


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("a cat", 5), r"sample prompts is \('a cat', 5\); use a tuple of texts"),
        ("a cat", "sample prompts is 'a cat'; use a tuple of texts"),
        (["a cat"], r"sample prompts is \['a cat'\]; use a tuple of texts"),
        (("a cat",) * 5, "number of sample prompts is 5; .* from 0 to 4: take fewer"),
    ],
)
def test_bad_prompts_are_refused(bad: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleConfig(prompts=bad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_targets": (("top", 4.0),)}, "group_targets is 'top'; choose one of self, cross"),
        ({"group_targets": (("up", 0.5),)}, "group_targets up is 0.5; .* from 1 to 128"),
        ({"group_targets": (("up", 9.0),), "max_rank": 8, "target_rank": 4}, "8 is max_rank"),
        ({"group_targets": (("up", 4.0),), "mode": "paper"}, "one target .*: use `balanced`"),
        ({"group_targets": (("up", 4.0),), "target_megabytes": 4.0}, "4; .*: leave one out"),
    ],
)
def test_bad_targets_of_groups_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankConfig(**settings)


def test_class_images_need_a_word_for_them() -> None:
    with pytest.raises(ConfigError, match=r"class_images is 4, but class_prompt is empty; .*: for"):
        DataConfig(class_images=4, class_prompt=" ")
    assert DataConfig(class_images=4, class_prompt="a cat").class_images == 4


def test_a_range_of_timesteps_has_a_width() -> None:
    with pytest.raises(ConfigError, match=r"timestep_low is 0\.6 and timestep_high 0\.5; .*: use"):
        ObjectiveConfig(timestep_low=0.6, timestep_high=0.5)
    assert ObjectiveConfig(timestep_low=0.5, timestep_high=0.501).timestep_low == 0.5


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("weight", -1.0),
        ("weight", NAN),
        ("std", 0.0),
        ("std", -2.0),
        ("std", INFINITE),
        *(
            pytest.param(
                *("mean", value),
            )
            for value in (NAN, INFINITE)
        ),
    ],
)
def test_a_bad_prior_is_refused_by_name(name: str, bad: float) -> None:
    with pytest.raises(ConfigError, match=rf"prior {name} is {bad}; it must be .*: "):
        Prior(**{name: bad})


def test_a_resolution_is_led_to_the_nearest_valid_one() -> None:
    for bad, good in ((100, 96), (1000, 992), (4095, 4096), (65, 64)):
        with pytest.raises(ConfigError, match=f"resolution is {bad}.*use {good}"):
            TrainConfig(resolution=bad)
        assert TrainConfig(resolution=good).resolution == good


def test_the_target_rank_stays_within_the_largest() -> None:
    with pytest.raises(ConfigError, match=r"target_rank is 9.*1 to 8: 8 is max_rank, which"):
        RankConfig(max_rank=8, target_rank=9)
    assert RankConfig(max_rank=8, target_rank=8).rank_limit == 8


def test_a_budget_in_megabytes_needs_no_target_rank() -> None:
    assert RankConfig(max_rank=8, target_megabytes=4.0).target_megabytes == 4.0


def test_the_limits_are_those_of_the_modes() -> None:
    assert RankConfig.balanced().rank_limit == 128
    assert RankConfig.paper().rank_limit == 512
    assert RankConfig.fixed(target_rank=512).rank_limit == 512
    assert RankConfig.paper(max_rank=64).rank_limit == 64
    assert RankConfig.paper(target_rank=300.0).target_rank == 300
    with pytest.raises(ConfigError, match="target_rank is 300"):
        RankConfig.balanced(target_rank=300.0)


def test_a_mode_is_found_by_its_name() -> None:
    for make in (RankConfig.balanced, RankConfig.paper, RankConfig.fixed):
        assert RankConfig.for_mode(make().mode) == make()
        assert RankConfig.for_mode(make().mode, max_rank=20) == make(max_rank=20)


def test_the_modes_have_the_values_of_the_method() -> None:
    paper, balanced = RankConfig.paper(), RankConfig.balanced()
    assert balanced == RankConfig()
    assert (paper.mode, paper.quantile, paper.target_rank) == ("paper", 0.9, 1.0)
    assert (paper.start, paper.growth, paper.hysteresis) == ("maximum", "random", False)
    assert (paper.controller_gain, paper.freeze_fraction) == (0, 0)
    assert (balanced.start, balanced.growth, balanced.hysteresis) == ("target", "zero", True)
    assert balanced.freeze_fraction == 0.2
    fixed = RankConfig.fixed()
    assert (fixed.mode, fixed.start, fixed.target_rank) == ("fixed", "target", 16)
    assert (fixed.rank_weight, fixed.controller_gain, fixed.freeze_fraction) == (0, 0, 1)
    assert paper.nu_prior.weight == paper.weight_prior.weight == 0
    assert paper.rank_learning_rate == balanced.rank_learning_rate == 2e-2


@pytest.mark.parametrize("kind", [*BAD, Prior])
def test_a_configuration_cannot_be_changed(kind: type) -> None:
    made = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(kind)[0].name, 1)


def test_a_configuration_becomes_plain_values() -> None:
    made = TrainConfig(rank=RankConfig.paper(nu_prior=Prior(weight=0.5)), steps=7)
    plain = json.loads(json.dumps(made.as_dict()))
    assert plain["steps"] == 7
    assert plain["rank"]["mode"] == "paper"
    assert plain["rank"]["nu_prior"] == {"weight": 0.5, "mean": 0.0, "std": 1.0}
    assert set(plain) == {f.name for f in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    ("kind", "edges"),
    [
        (TrainConfig, {"steps": 1, "learning_rate": 1.0, "batch_size": 256, "resolution": 64}),
        (TrainConfig, {"seed": 2**63 - 1, "entropy_weight": 0, "probes": 0, "resolution": 4096}),
        (RankConfig, {"quantile": 1e-6, "max_rank": 1, "target_rank": 1, "growth_std": 0}),
        (RankConfig, {"max_rank": 4096, "target_rank": 4096, "freeze_fraction": 0.0}),
        (OptimizerConfig, {"weight_decay": 10, "warm_up": 1, "accumulation": 1024, "ema": 0.999}),
        (OptimizerConfig, {"weight_decay": 0, "warm_up": None, "clip_norm": 0, "ema": 0}),
        (DataConfig, {"caption_dropout": 1, "keep_tags": 0, "prior_weight": 0}),
        (ObjectiveConfig, {"timestep_low": 0.999, "timestep_high": 1, "noise_offset": 1}),
        (TextConfig, {"learning_rate": 1.0, "targets": "x"}),
        (KeepConfig, {"checkpoint_steps": 0, "checkpoint_minutes": 0, "resume": False}),
        (SampleConfig, {"prompts": ("a",) * 4, "every": 1, "steps": 1, "guidance": 0}),
        (RankConfig, {"controller_gain": 1000, "rank_weight": 0, "rank_learning_rate": 1}),
    ],
)
def test_the_edges_are_valid(kind: type, edges: dict[str, Any]) -> None:
    made = kind(**edges)
    assert {name: getattr(made, name) for name in edges} == edges
