"""Where a component stands in the rank map, by its name."""

from __future__ import annotations

import pytest
from lora2_pack.lora2_core.files.places import (
    Place,
    group_label,
    kind_of,
    parse_attention,
    sort_components,
)
from lora2_pack.lora2_core.files.read import ComponentInfo


@pytest.mark.parametrize(
    ("key", "group", "block", "column", "label"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", (0, 4, 1), 0, 0, "down 4.1"),
        ("lora_unet_middle_block_1_transformer_blocks_9_attn2_to_v", (1, 0, 1), 9, 6, "mid"),
        (
            "lora_unet_output_blocks_0_1_transformer_blocks_3_attn2_to_out_0",
            (2, 0, 1),
            3,
            7,
            "up 0.1",
        ),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_k",
            *((0, 1, 0), 1, 1, "down 1.0"),
        ),
        (
            "lora_unet_mid_block_attentions_0_transformer_blocks_2_attn1_to_out_0",
            (1, 0, 0),
            2,
            3,
            "mid",
        ),
        (
            "unet.up_blocks.0.attentions.2.transformer_blocks.5.attn2.to_q",
            (2, 0, 2),
            5,
            4,
            "up 0.2",
        ),
    ],
)
def test_attention_keys_in_both_namings_have_a_place(key, group, block, column, label):
    assert parse_attention(key) == Place((group, block), column)
    assert group_label(group) == label


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "Text encoder 1"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "Text encoder 1"),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc2", "Text encoder 2"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj", "Feed-forward"),
        ("lora_unet_input_blocks_4_1_proj_in", "Projections"),
        ("lora_unet_input_blocks_4_0_in_layers_2", "Convolutions"),
        ("lora_unet_down_blocks_0_resnets_1_conv1", "Convolutions"),
        ("lora_unet_down_blocks_0_resnets_1_time_emb_proj", "Embeddings"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Other attention"),
        ("something else", "Other"),
    ],
)
def test_what_is_not_in_the_grid_has_a_kind(key, kind):
    assert parse_attention(key) is None
    assert kind_of(key) == kind


def test_names_with_more_digits_than_a_number_has():
    digits = "7" * 5000
    block = f"lora_unet_input_blocks_4_1_transformer_blocks_{digits}_attn1_to_q"
    assert parse_attention(block) is None
    keys = (f"lora_unet_{digits}", block)
    components = [ComponentInfo(key, 1, 4, 4, None, 16) for key in keys]
    _, rest = sort_components(components)
    assert sum(map(len, rest.values())) == 2
