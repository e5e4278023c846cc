"""The nodes: a schema and a thin ``execute`` each; the work is done in lora2_core."""

from comfy_api.latest import ComfyExtension, io

from .demo import LoRA2DemoModel
from .images import LoRA2ImageFolder
from .inspect import LoRA2InspectRanks
from .load import LoRA2Load
from .train import LoRA2Train


class LoRA2Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoRA2Train, LoRA2Load, LoRA2InspectRanks, LoRA2ImageFolder, LoRA2DemoModel]


async def comfy_entrypoint() -> LoRA2Extension:
    return LoRA2Extension()
