"""Which family of models a LoRA was made for, told by its names and shapes, and what misfits.

Shapes come first, since they decide; what the metadata claims counts where shapes are silent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from .header import shown_keys

# Width of the text that cross-attention reads → whose it is.
FAMILY_OF_CONTEXT = {768: "SD 1.5", 1024: "SD 2", 2048: "SDXL", 1280: "the SDXL refiner"}
_UNET = re.compile(r"^(?!lora_prior_)(.*[._])?(input|output|middle|down|up|mid)_blocks?[._]")
_CROSS = re.compile(r"attn2[._](processor[._])?to_[kv](_lora)?$")
_DEEP = re.compile(r"[._]transformer_blocks[._][4-9][._]")  # only SDXL has so many in a row
# Names, and widths where names alone are not sure, that only these families have. Of several the
# metadata may choose, else it is the first; the first line that fits counts.
_BY_NAME = tuple(
    (re.compile(pattern), widths, families)
    for pattern, widths, families in (
        (r"lora_prior_(unet|te)_", (), ("Stable Cascade",)),
        (r"(double|single)_stream_blocks[._]", (), ("HiDream",)),
        (r"distilled_guidance_layer", (), ("Chroma",)),
        (r"token_refiner[._](blocks|refiner_blocks)[._]", (), ("Hunyuan Video",)),
        (r"double_blocks[._]\d+[._](img|txt)_mlp[._]fc[12]", (), ("Hunyuan Video",)),
        (r"attn[._]to_qkv_mlp_proj", (), ("Flux 2",)),
        (r"double_blocks[._]\d+[._](img|txt)_attn[._]qkv", (6144,), ("Flux 2",)),
        (r"single_blocks[._]\d+[._]linear1", (6144,), ("Flux 2",)),
        (r"single_(transformer_)?blocks[._]3[89][._]", (), ("Hunyuan Video",)),  # Flux has 38
        (r"double_blocks[._](19|[2-9]\d)[._]", (), ("Hunyuan Video",)),  # Flux has 19
        (
            r"(double|single)_blocks[._]\d|single_transformer_blocks[._]\d", (),
            ("Flux", "Flux 2", "Chroma", "Hunyuan Video"),
        ),
        (r"img_mlp[._]net|(img|txt)_mod[._]1\b", (), ("Qwen-Image",)),
        (r"joint_transformer_blocks[._]|(double|single)_layers[._]\d", (), ("AuraFlow",)),
        (r"joint_blocks[._]\d", (), ("SD3",)),
        (r"transformer_blocks.{1,9}attn[._]add_[qkv]_proj", (1536, 2432), ("SD3",)),
        (r"transformer_blocks[._](19|[2-9]\d)[._]attn[._]add_[qkv]", (3072,), ("Qwen-Image",)),
        (r"transformer_blocks.{1,9}attn[._]add_[qkv]_proj", (), ("", "Flux", "Qwen-Image")),
        (r"(^|\.|_)blocks[._]\d+[._](self|cross)_attn[._][qkvo]\b", (), ("Wan",)),
        (r"blocks[._]\d+[._]cross_attn[._](q|kv)_linear", (), ("PixArt",)),
        (r"blocks[._]\d+[._]attn1[._]Wqkv", (), ("Hunyuan DiT",)),
        (r"blocks[._]\d+[._]attn[._]qkv_[xy]\b", (), ("Mochi",)),
        (r"(layers|refiner)[._]\d+[._]attention[._](qkv|to_[qkv])\b", (2304,), ("Lumina 2",)),
        (r"(layers|refiner)[._]\d+[._]attention[._](qkv|to_[qkv])\b", (3840,), ("Z-Image",)),
        (
            r"(noise|context)_refiner[._]\d+[._](attention|feed_forward)", (),
            ("Lumina 2 or Z-Image", "Lumina 2", "Z-Image"),
        ),
        (r"transformer_blocks[._]\d+[._]attn1[._]to_q", (1152,), ("PixArt",)),
        (r"transformer_blocks[._]\d+[._]attn1[._]to_q", (2048, 4096), ("LTX-Video",)),
    )
)  # fmt: skip
_BY_METADATA = (
    (r"cascade", "Stable Cascade"), (r"flux[-_. ]?2", "Flux 2"), (r"flux", "Flux"),
    (r"chroma", "Chroma"), (r"stable-diffusion-v?3|\bsd_?v?3", "SD3"), (r"\bwan", "Wan"),
    (r"qwen", "Qwen-Image"), (r"hunyuan[-_ ]?video", "Hunyuan Video"),
    (r"z[-_ ]?image", "Z-Image"), (r"lumina", "Lumina 2"), (r"pixart", "PixArt"),
    (r"(stable-diffusion-xl|sdxl).*refiner", "the SDXL refiner"),
    (r"stable-diffusion-xl|\bsdxl", "SDXL"), (r"stable-diffusion-v2|\bsd_?v?2", "SD 2"),
    (r"stable-diffusion-v1|\bsd_?v?1", "SD 1.5"),
)  # fmt: skip
# What else people keep as safetensors, told by its keys; and where it belongs.
_NO_LORAS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"^lora_controlnet$", "a Control-LoRA; load it with Load ControlNet Model"),
        (r"^(control_model|controlnet_\w+|zero_convs|input_hint_block|controlnet_cond_embedding)\.",
         "a ControlNet; load it with Load ControlNet Model"),
        (r"(^|\.)motion_modules?\.", "a motion module (AnimateDiff); load it with the nodes of its "
         "pack"),
        (r"^(ip_adapter|image_proj)\.", "an IP-Adapter; load it with the nodes of its pack"),
        (r"^(emb_params|clip_[lg]|string_to_param(\..*)?|\*|<[^>]*>)$",
         "a textual inversion (embedding); put it into models/embeddings and write embedding:name "
         "in the prompt"),
        (r"\.(oft_[rR]|boft_[RS])\b",
         "an OFT as PEFT and OneTrainer write it, which is not read here; choose a LoRA"),
        (r"\.(vera_lambda_[bd]|hra_u|fourierft_spectrum|bone_block|miss_block|c3a_kernel"
         r"|shira_weight|randlora_(lambda|gamma)|road_(theta|alpha))\b",
         "another adapter of PEFT's (VeRA, HRA, FourierFT, …), which is not read here; choose a "
         "LoRA"),
        (r"(^|\.)ia3_l|\.on_input$", "an IA³, which has no factors and is not read here"),
        (r"^(model\.diffusion_model|first_stage_model|conditioner|cond_stage_model)\.",
         "a checkpoint, a whole model; load it with Load Checkpoint"),
        (r"^(input_blocks\.\d|down_blocks\.\d|double_blocks\.\d|joint_blocks\.\d|blocks\.\d"
         r"|transformer_blocks\.\d|diffusion_model\.)",
         "a diffusion model; load it with Load Diffusion Model"),
        (r"^bundle_emb\.",
         "embeddings alone, as they are bundled with a LoRA; put it into models/embeddings and "
         "write embedding:name in the prompt"),
        (r"^(encoder|decoder)\.(conv_in|down|up|mid)", "a VAE; load it with Load VAE"),
        (r"^(text_model|transformer\.text_model|encoder\.block|model\.layers|shared)\b",
         "a text encoder; load it with Load CLIP"),
    )
)  # fmt: skip
_NAMES_OF_METADATA = ("modelspec.architecture", "ss_base_model_version")
_MOST_NAMES, _LONGEST = 5000, 300  # more is no LoRA's; a stranger may write anything


@dataclass(frozen=True)
class Family:
    """A family of models, of one architecture; an empty name is an unknown one."""

    name: str = ""
    context: int | None = None  # width of the text that its cross-attention reads

    @property
    def text(self) -> str:
        """``SD 1.5 (context 768)``."""
        name = self.name or "an unknown model"
        return f"{name} (context {self.context})" if self.context else name


def guess_family(inputs: Mapping[str, int], metadata: Mapping[str, str]) -> Family:
    """The family that a LoRA was trained on; where neither names nor metadata are sure, none.

    ``inputs``: the input width of each component by its name in the file, 0 where it is unknown.
    """
    width_of = {name[:_LONGEST]: width for name, width in islice(inputs.items(), _MOST_NAMES)}
    claimed = _claimed(metadata)
    of_unet = [name for name in width_of if _UNET.search(name)]
    for name in of_unet:
        if width_of[name] and _CROSS.search(name):
            return Family(FAMILY_OF_CONTEXT.get(width_of[name], ""), width_of[name])
    if any(map(_DEEP.search, of_unet)):
        return Family("SDXL", 2048)
    if not of_unet:
        for pattern, widths, families in _BY_NAME:
            if any(pattern.search(n) and (not widths or w in widths) for n, w in width_of.items()):
                return Family(claimed if claimed in families else families[0])
    return Family(claimed)


def other_than_a_lora(keys: Iterable[str]) -> str:
    """What a file without a LoRA is, and what to do with it; empty where its keys do not tell."""
    first = [key[:_LONGEST] for key in islice(keys, _MOST_NAMES)]
    found = (what for pattern, what in _NO_LORAS if any(map(pattern.search, first)))
    return next(found, "")


def misfit(source: str, made_for: Family, model: Family) -> str:
    """One sentence for a LoRA that fits no layer of a model, or layers of another shape."""
    other_text = made_for.context and model.context and made_for.context != model.context
    if made_for.name and (made_for.name != model.name or other_text):
        why = f"{source} was made for {made_for.text}, this model is {model.text}"
    elif made_for.context and made_for.context != model.context:
        width = made_for.context
        why = f"{source} was made for a text of width {width}, this model is {model.text}"
    else:
        why = f"{source} was made for another architecture than this model, {model.text}"
    return f"{why}; choose a LoRA for this model."


def unknown_components(source: str, names: Iterable[str], count: int) -> str:
    """One sentence for components that a model has no layer for; empty when there are none."""
    unknown = sorted(names)
    if not unknown:
        return ""
    return f"{source}: {len(unknown)} of {count} components unknown: {shown_keys(unknown)}."


def _claimed(metadata: Mapping[str, str]) -> str:
    """The family that the metadata names; empty when it names none."""
    words = " ".join(metadata.get(name, "")[:_LONGEST] for name in _NAMES_OF_METADATA).lower()
    for pattern, family in _BY_METADATA:
        if re.search(pattern, words):
            return family
    return "SD 2" if metadata.get("ss_v2") == "True" else ""
