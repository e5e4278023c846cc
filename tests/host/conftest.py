"""The demo model of ComfyUI's real classes, in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models here are too small for more, and others use this machine too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _card(comfyui: Any) -> Iterator[None]:
    """With LORA2_DYNAMIC_VRAM set, ComfyUI holds every model as it does on an NVIDIA card."""
    if not os.environ.get("LORA2_DYNAMIC_VRAM"):
        yield
        return
    from lora2_pack.tests.host.card import everywhere

    with pytest.MonkeyPatch.context() as patch:
        everywhere(patch)
        yield


@pytest.fixture(scope="session")
def parts(comfyui: Any) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the demo, as ComfyUI makes them: under inference mode."""
    from lora2_pack.tests.host.demo import build

    return build()


@pytest.fixture
def model(parts: tuple[Any, Any, Any]) -> Iterator[Any]:
    """The demo MODEL, loaded; a test that leaves its weights changed fails here."""
    import comfy.model_management
    from lora2_pack.tests.host.demo import weights

    before = weights(parts[0])
    # Under dynamic VRAM, modules keep the patches of the clone before until another is loaded.
    comfy.model_management.load_models_gpu([parts[0]])
    yield parts[0]
    after = weights(parts[0])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
