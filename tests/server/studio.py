"""The booted server, and what the tests do with it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora2_pack.tests.server.graphs import Workflow
from PIL import Image


class Studio:
    """The server, and what the tests do with it."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.loras: Path = server.output / "loras"

    def run(self, workflow: Workflow, **options: Any) -> dict[str, Any]:
        """Run to the end; the history entry."""
        return self.server.run(workflow, timeout=240, **options)

    def refusal(self, workflow: Workflow) -> Any:
        """Run what must fail; the error, after a look whether the server still lives."""
        from lora2_tools.client import WorkflowError

        with pytest.raises(WorkflowError) as caught:
            self.run(workflow)
        assert self.server.alive()
        return caught.value

    def picture(self, history: dict[str, Any], node: str) -> np.ndarray:
        """The first picture that a node saved, (height, width, 3), 0 to 255."""
        found = self.server.outputs(history, node)["images"][0]
        query = "&".join(f"{key}={found[key]}" for key in ("filename", "subfolder", "type"))
        data = self.server.fetch(f"/view?{query}")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    def witness(self, seed: int) -> dict[str, Any]:
        """What the untrained model of this seed looks like now, and what runs beside it."""
        workflow = {
            "1": {"class_type": "LoRA2TestModel", "inputs": {"seed": seed}},
            "w": {"class_type": "LoRA2TestWitness", "inputs": {"model": ["1", 0]}},
        }
        return self.server.outputs(self.run(workflow), "w")["seen"][0]

    def lora_files(self) -> set[str]:
        """Every file below output/loras, temporary ones included."""
        return {
            str(path.relative_to(self.loras)) for path in self.loras.rglob("*") if path.is_file()
        }
