"""From the widgets of a node, its preset and the nodes of options to one configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .checks import ConfigError
from .ranks import RankConfig
from .train import (
    AS_PRECISION,
    DataConfig,
    FrozenWeights,
    KeepConfig,
    ObjectiveConfig,
    OptimizerConfig,
    OptimizerName,
    SampleConfig,
    TextConfig,
    TrainConfig,
)

AS_SET = "as set above"
AUTO: Literal["auto"] = "auto"  # of an option: the preset's own choice, or else the default

# The paper, appendix A1: 1024 px, batch 1, learning rate 5e-5, fp16 mixed precision, gradient
# checkpointing, 8-bit Adam; section 4: λ_r = λ_e = 1e-4, 500 steps on SDXL and 800 on KOALA-700m.
# It names no schedule and no decay. `auto` takes bf16 for fp16 where the card can.
_PAPER: dict[str, Any] = {
    "mode": "paper",
    "learning_rate": 5e-5,
    "schedule": "constant",
    "batch_size": 1,
    "resolution": 1024,
    "precision": "auto",
    "entropy_weight": 1e-4,
    "rank_weight": 1e-4,
    "target_rank": 0,  # r_target is not in the paper: the mode's own
    "target_megabytes": 0,
    "max_rank": 0,
    "targets": "attention",
    "optimizer": "adamw8bit",
    "gradient_checkpointing": True,
}
# `balanced`, because `paper` starts with every layer at its largest rank: 7.5 GB of them.
_LEAN: dict[str, Any] = {
    "mode": "balanced",
    "batch_size": 1,
    "precision": "auto",
    "targets": "attention",
    "optimizer": "adamw8bit",
    "gradient_checkpointing": True,
}
# SDXL takes 6.9 GB at 1024 px, 6.2 GB at 768 px, 3.7 GB with its weights in fp8 and 1.6 GB where
# those of blocks wait in RAM, as estimated (tests/host/test_estimate.py); a card also holds its
# driver's memory and often a desktop, so that 8 GB get the smaller one.
PRESETS: dict[str, dict[str, Any]] = {
    AS_SET: {},
    "paper (SDXL)": {**_PAPER, "steps": 500},
    "paper (KOALA-700m)": {**_PAPER, "steps": 800},
    "12 GB": {**_LEAN, "resolution": 1024},
    "8 GB": {**_LEAN, "resolution": 768},
    "6 GB": {**_LEAN, "resolution": 768, "frozen_weights": "fp8"},
    "4 GB": {**_LEAN, "resolution": 768, "frozen_weights": "fp8", "block_swap": True},
}

# What a preset's optimizer is replaced by where it cannot work: the same steps, but for what 8
# bits round, in more memory.
STAND_INS: dict[str, OptimizerName] = {"adamw8bit": "adamw"}


@dataclass(frozen=True)
class Options:
    """What the nodes of options say. None and an empty tuple leave a part to its defaults."""

    data: DataConfig | None = None
    objective: ObjectiveConfig | None = None
    optimizer: OptimizerConfig | None = None
    optimizer_name: str = AUTO  # of ``optimizer``, where it is not left to the preset
    text: TextConfig | None = None
    rank: tuple[tuple[str, Any], ...] = ()  # changes to the RankConfig of the mode
    gradient_checkpointing: bool | None = None
    block_swap: bool | None = None
    kept_gain: float | None = None
    frozen_weights: FrozenWeights | None = None
    keep: KeepConfig | None = None
    samples: SampleConfig | None = None

    def joined(self, **parts: Any) -> Options:
        """These options with ``parts`` in place of earlier ones."""
        return dataclasses.replace(self, **parts)


def replaced(widgets: Mapping[str, Any], preset: str) -> str:
    """What ``preset`` puts in place of ``widgets``, for people; empty where nothing differs."""
    named = PRESETS.get(preset, {})
    changes = {name: value for name, value in named.items() if widgets.get(name, value) != value}
    return ", ".join(f"{name} {_shown(new)} (not {widgets[name]})" for name, new in changes.items())


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def build_config(
    widgets: Mapping[str, Any], preset: str = AS_SET, options: Options | None = None
) -> TrainConfig:
    """The configuration of a run.

    ``widgets``: fields of TrainConfig, ``mode``, and the rank settings target_rank,
    target_megabytes and max_rank, of which 0 leaves one to the mode. What ``preset`` names
    replaces them. ``options`` must not contradict it. Raises ConfigError for a setting out of its
    range, an unknown preset and a contradiction.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; choose one of {', '.join(PRESETS)}.")
    named = dict(PRESETS[preset])
    options = options or Options()
    optimizer = _optimizer(named, preset, options)
    checkpointing = _switch("gradient_checkpointing", named, preset, options)
    swap = _switch("block_swap", named, preset, options)
    frozen = _frozen_weights(named, preset, options)
    settings = {**widgets, **named}
    ranks = {name: settings.pop(name, 0) for name in ("target_rank", "target_megabytes")}
    ranks["max_rank"] = settings.pop("max_rank", 0)
    ranks = {name: value for name, value in ranks.items() if value}
    if "rank_weight" in settings:
        ranks["rank_weight"] = settings.pop("rank_weight")
    _agree(preset, ranks, named, options)
    return TrainConfig(
        rank=RankConfig.for_mode(settings.pop("mode"), **{**ranks, **dict(options.rank)}),
        optimizer=optimizer,
        data=options.data or DataConfig(),
        objective=options.objective or ObjectiveConfig(),
        text=options.text or TextConfig(),
        keep=options.keep or KeepConfig(),
        samples=options.samples or SampleConfig(),
        gradient_checkpointing=checkpointing,
        block_swap=swap,
        frozen_weights=frozen,
        kept_gain=options.kept_gain,
        **settings,
    )


