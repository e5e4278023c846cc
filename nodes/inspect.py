"""Inspect Ranks: what is inside a LoRA, as a picture, as text and as JSON."""

import json
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui
from PIL import Image

from ..lora2_core import comfy_host, lora_file
from ..lora2_core.files.model_family import guess_family
from ..lora2_core.jobs.saving import TrainedLoRA
from ..lora2_core.reports import comparison, inspector
from ..lora2_core.reports.inspector import FileReport
from ..lora2_core.reports.report import training_picture
from .common import CATEGORY, NO_LORA, advanced, also_called, fingerprint, to_image
from .load import MORE
from .screen.curves import training_history
from .widgets.sockets import LoRA2Socket

_FROM_SOCKET = "(the connected LORA2)"


class LoRA2InspectRanks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = comfy_host.lora_names()
        return io.Schema(
            node_id="LoRA2InspectRanks",
            **also_called("lora info", "lora metadata", "rank map"),
            display_name="Inspect Ranks",
            category=CATEGORY,
            description=(
                "Shows the rank of every layer of any LoRA: a map by block and projection, a "
                "histogram and the figures, trigger words, base model and hashes. Reads only the "
                "header unless it is told to measure."
            ),
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=[_FROM_SOCKET, *names],
                    default=_FROM_SOCKET,
                    tooltip="A LoRA file, or leave it and connect the LORA2 of a training node.",
                ),
                LoRA2Socket.Input(
                    "lora2",
                    optional=True,
                    tooltip="A LoRA straight from Train LoRA² on images; shows its curves as well.",
                ),
                *_more(names),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The rank map, 1280 px wide."),
                io.String.Output(display_name="text", tooltip="The figures as a table."),
                io.String.Output(display_name="json", tooltip="All of it for other nodes."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others: Any) -> str:
        names = [lora_name, *(others.get(f"lora_{number}", NO_LORA) for number in MORE)]
        return fingerprint(names)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        lora2: TrainedLoRA | None = None,
        measure: bool = False,
        **more: str,
    ) -> io.NodeOutput:
        names = [lora_name, *(more.get(f"lora_{number}", NO_LORA) for number in MORE)]
        files = [name for name in names if name not in (_FROM_SOCKET, NO_LORA)]
        reports = [inspector.inspect(comfy_host.lora_path(n), measure, n) for n in files]
        if lora_name == _FROM_SOCKET and lora2 is not None:
            reports.insert(0, _report_of(lora2, measure))
        if not reports:
            raise ValueError("lora_name is empty; choose a LoRA file or connect a LORA2 output.")
        image = to_image(_picture(reports, lora2 if lora_name == _FROM_SOCKET else None))
        text = "\n".join(one.text() for one in reports)
        if len(reports) > 1:
            text = f"{inspector.side_by_side(reports)}\n{text}"
        data = json.dumps([one.as_dict() for one in reports])
        shown = {**ui.PreviewImage(image, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(image, text, data, ui=shown)


def _more(names: list[str]) -> list[io.Input]:
    return [
        advanced(
            io.Boolean.Input(
                "measure",
                default=False,
                optional=True,
                tooltip=(
                    "Read the tensors too: how strong each layer is, the rank it really "
                    "needs, and to what size the file could be cut."
                ),
            )
        ),
        *(
            advanced(
                io.Combo.Input(
                    f"lora_{number}",
                    options=[NO_LORA, *names],
                    default=NO_LORA,
                    optional=True,
                    tooltip="One more file, to see side by side in one scale of colours.",
                )
            )
            for number in MORE
        ),
    ]


def _report_of(trained: TrainedLoRA, measure: bool) -> FileReport:
    """Of a LoRA from the socket; its file may have moved since."""
    if measure:
        return inspector.inspect(trained.path, True)
    inputs = {component.key: component.in_features for component in trained.components}
    metadata = trained.file.metadata
    there = trained.path.is_file()
    nbytes = trained.path.stat().st_size if there else sum(c.nbytes for c in trained.components)
    family = guess_family(inputs, metadata)
    return FileReport(trained.path.name, nbytes, trained.components, metadata, family)


def _picture(reports: list[FileReport], trained: TrainedLoRA | None) -> Image.Image:
    if len(reports) > 1:
        return comparison.compare(
            [comparison.Shown(Path(r.name).stem, r.components, r.nbytes) for r in reports]
        )
    if trained is None:
        return reports[0].picture()
    subtitle = lora_file.headline(trained.file.metadata)
    history = training_history(trained)
    return training_picture(trained.components, history, trained.path.stem, subtitle)
