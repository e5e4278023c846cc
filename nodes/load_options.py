"""LoRA² load options: how much of a LoRA to keep, where, and by which way."""

from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ..lora2_core.load_config import BLOCKS, WAYS, Strengths
from ..lora2_core.shrink import ORDERS, Limits
from .common import CATEGORY

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


def limits_of(values: dict[str, Any]) -> Limits:
    """What the widgets of :func:`limit_widgets` say; 0 and 1 are no limit."""
    energy = values["keep_energy"]
    return Limits(
        max_rank=values["max_rank"] or None,
        energy=None if energy >= 1 else energy,
        megabytes=values["megabytes"] or None,
        order=values["order"],
    )


def limit_widgets() -> list[io.WidgetInput]:
    """Widgets that say how much of a LoRA to keep."""
    return [
        io.Int.Input(
            "max_rank",
            default=0,
            min=0,
            max=4096,
            tooltip="The largest rank that any layer keeps. 0 keeps all.",
        ),
        io.Float.Input(
            "keep_energy",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.001,
            round=0.0001,
            tooltip=(
                "The share of what the LoRA changes that is kept, over all layers together: 0.99 "
                "mostly looks the same at a fraction of the size. 1 keeps all."
            ),
        ),
        io.Float.Input(
            "megabytes",
            default=0.0,
            min=0.0,
            max=100_000.0,
            step=0.1,
            round=0.0001,
            tooltip="The size that is kept, as a file would take it, in 10⁶ bytes. 0 keeps all.",
        ),
        io.Combo.Input(
            "order",
            options=list(ORDERS),
            default=ORDERS[0],
            tooltip=(
                "What goes first: svd keeps the best there is at any rank, learnt the first "
                "columns in the order that LoRA² learnt."
            ),
        ),
    ]


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
            "where weights are fp8 and takes a little longer. auto: bypass for fp8."
        ),
    )


def strength(name: str, what: str, optional: bool = False) -> io.WidgetInput:
    """A widget for how strongly something works."""
    return io.Float.Input(
        name,
        default=1.0,
        min=-100.0,
        max=100.0,
        step=0.01,
        optional=optional,
        tooltip=f"How strongly the LoRA changes {what}; negative values invert it.",
    )
