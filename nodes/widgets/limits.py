"""Widgets that say how much of a LoRA to keep, and how strongly it works."""

from typing import Any

from comfy_api.latest import io

from ...lora2_core.config.load import ORDERS, Limits


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
