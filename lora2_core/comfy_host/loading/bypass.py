"""LoRAs beside the weights: every layer adds up · down of its input, and no weight is touched.

For weights that merging would round, those in eight bits or fewer. ComfyUI puts the hooks in when
it loads the patched model and takes them out when it unloads it, so clones of one model do not
meet.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PREFIX = "lora2_bypass_"


class Branch:
    """Two factors beside one layer."""

    def __init__(self, down: Tensor, up: Tensor, scale: float):
        self.down, self.up, self.scale = down, up, scale
        self._there: tuple[Tensor, Tensor] | None = None  # at the layer's device and type

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What this adds to the output of ``layer`` for its input."""
        down, up = self._at(x)
        if isinstance(layer, nn.Conv2d):
            # However a file writes the kernel: merging unrolls it, too.
            down = down.reshape(-1, layer.in_channels, *layer.kernel_size)
            middle = functional.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            return functional.conv2d(middle, up.flatten(1)[..., None, None]) * self.scale
        return functional.linear(functional.linear(x, down.flatten(1)), up.flatten(1)) * self.scale

    def delta(self) -> Tensor:
        """The same as a change of the layer's weight: (out, in · kernel), fp32."""
        return self.up.float().flatten(1) @ self.down.float().flatten(1) * self.scale

    def leave(self) -> None:
        """Give back what lies on the device."""
        self._there = None

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        held = self._there
        if held is None or held[0].device != x.device or held[0].dtype != x.dtype:
            held = self._there = self.down.to(x.device, x.dtype), self.up.to(x.device, x.dtype)
        return held


class _Branches:
    """Branches of many layers, put in and taken out together."""

    def __init__(self, branches: Mapping[str, tuple[Branch, ...]]):
        self.branches = dict(branches)  # by the key of the layer's weight
        self._handles: list[Any] = []

    def put_in(self, patcher: ModelPatcher) -> None:
        self.take_out(patcher)  # clones share this; whichever is loaded, it works once
        for key, branches in self.branches.items():
            layer = comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))
            self._handles.append(layer.register_forward_hook(_Adding(branches)))

    def take_out(self, _patcher: ModelPatcher) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for branches in self.branches.values():
            for branch in branches:
                branch.leave()


def fits(model: ModelPatcher, key: Any, patch: Any) -> bool:
    """Whether a patch can work beside its layer: two factors at a linear or plain convolution."""
    if not isinstance(key, str) or not key.endswith(".weight"):
        return False
    weights = getattr(patch, "weights", None)
    if getattr(patch, "name", "") != "lora" or weights is None:
        return False
    if any(more is not None for more in weights[3:6]):  # a third factor, DoRA, another shape
        return False
    layer = comfy.utils.get_attr(model.model, key.removesuffix(".weight"))
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1
    return plain or hasattr(layer, "in_features")  # newer quantised ones are no nn.Linear


def add_branches(model: ModelPatcher, patches: Mapping[str, Any], strength: Mapping[str, float]):
    """Put two-factor patches beside the layers of ``model``, a clone; those it has stay."""
    branches = branches_of(model)
    for name in [name for name in model.injections if name.startswith(PREFIX)]:
        model.remove_injections(name)
    for key, patch in patches.items():
        up, down, alpha = patch.weights[:3]
        scale = (1.0 if alpha is None else alpha / down.shape[0]) * strength[key]
        branches[key] = (*branches.get(key, ()), Branch(down, up, scale))
    # ComfyUI takes clones with equal names of injections for the same model.
    both = _Branches(branches)
    injection = comfy.patcher_extension.PatcherInjection(inject=both.put_in, eject=both.take_out)
    model.set_injections(PREFIX + uuid.uuid4().hex, [injection])


def branches_of(model: ModelPatcher) -> dict[str, tuple[Branch, ...]]:
    """What works beside the layers of ``model``, by the key of the layer's weight."""
    return {key: some for one in _ours(model) for key, some in one.branches.items()}


def merge_into(root: nn.Module, model: ModelPatcher) -> None:
    """Add what works beside the layers of ``model`` to the weights of a copy of it."""
    for key, branches in branches_of(model).items():
        weight: Any = comfy.utils.get_attr(root, key)
        delta = torch.stack([branch.delta() for branch in branches]).sum(0)  # (out, in · kernel)
        wide = weight.data.float() + delta.to(weight.device).view(weight.shape)
        weight.data.copy_(wide)


def is_coarse(dtype: torch.dtype | None) -> bool:
    """Whether merging into weights of this type would show: ComfyUI rounds the sum to eight bits or
    fewer again (fp8 by chance; int8 and fp4 with a new scale)."""
    return dtype is not None and dtype.itemsize == 1


class _Adding:
    """The hook that adds branches to what their layer gives."""

    def __init__(self, branches: tuple[Branch, ...]):
        self.branches = branches

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for branch in self.branches:
            output = output + branch(layer, inputs[0]).to(output.dtype)
        return output


def is_branch(hook: object) -> bool:
    """Whether a hook of a layer is one of ours."""
    return isinstance(hook, _Adding)


def _ours(model: ModelPatcher) -> list[_Branches]:
    injections = [i for name, i in model.injections.items() if name.startswith(PREFIX)]
    owners = [getattr(one.inject, "__self__", None) for group in injections for one in group]
    return [owner for owner in owners if isinstance(owner, _Branches)]
