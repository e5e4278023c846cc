"""Load Variable-Rank LoRA: a LoRA whose layers differ in rank, as a model patch."""

from comfy_api.latest import io

from ..lora2_core import comfy_host, lora_file
from .common import CATEGORY


class LoRA2Load(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRA2Load",
            display_name="Load Variable-Rank LoRA",
            category=CATEGORY,
            description=(
                "Applies a LoRA² file (or any other LoRA) to a model. Like the stock loader, but "
                "a file that does not fit the model says so instead of doing nothing."
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
                    options=comfy_host.lora_names(),
                    tooltip="A file from the loras folder or output/loras. Press R to refresh.",
                ),
                _strength("strength_model", "diffusion model"),
                _strength("strength_clip", "text encoders"),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA applied."),
                io.Clip.Output(display_name="CLIP", tooltip="The CLIP with the LoRA applied."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_others: object) -> str:
        return comfy_host.lora_fingerprint(lora_name)

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        clip: io.Clip.Type | None = None,
    ) -> io.NodeOutput:
        path = comfy_host.lora_path(lora_name)
        state = lora_file.load(path).state
        return io.NodeOutput(
            *comfy_host.apply_state(model, clip, state, strength_model, strength_clip, path.name)
        )


def _strength(name: str, what: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=-100.0,
        max=100.0,
        step=0.01,
        tooltip=f"How strongly the LoRA changes the {what}; negative values invert it.",
    )
