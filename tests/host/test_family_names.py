"""A model is called by the names that its LoRAs are known under."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_base
import pytest
from lora2_pack.lora2_core.comfy_host.loading.fitting import _FAMILIES, family_of
from lora2_pack.lora2_core.files.model_family import _BY_METADATA, _BY_NAME, FAMILY_OF_CONTEXT

KNOWN = {
    *FAMILY_OF_CONTEXT.values(),
    *(family for _, _, families in _BY_NAME for family in families),
    *(family for _, family in _BY_METADATA),
}


@pytest.mark.parametrize("name", sorted(_FAMILIES))
def test_every_family_has_one_name(name: str):
    assert _FAMILIES[name] in KNOWN
    assert hasattr(comfy.model_base, name), "ComfyUI has no such class"


@pytest.mark.parametrize(
    ("kind", "config", "text"),
    [
        ("SDXL", {"context_dim": 2048}, "SDXL (context 2048)"),
        ("BaseModel", {"context_dim": 768}, "SD 1.5 (context 768)"),
        ("BaseModel", {"context_dim": 1024}, "SD 2 (context 1024)"),
        ("Flux", {"context_in_dim": 4096}, "Flux"),
        ("Lumina2", {"dim": 2304}, "Lumina 2"),
        ("Lumina2", {"dim": 3840}, "Z-Image"),
        ("Lumina2", {}, "Lumina 2 or Z-Image"),
        ("WAN21", {"dim": 5120}, "Wan"),
        ("CosmosPredict2", {}, "CosmosPredict2"),
    ],
)
def test_a_model_by_its_class_and_configuration(kind: str, config: dict[str, int], text: str):
    base: Any = object.__new__(getattr(comfy.model_base, kind))
    base.__dict__["model_config"] = SimpleNamespace(unet_config=config)
    assert family_of(SimpleNamespace(model=base)).text == text  # pyright: ignore


def test_the_model_of_the_tests(model: Any):
    assert family_of(model).name == "SDXL"
