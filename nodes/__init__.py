"""The nodes: a schema and a thin ``execute`` each; the work is done in lora2_core."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import ComfyExtension

from ..lora2_core import comfy_host
from ..lora2_core.jobs import shutdown

NODES: Mapping[str, tuple[str, ...]] = {  # by the module that has them, in the order of the menu
    "train": ("LoRA2Train",),
    "load": ("LoRA2Load",),
    "inspect": ("LoRA2InspectRanks",),
    "images": ("LoRA2ImageFolder",),
    "demo": ("LoRA2DemoModel",),
    "options": (
        "LoRA2DataOptions",
        "LoRA2OptimizerOptions",
        "LoRA2RankOptions",
        "LoRA2SafetyOptions",
    ),
    "load_options": ("LoRA2LoadOptions",),
    "resize": ("LoRA2Resize", "LoRA2Merge"),
    "score": ("LoRA2Score",),
}


class LoRA2Extension(ComfyExtension):
    async def get_node_list(self) -> list[Any]:
        return nodes()


def nodes() -> list[Any]:
    """Every node that this ComfyUI can show; for one that it cannot, the log says why."""
    found: list[Any] = []
    for module, names in NODES.items():
        for name in names:
            try:
                node = getattr(importlib.import_module(f".{module}", __name__), name)
                node.GET_SCHEMA()
            except Exception as error:  # whatever it is, the others need not suffer for it
                logging.warning(
                    "LoRA²: the node %s cannot be made in ComfyUI %s (%s). The others can; update "
                    "LoRA², or report this.",
                    *(name, comfy_host.version(), error),
                )
            else:
                found.append(node)
    return found


async def comfy_entrypoint() -> LoRA2Extension:
    comfy_host.report()
    shutdown.install()  # ComfyUI loads nodes in its main thread, where signals can be seen
    _offer()
    return LoRA2Extension()


def _offer() -> None:
    """Open the REST interface, where this ComfyUI has what that needs."""
    try:
        from .background import job_queue
        from .screen import routes

        routes.register(job_queue())
    except Exception as error:
        logging.warning("LoRA²: no panels, no notes and no tab: %s", error)
