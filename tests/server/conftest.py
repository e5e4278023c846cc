"""A booted ComfyUI with the pack and a few nodes of the tests' own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lora2_pack.tests.server.studio import Studio

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent
TESTING_NODES = _HERE / "custom_nodes"


@pytest.fixture(scope="session")
def studio(runtime: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One server for all tests here, on one thread so that they leave others room."""
    from lora2_tools.server import Server

    directory = tmp_path_factory.mktemp("studio")
    config = directory / "testing.yaml"
    # JSON is YAML.
    folders = {"custom_nodes": str(TESTING_NODES), "diffusers": str(directory / "judges")}
    config.write_text(json.dumps({"testing": folders}))
    extra = ["--extra-model-paths-config", str(config)]
    if not runtime.packaged:  # where only named packs are loaded, the later list counts
        extra += ["--whitelist-custom-nodes", *_pack_names(runtime.path), "lora2_testing"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with Server(runtime, directory, extra) as server:
            yield Studio(server)


def _pack_names(comfyui: Path) -> list[str]:
    """The names under which the server may see the pack."""
    from lora2_tools.packaged import LINK_NAME

    folders = (comfyui / "custom_nodes").iterdir()
    return [LINK_NAME, *(f.name for f in folders if f.resolve() == _ROOT)]
