"""Settings: every bad value is refused when the configuration is made, by name."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from lora2_pack.lora2_core.checks import ConfigError
from lora2_pack.lora2_core.config import TrainConfig
from lora2_pack.lora2_core.rank_config import Prior, RankConfig

NAN, INFINITE = math.nan, math.inf

BAD: dict[type, dict[str, list[Any]]] = {
    RankConfig: {
        "mode": ["literal", "", None],
        "quantile": [0, 1, -0.1, 1.5, NAN, INFINITE],
        "min_rank": [0, 129, 1.5, True, None],
        "max_rank": [0, -1, 4097, 8.0, True, "8", NAN],
        "target_rank": [0, -3, 129, NAN, INFINITE],
        "target_megabytes": [0, -1.0, NAN, INFINITE],
        "start": ["minimum", None],
        "rank_learning_rate": [0, -1e-3, 1.01, NAN, INFINITE],
        "rank_weight": [-1e-9, NAN, INFINITE],
        "controller_gain": [-1, 1001, NAN],
        "freeze_fraction": [-0.1, 1.01, NAN],
        "growth": ["ones", None],
        "growth_std": [-0.1, NAN, INFINITE],
    },
    TrainConfig: {
        "steps": [0, -5, 1_000_001, 1.5, True, "100", None],
        "schedule": ["polynomial", None],
        "learning_rate": [0, -1e-4, 1.01, NAN, INFINITE],
        "batch_size": [0, 257, 2.0, False],
        "resolution": [0, 32, 63, 100, 513, 4128, 512.0],
        "seed": [-1, 2**63, 1.0, None],
        "precision": ["fp8", "float32", None],
        "gradient_checkpointing": [1, "yes", None],
        "entropy_weight": [-1e-4, NAN, INFINITE],
        "probes": [-1, 10_001, 2.5],
    },
}
PARTS = {"group_targets", "optimizer", "data", "objective", "text", "keep", "samples"}
CASES = [
    (kind, name, bad) for kind, fields in BAD.items() for name, v in fields.items() for bad in v
]

# Fields whose bad values get in, and what happens then.
OPEN: list[tuple[type, str, Any, str]] = [
    (TrainConfig, "targets", "", "the empty pattern matches every layer, convolutions too"),
    (TrainConfig, "targets", None, "TypeError later, in re.compile"),
    (TrainConfig, "rank", None, "AttributeError later"),
    (TrainConfig, "learning_rate", True, "True passes for 1.0"),
    (RankConfig, "target_rank", True, "True passes for 1.0"),
    (RankConfig, "hysteresis", "no", "a text passes for True"),
    (RankConfig, "nu_prior", None, "AttributeError later, in the first step"),
]
MISTYPED = [
    (RankConfig, "quantile", "0.9"),
    (RankConfig, "target_rank", "16"),
    (RankConfig, "target_megabytes", "4"),
    (RankConfig, "rank_learning_rate", None),
    (TrainConfig, "learning_rate", "1e-4"),
    (TrainConfig, "entropy_weight", None),
]


def check_refusal(kind: type, name: str, bad: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: bad})
    message = str(caught.value)
    shown = (f"{name} is {bad};", f"{name} is {bad!r};")
    assert message.startswith(shown)
    assert message.endswith(".") and "\n" not in message
    fix = message.removesuffix(".").partition("; ")[2]
    assert ": " in fix or "choose one of " in fix  # what is valid, then what to do


@pytest.mark.parametrize(("kind", "name", "bad"), CASES)
def test_a_bad_value_is_refused_by_name_with_a_fix(kind: type, name: str, bad: Any) -> None:
    check_refusal(kind, name, bad)


def test_every_field_has_its_bad_values() -> None:
    """A new setting must come with a check, and with cases here."""
    unchecked = {"hysteresis", "nu_prior", "weight_prior", "targets", "rank", *PARTS}
    for kind, fields in BAD.items():
        assert {f.name for f in dataclasses.fields(kind)} - unchecked == set(fields)


@pytest.mark.parametrize(("kind", "name", "bad"), [case[:3] for case in OPEN])
def test_no_field_is_left_unchecked(kind: type, name: str, bad: Any) -> None:
    check_refusal(kind, name, bad)


@pytest.mark.parametrize(("kind", "name", "bad"), MISTYPED)
def test_a_value_of_another_type_is_refused_by_name(kind: type, name: str, bad: Any) -> None:
    check_refusal(kind, name, bad)


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
    with pytest.raises(ConfigError, match=r"target_rank is 9.*at most max_rank \(8\).*raise max"):
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


@pytest.mark.parametrize("kind", [RankConfig, TrainConfig, Prior])
def test_a_configuration_cannot_be_changed(kind: type) -> None:
    config = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(kind)[0].name, 1)


def test_a_configuration_becomes_plain_values() -> None:
    config = TrainConfig(rank=RankConfig.paper(nu_prior=Prior(weight=0.5)), steps=7)
    plain = json.loads(json.dumps(config.as_dict()))
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
        (RankConfig, {"controller_gain": 1000, "rank_weight": 0, "rank_learning_rate": 1}),
    ],
)
def test_the_edges_are_valid(kind: type, edges: dict[str, Any]) -> None:
    config = kind(**edges)
    assert {name: getattr(config, name) for name in edges} == edges
