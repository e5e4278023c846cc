"""Every trainer's names are told apart by their endings."""

from __future__ import annotations

import pytest
from lora2_pack.lora2_core import lora_keys, lora_names
from lora2_pack.lora2_core.lora_keys import PAIR_ENDINGS, Pair, split


@pytest.mark.parametrize(("down", "up"), PAIR_ENDINGS)
def test_two_factors_of_every_naming(down: str, up: str):
    parts = split([f"x.y{up}", f"x.y{down}", "x.y.alpha", "x.y.dora_scale"])
    assert parts.pairs == (
        Pair("x.y", f"x.y{down}", f"x.y{up}", None, "x.y.alpha", "x.y.dora_scale"),
    )
    assert not (parts.others or parts.lonely or parts.unknown)
    assert set(parts.pairs[0].keys) == {f"x.y{down}", f"x.y{up}", "x.y.alpha", "x.y.dora_scale"}


def test_other_kinds_and_what_is_unknown():
    keys = [
        "a.hada_w1_a", "a.hada_w1_b", "a.hada_w2_a", "a.hada_w2_b", "a.alpha", "b.lokr_w1",
        "b.lokr_w2_a", "b.lokr_w2_b", "c.a1.weight", "d.oft_blocks", "e.diff", "e.diff_b",
        "f.w_norm",        "g.lora_up.weight", "h.weight", "bundle_emb.x.string_to_param.*",
    ]  # fmt: skip
    parts = split(keys)
    assert {kind: list(found) for kind, found in parts.others.items()} == {
        "loha": ["a"], "lokr": ["b"], "glora": ["c"], "oft": ["d"], "difference": ["e"],
        "norm": ["f"],
    }  # fmt: skip
    assert parts.others["loha"]["a"] == (*keys[:4], "a.alpha")
    assert parts.lonely == ("g.lora_up.weight",)
    assert parts.unknown == ("h.weight", "bundle_emb.x.string_to_param.*")


def test_a_third_factor_belongs_to_its_convolution():
    keys = ("c.lora_down.weight", "c.lora_mid.weight", "c.lora_up.weight", "c.reshape_weight")
    [pair] = split(keys).pairs
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
    assert lora_names.kohya_name(name) == key


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
    assert lora_names.sgm_name(f"lora_unet_{diffusers}") == f"lora_unet_{sgm}"


def test_the_blocks_are_those_that_comfyui_itself_maps(comfyui):
    """Every name that ComfyUI knows for the convolutions and transformers of SDXL."""
    import comfy.utils

    config = {
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    }  # fmt: skip
    checked = 0
    for diffusers, sgm in comfy.utils.unet_to_diffusers(config).items():
        in_a_block = diffusers.startswith(("down_blocks", "up_blocks", "mid_block"))
        if not diffusers.endswith(".weight") or not in_a_block:
            continue
        if "norm" in diffusers.split(".")[-2] and "transformer_blocks" not in diffusers:
            continue  # no LoRA of two factors is of a norm
        if diffusers.startswith(("down_blocks.2.downsamplers", "up_blocks.2.upsamplers")):
            continue  # SDXL has none there
        key = "lora_unet_" + diffusers.removesuffix(".weight").replace(".", "_")
        assert lora_names.sgm_name(key) == "lora_unet_" + sgm.removesuffix(".weight").replace(
            ".", "_"
        )
        checked += 1
    assert checked > 500
    assert lora_keys.plain_name("base_model.model.x") == "x"
