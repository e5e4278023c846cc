"""A stand-in for the memory of a graphics card, for ComfyUI's dynamic VRAM.

Dynamic VRAM is ComfyUI's default on NVIDIA cards since 0.16. A CPU has none: ComfyUI answers with
its classic patcher there. Here the patcher is the real ``ModelPatcherDynamic``, kept from that
answer by a subclass, ``aimdo_enabled`` is the real switch, and weights are cast by ComfyUI's own
code. What is doubled is the card: its device is "cpu:0", and ``ModelVBAR`` (a range of the card's
addresses) and ``HostBuffer`` (pinned RAM) own nothing, cannot be copied, as a C handle cannot, and
count what frees them. The card is always full: no weight stays there, each is cast when it is used.
``ModelMMAP`` maps a file, as the native one does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import Counter
from typing import Any, ClassVar

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch

CPU, CARD = torch.device("cpu"), torch.device("cpu", 0)
THERE = hasattr(comfy.model_patcher, "ModelPatcherDynamic")
WHY_NOT = "this ComfyUI has no dynamic VRAM (0.16 and newer have)"


class Native:
    """Memory that belongs to one object: freed with it, and never to be copied."""

    made = 0
    freed: ClassVar[Counter[int]] = Counter()

    def __init__(self) -> None:
        Native.made += 1
        self.handle = Native.made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a handle of native memory cannot be copied")

    def __del__(self) -> None:
        Native.freed[self.handle] += 1


class HostBuffer(Native):
    def __init__(self, size: int, *_: Any):
        super().__init__()
        self.size = size

    def truncate(self, *_: Any, **__: Any) -> None: ...


class ModelVBAR(Native):
    def __init__(self, _size: int, _device: Any):
        super().__init__()
        self.offset = 0

    def alloc(self, size: int) -> tuple[ModelVBAR, int, int]:
        self.offset += size
        return self, self.offset, size

    def prioritize(self) -> None: ...

    def loaded_size(self) -> int:
        return 0

    def free_memory(self, _size: float) -> int:
        return 0


class ModelMMAP:
    def __init__(self, path: Any):
        self.file = os.open(path, os.O_RDONLY)
        self.map = mmap.mmap(self.file, 0, access=mmap.ACCESS_COPY)

    def get(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def get_file_handle(self) -> int:
        return self.file

    def bounce(self) -> bool:
        return False

    def __del__(self) -> None:
        os.close(self.file)


def dynamic_patcher(patch: pytest.MonkeyPatch) -> Any:
    """Double the card's memory, and return ComfyUI's dynamic patcher for it."""
    if not THERE:
        pytest.skip(WHY_NOT)
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_mmap
    import comfy_aimdo.model_vbar

    patch.setattr(comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
    patch.setattr(comfy_aimdo.model_mmap, "ModelMMAP", ModelMMAP)
    patch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", ModelVBAR)
    patch.setattr(comfy_aimdo.model_vbar, "vbar_unpin", lambda _: None)
    patch.setattr(comfy_aimdo.model_vbar, "vbar_fault", lambda _: None)
    patch.setattr(comfy_aimdo.model_vbar, "vbar_signature_compare", lambda *_: False)

    class OnTheCard(comfy.model_patcher.ModelPatcherDynamic):
        def __new__(cls, *_: Any, **__: Any) -> Any:
            return object.__new__(cls)

    return OnTheCard


def everywhere(patch: pytest.MonkeyPatch) -> None:
    """Let ComfyUI hold every model in dynamic VRAM, and cast weights as for a card."""
    patch.setattr(comfy.model_patcher, "CoreModelPatcher", dynamic_patcher(patch))
    patch.setattr("comfy.memory_management.aimdo_enabled", True)
    patch.setattr(comfy.model_management, "is_device_cpu", lambda device: device == CPU)
    for name in ("get_torch_device", "text_encoder_device", "vae_device"):
        patch.setattr(comfy.model_management, name, lambda: CARD)
    cast = comfy.ops.cast_bias_weight

    def for_the_card(layer: Any, *positional: Any, **named: Any) -> Any:
        # Tensors say "cpu", wherever they were made; the card's are those that come here.
        if hasattr(layer, "_v") and len(positional) < 3:
            named["device"] = CARD
        return cast(layer, *positional, **named)

    patch.setattr(comfy.ops, "cast_bias_weight", for_the_card)
