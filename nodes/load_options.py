"""LoRA² load options: how much of a LoRA to keep, where, and by which way."""

from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ..lora2_core.config.load import BLOCKS, WAYS, Limits, Strengths
from .common import CATEGORY, also_called
from .widgets.limits import limit_widgets, limits_of, strength

_PLACES = {
    "strength_down": ("down", "the way down of the U-Net: composition and coarse shape"),
    "strength_mid": ("mid", "the middle of the U-Net"),
    "strength_up": ("up", "the way up of the U-Net: looks and detail"),
    "strength_self": ("self_attention", "self-attention: layout and texture"),
    "strength_cross": ("cross_attention", "cross-attention: what the words of the prompt do"),
}


@dataclass(frozen=True)
class LoadOptions:
    """The value of the socket; as it stands here: all of the LoRA, everywhere."""

    limits: Limits = field(default_factory=Limits)
    strengths: Strengths = field(default_factory=Strengths)
    way: str = WAYS[0]


LoadOptionsSocket = io.Custom("LORA2_LOAD_OPTIONS")


class LoRA2LoadOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRA2LoadOptions",
            **also_called("block weights", "lora strength by block"),
            display_name="LoRA² load options",
            category=CATEGORY,
            description=(
                "For Load Variable-Rank LoRA: how much of a LoRA to keep, how strongly it works in "
                "which part of the model, and whether it is merged into the weights. Nothing on "
                "disk changes."
            ),
            inputs=[*limit_widgets(), _blocks(), *_places(), _way()],
            outputs=[
                LoadOptionsSocket.Output(
                    display_name="options", tooltip="For Load Variable-Rank LoRA."
                )
            ],
        )

    @classmethod
    def execute(cls, blocks: str, apply_as: str, **values: Any) -> io.NodeOutput:
        places = {place: values[name] for name, (place, _) in _PLACES.items()}
        strengths = Strengths(**places, blocks=blocks)
        return io.NodeOutput(LoadOptions(limits_of(values), strengths, apply_as))


def _blocks() -> io.Input:
    return io.Combo.Input(
        "blocks",
        options=list(BLOCKS),
        default=BLOCKS[0],
        tooltip="Of SDXL: only the blocks that hold a picture's content, or its style (B-LoRA).",
    )


def _places() -> list[io.Input]:
    return [strength(name, what) for name, (_, what) in _PLACES.items()]


def _way() -> io.Input:
    return io.Combo.Input(
        "apply_as",
        options=list(WAYS),
        default=WAYS[0],
        tooltip=(
            "merge adds the LoRA to the weights; bypass computes it beside them, which is exact "
            "where weights are fp8, int8 or fp4, and takes a little longer. auto: bypass for those."
        ),
    )
