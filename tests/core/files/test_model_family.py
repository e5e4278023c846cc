"""What a file was made for: told by the names that trainers of each family write."""

from __future__ import annotations

import time

import pytest
from lora2_pack.lora2_core.files.model_family import (
    Family,
    guess_family,
    misfit,
    unknown_components,
)

UNET = "lora_unet_input_blocks_4_1_transformer_blocks_0_"
DIFFUSERS = "unet.down_blocks.1.attentions.0.transformer_blocks.0."


@pytest.mark.parametrize(
    ("names", "family"),
    [
        # U-Nets: the text that cross-attention reads
        ({UNET + "attn1_to_k": 640, UNET + "attn2_to_k": 2048}, "SDXL (context 2048)"),
        ({UNET + "attn2_to_k": 768}, "SD 1.5 (context 768)"),
        ({UNET + "attn2_to_k": 1024}, "SD 2 (context 1024)"),
        ({UNET + "attn2_to_k": 192}, "an unknown model (context 192)"),
        ({DIFFUSERS + "attn2.to_v": 768}, "SD 1.5 (context 768)"),
        ({"unet.down_blocks.1.attentions.0.attn2.to_v": 2048}, "SDXL (context 2048)"),
        ({"unet.down_blocks.1.attentions.0.attn2.processor.to_k": 768}, "SD 1.5 (context 768)"),
        ({DIFFUSERS + "attn2.processor.to_k_lora": 1024}, "SD 2 (context 1024)"),
        ({"base_model.model.up_blocks.1.x.attn2.to_k": 1280}, "the SDXL refiner (context 1280)"),
        ({"lora_unet_mid_block_attentions_0_x_attn2_to_k": 999}, "an unknown model (context 999)"),
        ({"lora_unet_mid_block_attentions_0_transformer_blocks_9_attn1_to_q": 1280},
         "SDXL (context 2048)"),
        ({UNET + "attn1_to_q": 320}, "an unknown model"),
        ({UNET + "attn2_to_k": 0}, "an unknown model"),  # of a kind that does not tell its width
        # Transformers: names
        ({"lora_unet_double_blocks_3_img_attn_qkv": 3072}, "Flux"),
        ({"lora_unet_double_blocks_0_img_attn_qkv": 3072}, "Flux"),
        ({"lora_unet_single_blocks_37_linear1": 3072}, "Flux"),
        ({"transformer.single_transformer_blocks.0.attn.to_q": 3072}, "Flux"),
        ({"transformer.single_transformer_blocks.37.attn.to_q": 3072}, "Flux"),
        ({"lora_transformer_single_transformer_blocks_0_proj_mlp": 3072}, "Flux"),
        ({"diffusion_model.double_blocks.0.img_attn.qkv": 6144}, "Flux 2"),
        ({"transformer.single_transformer_blocks.47.attn.to_qkv_mlp_proj": 6144}, "Flux 2"),
        ({"diffusion_model.distilled_guidance_layer.layers.0.in_layer": 5120}, "Chroma"),
        ({"lora_unet_double_blocks_19_img_attn_qkv": 3072}, "Hunyuan Video"),
        ({"lora_unet_single_blocks_39_linear1": 3072}, "Hunyuan Video"),
        ({"transformer.double_blocks.0.img_mlp.fc1": 3072}, "Hunyuan Video"),
        ({"lora_unet_txt_in_individual_token_refiner_blocks_0_mlp_fc1": 3072}, "Hunyuan Video"),
        ({"diffusion_model.joint_blocks.0.x_block.attn.qkv": 1536}, "SD3"),
        ({"transformer.transformer_blocks.3.attn.add_k_proj": 2432}, "SD3"),
        ({"transformer.transformer_blocks.0.attn.add_q_proj": 1536}, "SD3"),
        ({"transformer_blocks.0.img_mlp.net.2": 12288}, "Qwen-Image"),
        ({"lora_unet_transformer_blocks_0_img_mod_1": 3072}, "Qwen-Image"),
        ({"transformer.transformer_blocks.59.attn.add_q_proj": 3072}, "Qwen-Image"),
        ({"transformer.transformer_blocks.7.attn.add_q_proj": 3072}, "an unknown model"),
        ({"lora_unet_blocks_0_cross_attn_k": 5120}, "Wan"),
        ({"lora_unet__blocks_0_self_attn_q": 1536}, "Wan"),
        ({"diffusion_model.blocks.39.self_attn.o": 5120}, "Wan"),
        ({"diffusion_model.blocks.0.self_attn.q": 1536}, "Wan"),
        ({"diffusion_model.blocks.0.self_attn.q_proj": 2048}, "an unknown model"),  # Cosmos
        ({"diffusion_model.layers.0.attention.qkv": 2304}, "Lumina 2"),
        ({"diffusion_model.layers.29.attention.to_q": 3840}, "Z-Image"),
        ({"lora_unet_noise_refiner_0_feed_forward_w1": 9216}, "Lumina 2 or Z-Image"),
        ({"lora_te2_layers_0_self_attn_q_proj": 2304}, "an unknown model"),
        ({"base_model.model.transformer_blocks.0.attn1.to_q": 1152}, "PixArt"),
        ({"diffusion_model.blocks.0.cross_attn.kv_linear": 1152}, "PixArt"),
        ({"diffusion_model.transformer_blocks.0.attn1.to_q": 2048,
          "diffusion_model.transformer_blocks.0.attn2.to_k": 2048}, "LTX-Video"),
        ({"base_model.model.blocks.0.attn1.Wqkv": 1408}, "Hunyuan DiT"),
        ({"diffusion_model.blocks.0.attn.qkv_x": 3072}, "Mochi"),
        ({"transformer.double_stream_blocks.0.block.attn1.to_q": 2560}, "HiDream"),
        ({"transformer.joint_transformer_blocks.0.attn.to_q": 3072}, "AuraFlow"),
        ({"lora_prior_unet_down_blocks_0_0_channelwise_0": 2048}, "Stable Cascade"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1": 768}, "an unknown model"),
        ({"x": 3}, "an unknown model"),
        ({}, "an unknown model"),
    ],
)  # fmt: skip
def test_by_names_and_widths(names: dict[str, int], family: str):
    assert guess_family(names, {}).text == family


ARCHITECTURE, VERSION = "modelspec.architecture", "ss_base_model_version"


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({ARCHITECTURE: "stable-diffusion-v1/lora"}, "SD 1.5"),
        ({ARCHITECTURE: "stable-diffusion-v2-768-v/lora"}, "SD 2"),
        ({ARCHITECTURE: "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
        ({ARCHITECTURE: "stable-diffusion-xl-v1-refiner"}, "the SDXL refiner"),
        ({ARCHITECTURE: "stable-diffusion-3-medium/lora"}, "SD3"),
        ({ARCHITECTURE: "stable-diffusion-v3-medium"}, "SD3"),
        ({ARCHITECTURE: "flux-1-dev/lora"}, "Flux"),
        ({ARCHITECTURE: "Flux.2-dev/lora"}, "Flux 2"),
        ({ARCHITECTURE: "hunyuan-video/lora"}, "Hunyuan Video"),
        ({ARCHITECTURE: "lumina-2"}, "Lumina 2"), ({ARCHITECTURE: "pixart-sigma"}, "PixArt"),
        ({VERSION: "sd_v1"}, "SD 1.5"), ({VERSION: "sd_v2"}, "SD 2"), ({VERSION: "sdxl_"}, "SDXL"),
        ({VERSION: "sdxl_base_v1-0"}, "SDXL"), ({VERSION: "sd3"}, "SD3"),
        ({VERSION: "flux1"}, "Flux"), ({VERSION: "wan2.1"}, "Wan"), ({VERSION: "taiwan"}, ""),
        ({VERSION: "qwen_image"}, "Qwen-Image"), ({VERSION: "zimage_turbo"}, "Z-Image"),
        ({"ss_v2": "True"}, "SD 2"), ({"ss_v2": "False"}, ""), ({VERSION: ""}, ""), ({}, ""),
    ],
)  # fmt: skip
def test_the_metadata_counts_where_names_are_silent(metadata: dict[str, str], family: str):
    assert guess_family({"x": 3}, metadata).name == family
    assert guess_family({UNET + "attn2_to_k": 768}, metadata).name == "SD 1.5"
    assert guess_family({UNET + "attn2_to_k": 2048}, metadata).text == "SDXL (context 2048)"
    assert guess_family({"blocks.0.self_attn.q": 1536}, metadata).name == "Wan"


@pytest.mark.parametrize(
    ("name", "width", "claimed", "family"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, "chroma", "Chroma"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, "hunyuan-video", "Hunyuan Video"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, "sdxl_", "Flux"),
        ("transformer_blocks.7.attn.add_q_proj", 3072, "qwen-image", "Qwen-Image"),
        ("transformer_blocks.7.attn.add_q_proj", 3072, "flux-1-dev", "Flux"),
        ("noise_refiner.0.feed_forward.w1", 10240, "z-image", "Z-Image"),
    ],
)
def test_the_metadata_chooses_among_families_of_the_same_names(name, width, claimed, family):
    assert guess_family({name: width}, {ARCHITECTURE: claimed}).name == family


