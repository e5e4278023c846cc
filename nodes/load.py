"""Load Variable-Rank LoRA: LoRAs of any kind and rank, whole or cut, as a model patch."""

from typing import Any

from comfy_api.latest import io, ui

from ..lora2_core import comfy_host
from ..lora2_core.load_config import BLOCKS, WAYS, Strengths
from ..lora2_core.lora_cache import LoRACache
from ..lora2_core.shrink import ORDERS, Limits
from .common import CATEGORY, advanced

NO_LORA = "none"
MORE = (2, 3, 4)  # files beside the first
_PLACES = {
    "strength_down": ("down", "the way down of the U-Net: composition and coarse shape"),
    "strength_mid": ("mid", "the middle of the U-Net"),
    "strength_up": ("up", "the way up of the U-Net: looks and detail"),
    "strength_self": ("self_attention", "self-attention: layout and texture"),
    "strength_cross": ("cross_attention", "cross-attention: what the words of the prompt do"),
}
_cache = LoRACache()


class LoRA2Load(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = comfy_host.lora_names()
        return io.Schema(
            node_id="LoRA2Load",
            display_name="Load Variable-Rank LoRA",
            category=CATEGORY,
            description=(
                "Applies a LoRA² file (or any other LoRA) to a model, whole or cut to a rank, a "
                "size or a share of what it changes. A file that does not fit says why."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the LoRA to."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only needed for LoRAs that change the text encoders too.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=names,
                    tooltip="A file from the loras folder or output/loras. Press R to refresh.",
                ),
                _strength("strength_model", "the diffusion model"),
                _strength("strength_clip", "the text encoders"),
                *_limits(),
                *_places(),
                *_more([NO_LORA, *names]),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA applied."),
                io.Clip.Output(display_name="CLIP", tooltip="The CLIP with the LoRA applied."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others: Any) -> str:
        names = [lora_name, *(others.get(f"lora_{number}", NO_LORA) for number in MORE)]
        return " ".join(comfy_host.lora_fingerprint(name) for name in names if name != NO_LORA)

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        clip: io.Clip.Type | None = None,
        **options: Any,
    ) -> io.NodeOutput:
        wanted = [(lora_name, strength_model, strength_clip)]
        for number in MORE:
            if (name := options.get(f"lora_{number}", NO_LORA)) != NO_LORA:
                strength = options.get(f"strength_{number}", 1.0)
                wanted.append((name, strength, strength))
        limits = limits_of(options)
        strengths = Strengths(
            **{field: options.get(name, 1.0) for name, (field, _) in _PLACES.items()},
            blocks=options.get("blocks", BLOCKS[0]),
        )
        way = options.get("apply_as", WAYS[0])
        # All are opened before the first is applied: what cannot be read leaves nothing half done.
        opened = [_cache.open(comfy_host.lora_path(name), limits) for name, *_ in wanted]
        notes = []
        for file, (_, for_model, for_clip) in zip(opened, wanted, strict=True):
            applied = comfy_host.apply_lora(
                model, clip, file.state, for_model, for_clip, file.path.name,
                strengths=strengths, way=way, metadata=file.metadata,
            )  # fmt: skip
            model, clip = applied.model, applied.clip
            notes += [applied.note] if applied.note else []
        shown = ui.PreviewText("\n".join(notes)) if notes else None
        return io.NodeOutput(model, clip, ui=shown)


def limits_of(options: dict[str, Any]) -> Limits:
    """What the widgets of :func:`_limits` say; 0 and 1 are no limit."""
    energy = options.get("keep_energy", 1.0)
    return Limits(
        max_rank=options.get("max_rank", 0) or None,
        energy=None if energy >= 1 else energy,
        megabytes=options.get("megabytes", 0.0) or None,
        order=options.get("order", ORDERS[0]),
    )


def _limits() -> list[io.Input]:
    return [advanced(widget) for widget in limit_widgets()] + [
        advanced(
            io.Combo.Input(
                "apply_as",
                options=list(WAYS),
                default=WAYS[0],
                optional=True,
                tooltip=(
                    "merge adds the LoRA to the weights; bypass computes it beside them, which is "
                    "exact where weights are fp8 and takes a little longer. auto: bypass for fp8."
                ),
            )
        )
    ]


def limit_widgets() -> list[io.WidgetInput]:
    """Widgets that say how much of a LoRA to keep."""
    return [
        io.Int.Input(
            "max_rank",
            default=0,
            min=0,
            max=4096,
            optional=True,
            tooltip="The largest rank that any layer keeps. 0 keeps all.",
        ),
        io.Float.Input(
            "keep_energy",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.001,
            round=0.0001,
            optional=True,
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
            optional=True,
            tooltip="The size that is kept, as a file would take it, in 10⁶ bytes. 0 keeps all.",
        ),
        io.Combo.Input(
            "order",
            options=list(ORDERS),
            default=ORDERS[0],
            optional=True,
            tooltip=(
                "What goes first: svd keeps the best there is at any rank, learnt the first "
                "columns in the order that LoRA² learnt."
            ),
        ),
    ]


def _places() -> list[io.Input]:
    blocks = io.Combo.Input(
        "blocks",
        options=list(BLOCKS),
        default=BLOCKS[0],
        optional=True,
        tooltip="Of SDXL: only the blocks that hold a picture's content, or its style (B-LoRA).",
    )
    return [advanced(blocks), *(advanced(_strength(n, w, True)) for n, (_, w) in _PLACES.items())]


def _more(names: list[str]) -> list[io.Input]:
    found: list[io.Input] = []
    for number in MORE:
        found += [
            advanced(
                io.Combo.Input(
                    f"lora_{number}",
                    options=names,
                    default=NO_LORA,
                    optional=True,
                    tooltip="One more file, applied after those above, with the same settings.",
                )
            ),
            advanced(_strength(f"strength_{number}", "model and text encoders by this file", True)),
        ]
    return found


def _strength(name: str, what: str, optional: bool = False) -> io.WidgetInput:
    return io.Float.Input(
        name,
        default=1.0,
        min=-100.0,
        max=100.0,
        step=0.01,
        optional=optional,
        tooltip=f"How strongly the LoRA changes {what}; negative values invert it.",
    )
