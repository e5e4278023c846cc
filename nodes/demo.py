"""Tiny SDXL (demo): a model to try everything on without a download."""

from comfy_api.latest import io

from ..lora2_core import comfy_host
from ..lora2_core.tiny_sdxl.model import (
    UNET_CONFIG,
    autoencoder_weights,
    fill_trained,
    text_configs,
)
from .common import CATEGORY, also_called


class LoRA2DemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRA2DemoModel",
            **also_called("test model", "small sdxl"),
            display_name="Tiny SDXL (demo)",
            category=CATEGORY,
            description=(
                "A tiny model of SDXL's real architecture, trained on drawn scenes; it comes with "
                "LoRA² and paints at 192 px in seconds on a CPU. It knows mug, teapot, backpack, "
                "clock, sneaker, robot, cat, dog, candle, can, bowl and vase, in places such as "
                "'in the jungle' or 'on the beach'."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model, clip = comfy_host.build_sdxl(UNET_CONFIG, text_configs(), fill_trained)
        vae = comfy_host.build_autoencoder(autoencoder_weights())
        return io.NodeOutput(model, clip, vae)
