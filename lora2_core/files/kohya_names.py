"""One name for one layer: kohya keys for what trainers call by other names.

Two LoRAs can only be added, and a file only be of our format, where the same layer has the same
key. Names are translated, weights are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .keys import ParsedKeys, plain_name

_PREFIXES = (  # of dotted names, the longer first
    ("text_encoder_2.", "lora_te2_"),
    ("text_encoder.", "lora_te1_"),
    ("diffusion_model.", "lora_unet_"),
    ("unet.", "lora_unet_"),
)
_BLOCKS = re.compile(
    r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]"
)
_DIFFUSERS = re.compile(r"^lora_unet_(down_blocks|up_blocks|mid_block)_")
_SGM = re.compile(r"^lora_unet_(input_blocks|output_blocks|middle_block)_")
_OF_SDXL = "_transformer_blocks_9_"  # no smaller relative has so many
_PLACES = (
    (r"^down_blocks_(\d)_(resnets|attentions)_(\d)_", "input_blocks_{n}_{part}_"),
    (r"^up_blocks_(\d)_(resnets|attentions)_(\d)_", "output_blocks_{n}_{part}_"),
)
_OTHERS = {
    "mid_block_resnets_0_": "middle_block_0_",
    "mid_block_attentions_0_": "middle_block_1_",
    "mid_block_resnets_1_": "middle_block_2_",
    "down_blocks_0_downsamplers_0_conv": "input_blocks_3_0_op",
    "down_blocks_1_downsamplers_0_conv": "input_blocks_6_0_op",
    "up_blocks_0_upsamplers_0_conv": "output_blocks_2_2_conv",
    "up_blocks_1_upsamplers_0_conv": "output_blocks_5_2_conv",
}
_OUTSIDE = {  # of all blocks
    "conv_in": "input_blocks_0_0", "conv_norm_out": "out_0", "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0", "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2",
}  # fmt: skip
_IN_RESNETS = {
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}


def kohya_name(name: str) -> str:
    """The kohya key of a component: ``unet.down_blocks.…to_q`` → ``lora_unet_down_blocks_…_to_q``.

    A name with a prefix that kohya has none for stays as it is; stock loaders know it so.
    """
    name = plain_name(name).removeprefix("model.")  # of a whole checkpoint
    if name.startswith("lycoris_"):  # with and without the network's own prefix
        rest = name.removeprefix("lycoris_")
        name = f"lora_unet_{rest}" if _BLOCKS.match(rest) else f"lora_{rest}"
    if name.startswith("oft_unet_"):  # kohya's own OFT
        name = "lora" + name.removeprefix("oft")
    if re.match(r"lora_(unet|te[12]?)[._]", name):
        return _of_text(name.replace(".", "_"))
    if name.startswith("lora_"):
        return name
    if _BLOCKS.match(name):  # PEFT on a U-Net by itself
        name = f"unet.{name}"
    for prefix, key in _PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix).replace(".processor.", ".")
            rest = re.sub(r"\.to_out$", ".to_out.0", rest)
            return _of_text(key + rest.replace(".", "_"))
    return name


def changed_twice(parsed: ParsedKeys) -> tuple[str, str] | None:
    """Keys of two changes of one weight, by whatever names; None where there is none."""
    seen: dict[tuple[str, bool], str] = {}
    for name, of_bias, keys in parsed.changes():
        whole = sgm_name(kohya_name(name.removesuffix(".bias")))
        other = seen.setdefault((whole, of_bias or name.endswith(".bias")), keys[0])
        if other != keys[0]:
            return other, keys[0]
    return None


def _of_text(key: str) -> str:
    """A kohya key of a text encoder by the names that its layers had before transformers 5, and in
    diffusers since it trains them by PEFT."""
    if key.startswith("lora_te"):
        key = re.sub(r"^(lora_te[12]?)_encoder_layers_", r"\1_text_model_encoder_layers_", key)
        key = re.sub(r"_self_attn_to_(q|k|v|out)(_0)?$", r"_self_attn_\1_proj", key)
    return key


def in_one_style(files: dict[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """Kohya keys of several files → the key that they have in a sum.

    Where one file names blocks as diffusers does and another as ComfyUI does, those of diffusers
    are translated; this is sure for SDXL alone. Raises ValueError for another model.
    """
    keys = {file: list(names) for file, names in files.items()}
    diffusers = [file for file, names in keys.items() if any(map(_DIFFUSERS.match, names))]
    mixed = diffusers and any(_SGM.match(name) for names in keys.values() for name in names)
    if not mixed:
        return {file: {name: name for name in names} for file, names in keys.items()}
    everything = [name for names in keys.values() for name in names]
    if not any(_OF_SDXL in name for name in everything):
        raise ValueError(
            f"{diffusers[0]} names its layers as diffusers does and another file as ComfyUI does; "
            "for models other than SDXL it is not sure which are the same."
        )
    return {file: {name: sgm_name(name) for name in names} for file, names in keys.items()}


def sgm_name(key: str) -> str:
    """A kohya key of SDXL in ComfyUI's names: ``…down_blocks_1_attentions_0_…`` →
    ``…input_blocks_4_1_…``. What is not in diffusers' names stays as it is."""
    rest = key.removeprefix("lora_unet_")
    if key != rest and rest in _OUTSIDE:
        return f"lora_unet_{_OUTSIDE[rest]}"
    if not _DIFFUSERS.match(key):
        return key
    for start, new in _OTHERS.items():
        if rest.startswith(start):
            return "lora_unet_" + new + _inner(rest.removeprefix(start), "resnets" in start)
    for pattern, place in _PLACES:
        match = re.match(pattern, rest)
        if match is None:
            continue
        block, kind, index = int(match[1]), match[2], int(match[3])
        first = 1 if rest.startswith("down") else 0
        new = place.format(n=first + 3 * block + index, part=0 if kind == "resnets" else 1)
        return "lora_unet_" + new + _inner(rest[match.end() :], kind == "resnets")
    return key


def _inner(rest: str, of_a_resnet: bool) -> str:
    return _IN_RESNETS.get(rest, rest) if of_a_resnet else rest
