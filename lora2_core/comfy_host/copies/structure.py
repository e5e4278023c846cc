"""Networks of the shape of the user's, with weights of their own."""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import torch
from torch import Tensor, nn

from ..errors import HostError
from ..loading import bypass
from .weights import Weights, frozen

if TYPE_CHECKING:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

# What ComfyUI hangs on a module while a patcher holds it. Of dynamic VRAM (0.16 and newer) these
# are native memory, freed with the object: a copy must neither own nor share it.
_HELD = re.compile(
    r"(_v|_v_.*|_pin.*|_prefetch.*|dynamic_.*|(weight|bias)_(lowvram_)?function|seed_key"
    r"|(prev_)?comfy_(cast|patched|force_cast)_?weights)$"
)
# What another node may have hung on a module itself: a copy is to compute as the user's does.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_ATOMS = (bool, int, float, str, type(None))  # one object in many places


def with_memory(operations: Any) -> Any:
    """ComfyUI's layers, made with memory for their weights: since dynamic VRAM some are made
    without, until a state dict is loaded by ComfyUI's own way."""
    own = {"_load_from_state_dict": nn.Module._load_from_state_dict}
    kinds = {
        kind: type(kind, (getattr(operations, kind),), own) for kind in ("Linear", "Embedding")
    }
    return type(operations.__name__, (operations,), kinds)


@cache
def plain() -> Any:
    """Layers that compute in the type of their weights."""
    return with_memory(comfy.ops.disable_weight_init)


@cache
def casting() -> Any:
    """Layers that compute in the type of their input."""
    return with_memory(comfy.ops.manual_cast)


def free_of_holders(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes without those by which ComfyUI's memory management holds it."""
    return {name: value for name, value in attributes.items() if not _HELD.match(name)}


def new_unet(base: Any, weights: Weights, dtype: torch.dtype) -> UNetModel:
    """The U-Net that the configuration of ``base`` describes, frozen, in RAM, with ``weights``.

    Raises HostError when these are not the weights of such a U-Net.
    """
    config = {**base.model_config.unet_config, "dtype": dtype}
    network: Any = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel
    unet = network(**config, device="meta", operations=plain())
    missing = set(unet.state_dict())
    for name in weights:
        path, _, leaf = name.removeprefix("diffusion_model.").rpartition(".")
        if not name.startswith("diffusion_model."):
            continue
        if f"{path}.{leaf}" not in missing:
            raise HostError(f"model has a weight that no SDXL model has, {name}; load another one.")
        missing.remove(f"{path}.{leaf}")
        setattr(unet.get_submodule(path), leaf, frozen(weights[name], dtype))
    if missing:
        raise HostError(f"model lacks its weight {min(missing)}; load another checkpoint.")
    _hang_hooks(base.diffusion_model, unet)
    return unet.eval()


def _hang_hooks(source: nn.Module, network: nn.Module) -> None:
    """The hooks of ``source``'s modules on those of the same names, but for what adds our LoRAs:
    a copy has these in its weights."""
    own = dict(network.named_modules())
    for name, module in source.named_modules():
        ours = {n for n, hook in module._forward_hooks.items() if bypass.is_branch(hook)}
        for kind in _HOOKS if name in own else ():
            hooks = getattr(module, kind)
            if hooks.keys() - ours:
                kept = type(hooks)((n, hook) for n, hook in hooks.items() if n not in ours)
                setattr(own[name], kind, kept)


def put_objects(private: nn.Module, model: Any, dtype: torch.dtype) -> None:
    """Copies of what nodes have put in the place of parts of ``model``, a MODEL, in its copy.

    Where another clone's objects are in the shared parts, the original ones.
    """
    there = dict(private.named_modules())
    same: dict[int, Any] = {id(model.model): private}  # what an object may refer to
    for name, module in model.model.named_modules():
        if name.startswith("diffusion_model.") and name in there:
            same[id(module)] = there[name]
    for path in {**model.object_patches_backup, **model.object_patches}:
        found = model.get_model_object(path)
        if path == "diffusion_model":
            raise HostError(
                f"model has its U-Net replaced by a {type(found).__name__} of another node; leave "
                "that node out."
            )
        if path.startswith("diffusion_model.") and path not in model.object_patches:
            continue  # the copy has its own
        owner, _, leaf = path.rpartition(".")
        found = copy.deepcopy(found, dict(same))
        if isinstance(found, nn.Module) and owner:
            found = found.to("cpu", dtype).requires_grad_(False)
        setattr(private.get_submodule(owner), leaf, found)


def copied(root: nn.Module, weights: Weights, prefix: str, dtype: torch.dtype) -> Any:
    """``root`` with ``weights`` of its own, frozen, in RAM, and held by nobody.

    ``prefix``: of its names in ``weights``. Layers that were quantised become plain ones.
    """
    memo: dict[int, Any] = {}
    for path, module in root.named_modules():
        stem = prefix + path + ("." if path else "")
        held = [value for name, value in vars(module).items() if _HELD.match(name)]
        memo |= {id(value): None for value in held if not isinstance(value, _ATOMS)}
        for leaf, parameter in module._parameters.items():
            if parameter is not None and stem + leaf in weights:
                memo[id(parameter)] = frozen(weights[stem + leaf], dtype)
        if stem + "weight" in weights.quantised and hasattr(module, "in_features"):
            memo[id(module)] = _plain_linear(module, memo)
    network: Any = copy.deepcopy(root, memo).eval()
    for module in network.modules():
        for name in [name for name in vars(module) if _HELD.match(name)]:
            delattr(module, name)
    network.dtype = dtype
    return network


def _plain_linear(module: Any, memo: dict[int, Any]) -> nn.Module:
    bias: Tensor | None = module.bias
    layer = casting().Linear(
        module.in_features, module.out_features, bias is not None, device="meta"
    )
    layer.weight = memo[id(module.weight)]
    if bias is not None:
        layer.bias = memo[id(bias)]
    return layer
