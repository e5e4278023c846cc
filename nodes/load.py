"""Load Variable-Rank LoRA: LoRAs of any kind and rank, whole or cut, as a model patch."""

from typing import Any

from comfy_api.latest import io, ui

from ..lora2_core import comfy_host
from ..lora2_core.resizing.recent import LoRACache
from ..lora2_core.resizing.shrink import left_whole
from .common import CATEGORY, NO_LORA, also_called, fingerprint
from .load_options import LoadOptions, LoadOptionsSocket
from .widgets.limits import strength

MORE = (2, 3, 4)  # files beside the first
_cache = LoRACache()


class LoRA2Load(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = comfy_host.lora_names()
        return io.Schema(
            node_id="LoRA2Load",
            **also_called("lora loader", "load lora", "lora stack", "adalora"),
            display_name="Load Variable-Rank LoRA",
            category=CATEGORY,
            description=(
                "Applies a LoRA² file (or any other LoRA) to a model, up to four at once. A file "
                "that does not fit says what it was made for."
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
                strength("strength_model", "the diffusion model"),
                strength("strength_clip", "the text encoders"),
                LoadOptionsSocket.Input(
                    "options",
                    optional=True,
                    tooltip="From LoRA² load options: cut it, or weaken parts of it.",
                ),
                *_more([NO_LORA, *names]),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA applied."),
                io.Clip.Output(display_name="CLIP", tooltip="The CLIP with the LoRA applied."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others: Any) -> str:
        more = (others.get(f"lora_{number}", NO_LORA) for number in MORE)
        return fingerprint((lora_name, *more))

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        clip: io.Clip.Type | None = None,
        options: LoadOptions | None = None,
        **more: Any,
    ) -> io.NodeOutput:
        wanted = [(lora_name, strength_model, strength_clip)]
        for number in MORE:
            if (name := more.get(f"lora_{number}", NO_LORA)) != NO_LORA:
                factor = more.get(f"strength_{number}", 1.0)
                wanted.append((name, factor, factor))
        options = options or LoadOptions()
        # All are opened before the first is applied: what cannot be read leaves nothing half done.
        paths = [comfy_host.lora_path(name) for name, *_ in wanted]
        files = [_cache.open(path, options.limits) for path in paths]
        notes = []
        for path, file, (_, for_model, for_clip) in zip(paths, files, wanted, strict=True):
            applied = comfy_host.apply_lora(
                model, clip, file, for_model, for_clip, path.name,
                strengths=options.strengths, way=options.way,
            )  # fmt: skip
            model, clip = applied.model, applied.clip
            notes += [applied.note] if applied.note else []
            if whole := left_whole(file, options.limits):
                notes.append(f"{path.name}: {whole}")
        shown = ui.PreviewText("\n".join(notes)) if notes else None
        return io.NodeOutput(model, clip, ui=shown)


def _more(names: list[str]) -> list[io.Input]:
    found: list[io.Input] = []
    for number in MORE:
        found += [
            io.Combo.Input(
                f"lora_{number}",
                options=names,
                default=NO_LORA,
                optional=True,
                tooltip="One more file, applied after those above, with the same options.",
            ),
            strength(f"strength_{number}", "model and text encoders by this file", True),
        ]
    return found