def test_a_stranger_s_names_take_no_time():
    """No pattern looks twice at the same letters."""
    started = time.monotonic()
    for part in ("transformer_blocks.", "double_blocks_1_", "down_blocks.", "a_", "."):
        assert guess_family({part * 400_000: 1}, {}) is not None
        assert guess_family({f"{part}{n}": 1 for n in range(50_000)}, {}) is not None
        guess_family({"x": 1}, {ARCHITECTURE: part * 400_000, VERSION: "sdxl" * 400_000})
    assert time.monotonic() - started < 3


# --- the sentences ----------------------------------------------------------------------------

SDXL = Family("SDXL", 2048)


@pytest.mark.parametrize(
    ("made", "model", "why"),
    [
        (Family("SD 1.5", 768), SDXL,
         "was made for SD 1.5 (context 768), this model is SDXL (context 2048)"),
        (Family("Flux"), SDXL, "was made for Flux, this model is SDXL (context 2048)"),
        (SDXL, Family("SDXL", 192),
         "was made for SDXL (context 2048), this model is SDXL (context 192)"),
        (Family("SDXL"), SDXL,
         "was made for another architecture than this model, SDXL (context 2048)"),
        (SDXL, SDXL, "was made for another architecture than this model, SDXL (context 2048)"),
        (Family("Wan"), Family("Wan"),
         "was made for another architecture than this model, Wan"),
        (Family("", 192), SDXL,
         "was made for a text of width 192, this model is SDXL (context 2048)"),
        (Family("", 999), SDXL,
         "was made for a text of width 999, this model is SDXL (context 2048)"),
        (Family(), SDXL,
         "was made for another architecture than this model, SDXL (context 2048)"),
        (Family("Flux"), Family(), "was made for Flux, this model is an unknown model"),
    ],
)  # fmt: skip
def test_why_it_does_not_fit(made: Family, model: Family, why: str):
    assert misfit("x.safetensors", made, model) == (
        f"x.safetensors {why}; choose a LoRA for this model."
    )


def test_components_that_the_model_lacks():
    assert unknown_components("x", [], 560) == ""
    assert unknown_components("x", ["b", "a"], 560) == "x: 2 of 560 components unknown: a, b."
    assert unknown_components("x", "dcba", 560) == "x: 4 of 560 components unknown: a, b, c, …."
    hostile = unknown_components("x", ["a\n\x1b[2J" + "y" * 9999], 1)
    assert hostile.isprintable() and len(hostile) < 120
