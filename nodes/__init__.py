"""The nodes: a schema and a thin ``execute`` each; the work is done in lora2_core."""

from comfy_api.latest import ComfyExtension, io

from ..lora2_core.jobs import shutdown
from .background import job_queue
from .demo import LoRA2DemoModel
from .images import LoRA2ImageFolder
from .inspect import LoRA2InspectRanks
from .load import LoRA2Load
from .load_options import LoRA2LoadOptions
from .options import LoRA2DataOptions, LoRA2OptimizerOptions, LoRA2RankOptions, LoRA2SafetyOptions
from .resize import LoRA2Merge, LoRA2Resize
from .score import LoRA2Score
from .screen import routes
from .train import LoRA2Train


class LoRA2Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoRA2Train,
            LoRA2Load,
            LoRA2InspectRanks,
            LoRA2ImageFolder,
            LoRA2DemoModel,
            LoRA2DataOptions,
            LoRA2OptimizerOptions,
            LoRA2RankOptions,
            LoRA2SafetyOptions,
            LoRA2LoadOptions,
            LoRA2Resize,
            LoRA2Merge,
            LoRA2Score,
        ]


async def comfy_entrypoint() -> LoRA2Extension:
    shutdown.install()  # ComfyUI loads nodes in its main thread, where signals can be seen
    routes.register(job_queue())
    return LoRA2Extension()