def with_stand_in(
    config: TrainConfig, preset: str, options: Options | None = None
) -> TrainConfig | None:
    """``config`` with what stands in for the optimizer that ``preset`` has chosen.

    None where nothing does, or where a person has asked for that optimizer by its name.
    """
    chosen = PRESETS.get(preset, {}).get("optimizer")
    if chosen not in STAND_INS or (options or Options()).optimizer_name != AUTO:
        return None
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, name=STAND_INS[chosen])
    )


def _optimizer(named: dict[str, Any], preset: str, options: Options) -> OptimizerConfig:
    wanted = named.pop("optimizer", None)
    asked = options.optimizer_name
    if wanted and asked not in (AUTO, wanted):
        raise _contradiction(preset, "optimizer", wanted, asked)
    config = options.optimizer or OptimizerConfig()
    name = wanted or (config.name if asked == AUTO else asked)
    return dataclasses.replace(config, name=name)


def _switch(
    name: str, named: dict[str, Any], preset: str, options: Options
) -> bool | Literal["auto"]:
    """One of what a preset only ever switches on, and what memory decides where nobody does."""
    wanted = named.pop(name, None)
    asked: bool | None = getattr(options, name)
    if wanted is not None and asked not in (None, wanted):
        raise _contradiction(preset, name, "on", "off")
    if wanted is None:
        return AUTO if asked is None else asked
    return bool(wanted)


def _frozen_weights(named: dict[str, Any], preset: str, options: Options) -> FrozenWeights:
    wanted = named.pop("frozen_weights", None)
    asked = options.frozen_weights
    if wanted is not None and asked not in (None, wanted):
        raise _contradiction(preset, "frozen_weights", wanted, str(asked))
    return wanted or asked or AS_PRECISION


def _agree(preset: str, ranks: dict[str, Any], named: Mapping[str, Any], options: Options) -> None:
    for name, value in options.rank:
        if name in named and value != named[name]:
            raise _contradiction(preset, name, f"{ranks[name]:g}", f"{value:g}")


def _contradiction(preset: str, setting: str, wanted: str, asked: str) -> ConfigError:
    return ConfigError(
        f"{setting} is {asked} in the connected options, and the preset {preset!r} sets it to "
        f"{wanted}: choose {wanted} or the default there, or the preset {AS_SET!r}."
    )
