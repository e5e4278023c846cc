"""What a LoRA file was made for, told by its names and shapes, and why it does not fit a model.

Shapes come first, since they decide; what the metadata claims counts where shapes are silent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Width of the text that cross-attention reads → whose it is.
_BY_CONTEXT = {768: "SD 1.5", 1024: "SD 2", 2048: "SDXL", 1280: "the SDXL refiner"}
_CROSS = re.compile(
    r"attn2[._](processor[._])?to_[kv]\b|attn2[._](processor[._])?to_[kv]_?(lora)?$"
)
# Names that only one family has; the first that is found counts.
_BY_NAME = (
    (r"single_transformer_blocks|double_blocks.*(img|txt)_attn_qkv|single_blocks", "Flux"),
    (r"joint_blocks|transformer_blocks.*attn[._]add_[qkv]_proj", "SD3"),
    (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn)[._][qkvo]\b", "Wan"),
    (r"(^|[._])img_mlp[._]net|transformer_blocks.*img_mod", "Qwen-Image"),
    (r"noise_refiner|context_refiner", "Lumina or Z-Image"),
    (r"lora_prior_unet|lora_prior_te", "Stable Cascade"),
)
_BY_METADATA = (
    (r"flux", "Flux"), (r"stable-diffusion-3|sd3", "SD3"), (r"wan", "Wan"), (r"qwen", "Qwen-Image"),
    (r"stable-diffusion-xl|sdxl", "SDXL"), (r"stable-diffusion-v2|sd_v?2", "SD 2"),
    (r"stable-diffusion-v1|sd_v?1", "SD 1.5"),
)  # fmt: skip
_NAMES_OF_METADATA = ("modelspec.architecture", "ss_base_model_version")


@dataclass(frozen=True)
class Architecture:
    """A family of models; an empty name is an unknown one."""

    name: str = ""
    context: int | None = None  # width of the text that its cross-attention reads

    @property
    def text(self) -> str:
        """``SD 1.5 (context 768)``."""
        name = self.name or "an unknown model"
        return f"{name} (context {self.context})" if self.context else name


def made_for(inputs: Mapping[str, int], metadata: Mapping[str, str]) -> Architecture:
    """The family that a LoRA was trained on.

    ``inputs``: the input width of each component by its name in the file.
    """
    for name, width in inputs.items():
        if _CROSS.search(name):
            return Architecture(_BY_CONTEXT.get(width, ""), width)
    for pattern, family in _BY_NAME:
        if any(re.search(pattern, name) for name in inputs):
            return Architecture(family)
    claimed = " ".join(metadata.get(name, "") for name in _NAMES_OF_METADATA).lower()
    for pattern, family in _BY_METADATA:
        if re.search(pattern, claimed):
            return Architecture(family)
    return Architecture()


def misfit(source: str, made: Architecture, model: Architecture) -> str:
    """One sentence for a LoRA that fits no layer of a model, or layers of another shape."""
    if made.name and made.text != model.text:
        why = f"{source} was made for {made.text}, this model is {model.text}"
    elif made.context and made.context != model.context:
        why = f"{source} was made for a text of width {made.context}, this model is {model.text}"
    else:
        why = f"{source} was made for another architecture than this model, {model.text}"
    return f"{why}; choose a LoRA for this model."


def unknown(source: str, names: Iterable[str], count: int) -> str:
    """One sentence for components that a model has no layer for; empty when there are none."""
    found = sorted(names)
    if not found:
        return ""
    first = ", ".join(name[:60] for name in found[:3])
    more = ", …" if len(found) > 3 else ""
    return f"{source}: {len(found)} of {count} components unknown: {first}{more}."
