"""Resize LoRA and Merge LoRAs: smaller files, and sums of several, always as LoRA² files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..lora2_core import comfy_host
from ..lora2_core.files.atomic import remove_leftovers_in
from ..lora2_core.files.write import write_beside_others
from ..lora2_core.resizing.resize import Resized, merge_files, resize_file
from .background import job_queue
from .common import CATEGORY, NO_LORA, also_called, fingerprint
from .widgets.limits import limit_widgets, limits_of

_COUNT = 4


class LoRA2Resize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRA2Resize",
            **also_called("shrink lora", "extract rank", "lora resize", "svd"),
            display_name="Resize LoRA",
            category=CATEGORY,
            description=(
                "Writes a smaller file of any LoRA: to a rank, a size in megabytes, or a share of "
                "what it changes. Every layer keeps the rank that serves it best."
            ),
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=comfy_host.lora_names(),
                    tooltip="A file from the loras folder or output/loras; it stays as it is.",
                ),
                *limit_widgets(),
                _file_name("resized"),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_others: Any) -> str:
        return comfy_host.lora_fingerprint(lora_name)

    @classmethod
    def execute(cls, lora_name: str, file_name: str, **options: Any) -> io.NodeOutput:
        limits = limits_of(options)
        source = comfy_host.lora_path(lora_name)
        return _written(file_name, lambda path, new: resize_file(source, path, limits, new))


class LoRA2Merge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = comfy_host.lora_names()
        loras: list[io.Input] = []
        for number in range(1, _COUNT + 1):
            loras.append(
                io.Combo.Input(
                    f"lora_{number}",
                    options=names if number < 3 else [NO_LORA, *names],
                    default=None if number < 3 else NO_LORA,
                    tooltip="One of the files to add; it stays as it is.",
                )
            )
            loras.append(
                io.Float.Input(
                    f"weight_{number}",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strongly this file counts; negative values take it off the sum.",
                )
            )
        return io.Schema(
            node_id="LoRA2Merge",
            **also_called("combine loras", "merge lora", "sum of loras"),
            display_name="Merge LoRAs",
            category=CATEGORY,
            description=(
                "Writes the exact sum of LoRAs of any ranks as one file; with a limit, the best "
                "there is of it."
            ),
            inputs=[*loras, *limit_widgets(), _file_name("merged")],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> str:
        return fingerprint(values.get(f"lora_{number}", NO_LORA) for number in range(1, _COUNT + 1))

    @classmethod
    def execute(cls, file_name: str, **options: Any) -> io.NodeOutput:
        sources = [
            (comfy_host.lora_path(name), options[f"weight_{number}"])
            for number in range(1, _COUNT + 1)
            if (name := options[f"lora_{number}"]) != NO_LORA
        ]
        if not any(weight for _, weight in sources):
            raise ValueError("Every weight is 0; nothing would be left. Choose a weight above 0.")
        limits = limits_of(options)
        return _written(file_name, lambda path, new: merge_files(sources, path, limits, new))


def _file_name(default: str) -> io.Input:
    return io.String.Input(
        "file_name",
        default=default,
        tooltip="Name of the new file under output/loras; it gets a number and replaces no file.",
    )


def _outputs() -> list[io.Output]:
    return [
        io.String.Output(display_name="path", tooltip="Where the file was written."),
        io.String.Output(display_name="text", tooltip="Sizes, mean ranks and what was kept."),
    ]


def _written(file_name: str, write: Callable[[Path, bool], Resized]) -> io.NodeOutput:
    """Write under a new name, also where another takes it meanwhile, and tell of it."""
    path = comfy_host.new_lora_path(file_name, job_queue().paths())
    remove_leftovers_in(path.parent, path.suffix)
    found = write_beside_others(path, write, own=lambda _: False)
    text = found.text()
    return io.NodeOutput(str(found.path), text, ui=ui.PreviewText(text))
