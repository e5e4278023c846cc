"""What LoRA² adapts in the models of the SDXL family, counted without their weights."""

from __future__ import annotations

import dataclasses
import re

import comfy.supported_models
import comfy.utils
import pytest
from lora2_pack.bench.paper.bases.family import FAMILY, on_meta
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.adapters.targets import PRESETS, find_targets
from lora2_pack.lora2_core.config.ranks import GROUPS
from lora2_pack.tests.host import demo


@pytest.mark.parametrize(
    ("name", "components", "parameters"),
    [("SDXL", 560, 1_451_520), ("KOALA_700M", 168, 408_576)],
)
def test_what_the_paper_counts(name: str, components: int, parameters: int):
    targets = find_targets(on_meta(name).diffusion_model)
    assert len(targets) == components
    assert sum(target.parameters_per_rank for target in targets) == parameters


# Attention: 70 blocks of 8. Feed-forward: 70 of 2. Convolutions: 17 residual blocks with two
# convolutions and a projection of the timestep each, 11 changes of width, 4 samplers, 11
# transformers with two ends. With the ends but without the rest it is the well-known 722.
@pytest.mark.parametrize(
    ("preset", "components", "parameters"),
    [
        ("attention", 560, 1_451_520),
        ("self-attention", 280, 665_600),
        ("cross-attention", 280, 785_920),
        ("attention+ff", 700, 2_616_320),
        ("attention+ff+conv", 788, 3_074_240),
        ("b-lora content", 80, 220_160),
        ("b-lora style", 80, 220_160),
        ("b-lora", 160, 440_320),
    ],
)
def test_what_the_presets_take_of_sdxl(preset: str, components: int, parameters: int):
    targets = find_targets(on_meta("SDXL").diffusion_model, preset)
    assert len(targets) == components
    assert sum(target.parameters_per_rank for target in targets) == parameters


def test_every_preset_is_counted():
    counted = test_what_the_presets_take_of_sdxl.pytestmark[0].args[1]
    assert [preset for preset, *_ in counted] == list(PRESETS)


def test_what_the_preset_with_convolutions_leaves_out():
    base = on_meta("SDXL").diffusion_model
    taken = {target.name for target in find_targets(base, "attention+ff+conv")}
    rest = {target.name for target in find_targets(base, "")} - taken
    assert rest == {
        *("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2"),
        *("input_blocks.0.0", "out.2"),
    }


def test_b_lora_takes_the_two_blocks_of_its_paper():
    base = on_meta("SDXL")
    diffusers = comfy.utils.unet_to_diffusers(base.model_config.unet_config)
    for preset, block in (("b-lora content", "0"), ("b-lora style", "1")):
        start = rf"up_blocks\.0\.attentions\.{block}\..*\.attn[12]\.to_(q|k|v|out\.0)\.weight$"
        expected = {
            ours.removesuffix(".weight")
            for theirs, ours in diffusers.items()
            if re.match(start, theirs)
        }
        found = {target.name for target in find_targets(base.diffusion_model, preset)}
        assert found == expected


@pytest.mark.parametrize(
    ("group", "components"),
    [("self", 280), ("cross", 280), ("down", 192), ("mid", 80), ("up", 288)],
)
def test_the_groups_of_sdxl_s_attention(group: str, components: int):
    targets = find_targets(on_meta("SDXL").diffusion_model)
    assert sum(target.is_in(group) for target in targets) == components


def test_groups_beside_attention():
    base = on_meta("SDXL").diffusion_model
    targets = find_targets(base, "attention+ff+conv")
    kinds = [t for t in targets if t.is_in("self") or t.is_in("cross")]
    assert kinds == [t for t in targets if ".attn" in t.name]
    assert all(sum(t.is_in(group) for group in ("down", "mid", "up")) == 1 for t in targets)
    outside = [dataclasses.replace(t, root="te1") for t in targets]
    assert not any(t.is_in(group) for t in outside for group in GROUPS)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("selection", ["attention", "attention+ff+conv", "b-lora"])
def test_every_key_that_we_write_is_comfyui_s_own(name: str, selection: str):
    base = on_meta(name)
    shapes = {key: value.shape for key, value in base.state_dict().items()}
    keys = demo.lora_key_map(base)
    targets = find_targets(base.diffusion_model, selection)
    for target in targets:
        weight = keys[lora_file.kohya_key(target.name)]
        assert weight == f"diffusion_model.{target.name}.weight"
        shape = shapes[weight]
        assert (shape[0], shape[1:].numel()) == (target.out_features, target.in_features)
    assert len({lora_file.kohya_key(target.name) for target in targets}) == len(targets)


@pytest.mark.parametrize("preset", ["self-attention", "cross-attention"])
def test_the_presets_halve_the_attention(preset: str):
    base = on_meta("KOALA_700M").diffusion_model
    assert len(find_targets(base, preset)) == len(find_targets(base)) // 2
