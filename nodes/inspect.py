"""Inspect Ranks: what is inside a LoRA, as a picture and as text."""

from comfy_api.latest import io, ui

from ..lora2_core import comfy_host, lora_file, report
from ..lora2_core.jobs import TrainedLoRA
from .common import CATEGORY, LoRA2Socket, to_image

_FROM_SOCKET = "(the connected LORA2)"


class LoRA2InspectRanks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRA2InspectRanks",
            display_name="Inspect Ranks",
            category=CATEGORY,
            description=(
                "Shows the rank of every layer of a LoRA: a map by block and projection, a "
                "histogram and the figures. Works on LoRA² files and on plain LoRAs in kohya form; "
                "reads only the header."
            ),
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=[_FROM_SOCKET, *comfy_host.lora_names()],
                    default=_FROM_SOCKET,
                    tooltip="A LoRA file, or leave it and connect the LORA2 of a training node.",
                ),
                LoRA2Socket.Input(
                    "lora2",
                    optional=True,
                    tooltip="A LoRA straight from Train LoRA² on images; shows its curves as well.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The rank map, 1280 px wide."),
                io.String.Output(display_name="text", tooltip="The figures as a table."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_others: object) -> str:
        return comfy_host.lora_fingerprint(lora_name)

    @classmethod
    def execute(cls, lora_name: str, lora2: TrainedLoRA | None = None) -> io.NodeOutput:
        if lora_name != _FROM_SOCKET:
            path = comfy_host.lora_path(lora_name)
            components, metadata = lora_file.inspect(path)
            picture = report.rank_picture(components, path.stem, lora_file.headline(metadata))
        elif lora2 is not None:
            components = lora2.components
            subtitle = lora_file.headline(lora2.file.metadata)
            picture = report.training_picture(components, lora2.history, lora2.path.stem, subtitle)
        else:
            raise ValueError("lora_name is empty; choose a LoRA file or connect a LORA2 output.")
        text = report.rank_table(components)
        image = to_image(picture)
        shown = {**ui.PreviewImage(image, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(image, text, ui=shown)
