"""Tiny SDXL (demo): a model to try everything on without a download."""

from comfy_api.latest import io

from ..lora2_core import comfy_host, demo_model
from .common import CATEGORY


class LoRA2DemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRA2DemoModel",
            display_name="Tiny SDXL (demo)",
            category=CATEGORY,
            description=(
                "A tiny model of SDXL's real architecture with seeded random weights. It has "
                "learnt nothing, so it paints noise, but it trains in seconds on a CPU: use it "
                "to try LoRA² without a download."
            ),
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,
                    tooltip="Another seed gives other random weights, so another model.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
            ],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        model, clip = comfy_host.build_sdxl(
            demo_model.UNET_CONFIG, demo_model.text_configs(), demo_model.fill_seeded, seed
        )
        return io.NodeOutput(model, clip, comfy_host.build_autoencoder(demo_model.fill_autoencoder))
