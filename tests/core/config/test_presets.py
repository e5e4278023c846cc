"""From widgets, a preset and nodes' options to one configuration."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from lora2_pack.lora2_core.config.checks import ConfigError
from lora2_pack.lora2_core.config.presets import (
    AS_SET,
    AUTO,
    PRESETS,
    Options,
    build_config,
    replaced,
    with_stand_in,
)
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import (
    AS_PRECISION,
    OPTIMIZERS,
    DataConfig,
    KeepConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
)

# What the widgets of the training node hold, none of it as any preset would have it.
WIDGETS: dict[str, Any] = {
    "steps": 77,
    "learning_rate": 3e-4,
    "mode": "fixed",
    "target_rank": 5.0,
    "target_megabytes": 0.0,
    "max_rank": 20,
    "batch_size": 3,
    "resolution": 512,
    "seed": 9,
    "precision": "fp32",
    "entropy_weight": 0.5,
    "targets": "cross-attention",
    "schedule": "cosine",
}
EIGHT = ("6 GB", "4 GB")  # presets with weights in fp8
PARTS: dict[str, Any] = {
    "data": DataConfig(trigger="sks"),
    "objective": ObjectiveConfig(min_snr_gamma=5.0),
    "optimizer": OptimizerConfig(ema=0.9),
    "text": TextConfig(learning_rate=1e-5),
    "keep": KeepConfig(resume=False),
    "samples": SampleConfig(prompts=("a cat",)),
}


def test_without_a_preset_widgets_count_as_they_are():
    found = build_config(WIDGETS)
    for name in set(WIDGETS) - {"mode", "target_rank", "target_megabytes", "max_rank"}:
        assert getattr(found, name) == WIDGETS[name], name
    assert found.rank == RankConfig.fixed(target_rank=5.0, max_rank=20)
    assert (found.gradient_checkpointing, found.block_swap) == ("auto", "auto")
    rest = {f.name for f in dataclasses.fields(TrainConfig)} - set(WIDGETS)
    rest -= {"rank", "gradient_checkpointing", "block_swap"}
    assert {name: getattr(found, name) for name in rest} == {
        name: getattr(TrainConfig(), name) for name in rest
    }


@pytest.mark.parametrize("mode", ["balanced", "paper", "fixed"])
def test_0_leaves_a_rank_to_the_mode(mode: str):
    zeros = {"target_rank": 0.0, "target_megabytes": 0.0, "max_rank": 0}
    found = build_config({**WIDGETS, **zeros, "mode": mode})
    assert found.rank == RankConfig.for_mode(mode)
    found = build_config({**WIDGETS, **zeros, "mode": mode, "target_megabytes": 4.0})
    assert found.rank == RankConfig.for_mode(mode, target_megabytes=4.0)


@pytest.mark.parametrize(("preset", "steps"), [("paper (SDXL)", 500), ("paper (KOALA-700m)", 800)])
def test_the_paper_is_set_whole(preset: str, steps: int):
    """Appendix A1 and section 4 of arXiv 2603.21884, whatever the widgets say but the seed."""
    found = build_config(WIDGETS, preset)
    assert found == TrainConfig(
        steps=steps,
        learning_rate=5e-5,
        schedule="constant",
        batch_size=1,
        resolution=1024,
        seed=9,
        precision="auto",
        gradient_checkpointing=True,
        block_swap=AUTO,
        entropy_weight=1e-4,
        targets="attention",
        rank=RankConfig.paper(rank_weight=1e-4),
        optimizer=OptimizerConfig(name="adamw8bit", weight_decay=0.0),
    )


@pytest.mark.parametrize("preset", ["12 GB", "8 GB", "6 GB", "4 GB"])
def test_a_card_s_preset_sets_what_memory_depends_on(preset: str):
    found = build_config(WIDGETS, preset)
    assert (found.batch_size, found.precision, found.targets) == (1, "auto", "attention")
    assert found.gradient_checkpointing and found.optimizer.name == "adamw8bit"
    assert found.rank == RankConfig.balanced(target_rank=5.0, max_rank=20)
    assert found.resolution == (1024 if preset == "12 GB" else 768)
    assert found.frozen_weights == ("fp8" if preset in EIGHT else AS_PRECISION)
    assert found.block_swap == (True if preset == "4 GB" else AUTO)
    assert (found.steps, found.learning_rate, found.schedule) == (77, 3e-4, "cosine")


def test_what_a_preset_replaces_is_told():
    assert replaced(WIDGETS, AS_SET) == ""
    text = replaced({**WIDGETS, "batch_size": 1}, "8 GB")
    assert text == (
        "mode balanced (not fixed), precision auto (not fp32), targets attention (not "
        "cross-attention), resolution 768 (not 512)"
    )
    assert "learning_rate 5e-05 (not 0.0003)" in replaced(WIDGETS, "paper (SDXL)")
    for preset, named in PRESETS.items():
        same = {name: value for name, value in named.items()}
        assert replaced(same, preset) == ""


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_only_what_there_is(preset: str):
    fields = {f.name for kind in (TrainConfig, RankConfig) for f in dataclasses.fields(kind)}
    assert set(PRESETS[preset]) <= fields


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match=r"preset is '24 GB'; choose one of as set above, paper"):
        build_config(WIDGETS, "24 GB")


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("preset", [AS_SET, "12 GB"])
def test_options_reach_the_configuration(name: str, preset: str):
    plain = build_config(WIDGETS, preset)
    found = build_config(WIDGETS, preset, Options().joined(**{name: PARTS[name]}))
    part = PARTS[name]
    if name == "optimizer" and preset == "12 GB":
        part = dataclasses.replace(part, name="adamw8bit")  # auto: as the preset says
    assert found == dataclasses.replace(plain, **{name: part})


def test_later_options_win_and_leave_the_other_parts():
    first = Options().joined(data=DataConfig(trigger="old"), text=PARTS["text"])
    found = build_config(WIDGETS, AS_SET, first.joined(data=DataConfig(flip=True)))
    assert found.data == DataConfig(flip=True)
    assert found.text == PARTS["text"]
    assert first.data == DataConfig(trigger="old"), "options are values"


def test_options_of_ranks_change_the_mode_s_own():
    changes = (("quantile", 0.8), ("freeze_fraction", 0.0), ("group_targets", (("cross", 4.0),)))
    found = build_config({**WIDGETS, "mode": "balanced"}, AS_SET, Options(rank=changes))
    assert found.rank == RankConfig.balanced(target_rank=5.0, max_rank=20, **dict(changes))
    with pytest.raises(ConfigError, match="freeze_fraction is 2"):
        build_config(WIDGETS, AS_SET, Options(rank=(("freeze_fraction", 2.0),)))
    with pytest.raises(ConfigError, match="`paper` mode has one target"):
        build_config(WIDGETS, "paper (SDXL)", Options(rank=changes))


@pytest.mark.parametrize(("asked", "preset"), list(itertools.product(OPTIMIZERS, PRESETS)))
def test_an_optimizer_must_agree_with_the_preset(asked: str, preset: str):
    options = Options(optimizer_name=asked)
    if preset == AS_SET or asked == "adamw8bit":
        assert build_config(WIDGETS, preset, options).optimizer.name == asked
        return
    with pytest.raises(ConfigError) as caught:
        build_config(WIDGETS, preset, options)
    assert str(caught.value) == (
        f"optimizer is {asked} in the connected options, and the preset {preset!r} sets it to "
        "adamw8bit: choose adamw8bit or the default there, or the preset 'as set above'."
    )


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_checkpointing_must_agree_with_the_preset(asked: bool | None, preset: str):
    options = Options(gradient_checkpointing=asked)
    if preset != AS_SET and asked is False:
        with pytest.raises(ConfigError, match=r"gradient_checkpointing is off .* sets it to on"):
            build_config(WIDGETS, preset, options)
        return
    found = build_config(WIDGETS, preset, options).gradient_checkpointing
    assert found == (True if preset != AS_SET else AUTO if asked is None else asked)


def test_frozen_weights_are_the_preset_s_or_the_options():
    for preset in PRESETS:
        own = "fp8" if preset in EIGHT else AS_PRECISION
        assert build_config(WIDGETS, preset).frozen_weights == own
        assert build_config(WIDGETS, preset, Options(frozen_weights="fp8")).frozen_weights == "fp8"
    with pytest.raises(ConfigError, match=r"frozen_weights is as precision .* sets it to fp8: "):
        build_config(WIDGETS, "6 GB", Options(frozen_weights=AS_PRECISION))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("asked", [None, True, False])
def test_block_swap_is_the_preset_s_or_the_options(preset: str, asked: bool | None):
    options = Options(block_swap=asked)
    if preset == "4 GB" and asked is False:
        with pytest.raises(ConfigError, match=r"block_swap is off .* sets it to on"):
            build_config(WIDGETS, preset, options)
        return
    found = build_config(WIDGETS, preset, options).block_swap
    assert found == (True if preset == "4 GB" else AUTO if asked is None else asked)


def test_the_pull_on_ranks_must_agree_with_the_paper():
    with pytest.raises(ConfigError, match=r"rank_weight is 0\.5 .* sets it to 0\.0001: choose"):
        build_config(WIDGETS, "paper (SDXL)", Options(rank=(("rank_weight", 0.5),)))
    same = Options(rank=(("rank_weight", 1e-4),))
    assert build_config(WIDGETS, "paper (SDXL)", same) == build_config(WIDGETS, "paper (SDXL)")


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_chose_has_a_stand_in_and_what_a_person_chose_has_none(preset: str):
    kept = Options(optimizer=OptimizerConfig(ema=0.9, weight_decay=0.01))
    found = build_config(WIDGETS, preset, kept)
    other = with_stand_in(found, preset, kept)
    if preset == AS_SET:
        assert other is None
        return
    assert other is not None and other.optimizer.name == "adamw"  # PyTorch's own: never missing
    assert dataclasses.replace(other, optimizer=found.optimizer) == found
    assert dataclasses.replace(other.optimizer, name="adamw8bit") == found.optimizer
    by_name = dataclasses.replace(kept, optimizer_name="adamw8bit")
    assert with_stand_in(found, preset, by_name) is None
