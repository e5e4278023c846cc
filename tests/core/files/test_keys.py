"""Every trainer's names are told apart by their endings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.files.keys import (
    ALPHA,
    DORA_SCALE,
    MID,
    NU,
    OTHER_ENDINGS,
    PAIR_ENDINGS,
    Pair,
    parse_keys,
    plain_name,
)
from lora2_pack.lora2_core.files.kohya_names import kohya_name, sgm_name


@pytest.mark.parametrize(("down", "up"), PAIR_ENDINGS)
def test_two_factors_of_every_naming(down: str, up: str):
    parts = parse_keys([f"x.y{up}", f"x.y{down}", "x.y.alpha", "x.y.dora_scale"])
    assert parts.pairs == (
        Pair("x.y", f"x.y{down}", f"x.y{up}", None, "x.y.alpha", "x.y.dora_scale"),
    )
    assert not (parts.others or parts.lonely or parts.unknown)
    assert set(parts.pairs[0].keys) == {f"x.y{down}", f"x.y{up}", "x.y.alpha", "x.y.dora_scale"}


def test_other_kinds_and_what_is_unknown():
    keys = [
        "a.hada_w1_a", "a.hada_w1_b", "a.hada_w2_a", "a.hada_w2_b", "a.alpha", "b.lokr_w1",
        "b.lokr_w2_a", "b.lokr_w2_b", "d.oft_blocks", "e.diff", "e.diff_b", "f.w_norm",
        "g.lora_up.weight", "h.weight", "bundle_emb.x.string_to_param.*",
        *(f"c.{part}.weight" for part in ("a1", "a2", "b1", "b2")),
    ]  # fmt: skip
    parts = parse_keys(keys)
    assert {kind: list(found) for kind, found in parts.others.items()} == {
        "loha": ["a"], "lokr": ["b"], "glora": ["c"], "oft": ["d"], "difference": ["e"],
        "norm": ["f"],
    }  # fmt: skip
    assert parts.others["loha"]["a"] == (*keys[:4], "a.alpha")
    assert parts.lonely == ("g.lora_up.weight",)
    assert parts.unknown == ("h.weight", "bundle_emb.x.string_to_param.*")


@pytest.mark.parametrize(
    "keys",
    [
        ["x.lora_down.weight"], ["x.lora_B.weight"], ["x_lora.up.weight"], ["x.lora_A"],
        ["x.lora_mid.weight"], ["x.lora_down.weight", "x.lora_B.weight"],
        ["x.hada_w1_a", "x.hada_w1_b", "x.hada_w2_a"],
        ["x.hada_w1_a", "x.hada_w1_b", "x.hada_w2_a", "x.hada_w2_b", "x.hada_t1"],
        ["x.lokr_w1"], ["x.lokr_w1_a", "x.lokr_w2"], ["x.lokr_t2"],
        ["x.a1.weight", "x.b1.weight"],
    ],
)  # fmt: skip
def test_what_lacks_its_other_half(keys: list[str]):
    parts = parse_keys([*keys, "y.lora_down.weight", "y.lora_up.weight", "x.alpha"])
    assert sorted(parts.lonely) == sorted(keys)
    assert [pair.name for pair in parts.pairs] == ["y"] and not parts.others
    assert parts.unknown == ("x.alpha",)


@pytest.mark.parametrize(
    "key",
    [
        "", ".", "alpha", "x.alpha", "x.weight", "x.lora_down", "x.down.weight", "x_lora.weight",
        "lora_down.weight", "x.lora.weight", "x.dora_scale", "x.lora_B.bias", "x.Diff",
        "x.lora_magnitude_vector.default.weight", "." * 9999,
    ],
)  # fmt: skip
def test_names_without_a_known_ending(key: str):
    parts = parse_keys([key])
    assert parts.unknown == (key,) and not (parts.pairs or parts.others or parts.lonely)


ENDINGS = [
    *(end for pair in PAIR_ENDINGS for end in pair),
    *(end for ends in OTHER_ENDINGS.values() for end in ends),
    MID, ALPHA, DORA_SCALE, NU, ".weight", "",
]  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(
    keys=st.lists(
        st.tuples(st.sampled_from(["a", "b.c", "x_lora", "", "."]), st.sampled_from(ENDINGS)),
        max_size=12,
    )
)
def test_every_key_has_exactly_one_place(keys: list[tuple[str, str]]):
    names = [name + end for name, end in keys]
    parts = parse_keys(names)
    others = [key for found in parts.others.values() for keys in found.values() for key in keys]
    pairs = [key for pair in parts.pairs for key in (pair.down, pair.up)]
    beside = {key for pair in parts.pairs for key in pair.keys} - set(pairs)
    placed = [*pairs, *others, *parts.lonely, *parts.unknown]
    assert set(placed) | beside == set(names)
    assert len(placed) == len(set(placed)) and not beside & set(placed) - set(others)


def test_no_ending_is_the_end_of_another():
    """So the first that is found, from the end of a key, is the only one."""
    known = ENDINGS[:-6]
    assert not [(a, b) for a in known for b in known if a != b and a.endswith(b)]
    assert max(end.count(".") for end in known) <= 3


def test_a_third_factor_belongs_to_its_convolution():
    keys = ("c.lora_down.weight", "c.lora_mid.weight", "c.lora_up.weight", "c.reshape_weight")
    [pair] = parse_keys(keys).pairs
    assert (pair.mid, pair.reshape, pair.alpha) == (keys[1], keys[3], None)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lora_unet_x_to_q", "lora_unet_x_to_q"),
        ("unet.down_blocks.1.attn1.to_q", "lora_unet_down_blocks_1_attn1_to_q"),
        ("unet.down_blocks.1.attn1.processor.to_out", "lora_unet_down_blocks_1_attn1_to_out_0"),
        ("base_model.model.unet.mid_block.x", "lora_unet_mid_block_x"),
        ("base_model.model.up_blocks.0.x", "lora_unet_up_blocks_0_x"),
        ("diffusion_model.input_blocks.4.x", "lora_unet_input_blocks_4_x"),
        ("text_encoder.text_model.x", "lora_te1_text_model_x"),
        ("text_encoder_2.text_model.x", "lora_te2_text_model_x"),
        ("transformer.blocks.0.x", "transformer.blocks.0.x"),
    ],
)
def test_names_in_kohya_s_way(name: str, key: str):
    assert kohya_name(name) == key


@pytest.mark.parametrize(
    ("diffusers", "sgm"),
    [
        ("down_blocks_1_attentions_0_proj_in", "input_blocks_4_1_proj_in"),
        ("down_blocks_2_attentions_1_x", "input_blocks_8_1_x"),
        ("down_blocks_0_resnets_1_conv1", "input_blocks_2_0_in_layers_2"),
        ("down_blocks_1_resnets_0_conv_shortcut", "input_blocks_4_0_skip_connection"),
        ("down_blocks_1_downsamplers_0_conv", "input_blocks_6_0_op"),
        ("mid_block_attentions_0_x", "middle_block_1_x"),
        ("mid_block_resnets_1_time_emb_proj", "middle_block_2_emb_layers_1"),
        ("up_blocks_0_attentions_2_x", "output_blocks_2_1_x"),
        ("up_blocks_1_resnets_0_conv2", "output_blocks_3_0_out_layers_3"),
        ("up_blocks_1_upsamplers_0_conv", "output_blocks_5_2_conv"),
        ("input_blocks_4_1_x", "input_blocks_4_1_x"),
    ],
)
def test_diffusers_blocks_of_sdxl_in_comfyui_s_names(diffusers: str, sgm: str):
    assert sgm_name(f"lora_unet_{diffusers}") == f"lora_unet_{sgm}"


def test_the_blocks_are_those_that_comfyui_itself_maps(comfyui):
    """Every name that ComfyUI knows for the layers of SDXL, norms too: they have differences."""
    import comfy.utils

    config = {
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    }  # fmt: skip
    checked = 0
    for diffusers, sgm in comfy.utils.unet_to_diffusers(config).items():
        if not diffusers.endswith(".weight") or diffusers.startswith("class_embedding"):
            continue  # SDXL has no classes
        if diffusers.startswith(("down_blocks.2.downsamplers", "up_blocks.2.upsamplers")):
            continue  # SDXL has none there
        key = "lora_unet_" + diffusers.removesuffix(".weight").replace(".", "_")
        assert sgm_name(key) == "lora_unet_" + sgm.removesuffix(".weight").replace(".", "_")
        checked += 1
    assert checked > 500
    assert plain_name("base_model.model.x") == "x"
