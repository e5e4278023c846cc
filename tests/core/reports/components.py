"""Components as files hold them: of a whole network, and of any name that a file may have."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from lora2_pack.lora2_core.lora_file import ComponentInfo

SDXL = (
    *(("input_blocks_4_1", 2), ("input_blocks_5_1", 2)),
    *(("input_blocks_7_1", 10), ("input_blocks_8_1", 10), ("middle_block_1", 10)),
    *(("output_blocks_0_1", 10), ("output_blocks_1_1", 10), ("output_blocks_2_1", 10)),
    *(("output_blocks_3_1", 2), ("output_blocks_4_1", 2), ("output_blocks_5_1", 2)),
)
LAYERS = ("to_q", "to_k", "to_v", "to_out_0")


def component(key: str, rank: int = 8) -> ComponentInfo:
    return ComponentInfo(key, rank, 640, 320, 0.1, 2 * rank * 960)


def network(blocks, rank: Callable[[int], int] = lambda index: 8) -> list[ComponentInfo]:
    """Attention components in ComfyUI's naming; ``rank`` maps the running index to a rank."""
    keys = [
        f"lora_unet_{name}_transformer_blocks_{block}_attn{kind}_{layer}"
        for name, depth in blocks
        for block in range(depth)
        for kind in (1, 2)
        for layer in LAYERS
    ]
    return [component(key, rank(index)) for index, key in enumerate(keys)]


_numbers = st.integers(0, 12)
_attention = st.builds(
    lambda stage, a, b, block, kind, layer: (
        f"lora_unet_{stage}_{a}_{b}_transformer_blocks_{block}_attn{kind}_{layer}"
    ),
    st.sampled_from(["input_blocks", "output_blocks", "middle_block"]),
    *(_numbers, _numbers, st.integers(0, 200), st.integers(1, 2), st.sampled_from(LAYERS)),
)
_diffusers = st.builds(
    lambda stage, a, b, block, layer: (
        f"lora_unet_{stage}_{a}_attentions_{b}_transformer_blocks_{block}_attn1_{layer}"
    ),
    st.sampled_from(["down_blocks", "up_blocks"]),
    *(_numbers, _numbers, _numbers, st.sampled_from(LAYERS)),
)
_others = st.builds(
    lambda prefix, index, tail: f"{prefix}_{index}_{tail}",
    st.sampled_from(["lora_te1_layers", "lora_te2_layers", "lora_unet_input_blocks"]),
    _numbers,
    st.sampled_from(["mlp_fc1", "ff_net_0_proj", "proj_in", "conv1", "time_emb_proj", "x"]),
)
anything = st.lists(
    st.builds(
        component,
        _attention | _diffusers | _others | st.text(max_size=90),
        st.integers(0, 40) | st.integers(0, 10**6),
    ),
    max_size=60,
)
