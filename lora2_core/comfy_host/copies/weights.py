"""The weights that a MODEL, CLIP or VAE computes with, whoever holds them at the moment.

ComfyUI's classic patcher merges patches into the weights and keeps the originals beside; the
dynamic one leaves the weights as the file has them and patches what it casts. Here the originals
are patched, one tensor at a time, and nothing of the user's is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.utils
import torch
from torch import Tensor, nn

from ..errors import HostError
from ..loading import bypass

# Beside a quantised weight: what scales it, which is in its numbers, or its input, which is not.
_SCALES = {"scale_weight", "weight_scale", "scale_input", "input_scale", "scaled_fp8"}


class Weights:
    """Every parameter and buffer of ``patcher``'s model by name, with the patches of ``patcher``.

    ``socket``: its name in messages. Values have the type that the model keeps them in, fp32 where
    that one is quantised; they may be the user's own tensors, so copy before writing. ``quantised``
    has the kind by name, of those asked for so far. Raises HostError, there or when a value is
    asked for, where something else than its weights is changed or a quantisation is unknown.
    """

    def __init__(self, patcher: Any, socket: str):
        foreign = [name for name in patcher.injections if not name.startswith(bypass.PREFIX)]
        if foreign:
            raise HostError(
                f"{socket} carries '{foreign[0]}', put beside its layers by another node, and a "
                "copy would lack it; leave that node out, or load its LoRA with a node that merges."
            )
        self.quantised: dict[str, str] = {}
        self._socket, self._patcher = socket, patcher
        self._originals = _originals(patcher)
        self._owners = dict(_owners(patcher.model))
        hooks = patcher.get_combined_hook_patches(patcher.forced_hooks)  # of a CLIP, by a node
        self._hooked = frozenset(hooks)
        self._patches = {
            name: [*patcher.patches.get(name, ()), *hooks.get(name, ())]
            for name in {*patcher.patches, *hooks}
        }

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values, in the order of a state dict; a value is made when it is its turn."""
        for name in self._owners:
            yield name, self[name]

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        module, leaf = self._owners[name]
        weight: Any = self._originals.get(name, getattr(module, leaf))
        # Not detach(): of what was loaded half in inference mode that gives no views.
        weight = weight.data if type(weight) in (Tensor, nn.Parameter) else weight.detach()
        if weight.is_meta and type(weight) is Tensor:
            weight = torch.zeros(weight.shape, dtype=weight.dtype)  # as ComfyUI takes it
        device = self._patcher.load_device
        wide = self._dequantised(name, weight)
        kept = None
        if wide is None:
            kept = getattr(module, f"{leaf}_comfy_model_dtype", None) or weight.dtype
            weight = wide = weight.to(kept)  # a dynamic model's may still be of the file's type
        patches = self._patches.get(name)
        if patches:
            wide = wide.to(device, torch.float32, copy=True)
            base = {name: [(wide.clone(),)]} if name in self._hooked else None
            wide = comfy.lora.calculate_weight(patches, wide, name, original_weights=base)
            if kept is not None:
                wide = comfy.float.stochastic_rounding(wide, kept, seed=_seed(name))
        for wrapper in self._patcher.weight_wrapper_patches.get(name, ()):
            wide = self._wrapped(name, wrapper, wide.to(device, torch.float32, copy=True))
        return wide

    def _dequantised(self, name: str, weight: Tensor) -> Tensor | None:
        """A quantised weight's numbers, fp32; None for a plain one."""
        module, leaf = self._owners[name]
        if isinstance(weight, comfy.quant_ops.QuantizedTensor):
            self.quantised[name] = str(getattr(module, "quant_format", None) or weight.dtype)
            return weight.dequantize().float()  # the numbers that ComfyUI computes with
        if hasattr(weight, "tensor_type") and callable(getattr(module, "get_weight", None)):
            return self._from_gguf(name, weight)
        plain = type(weight) is Tensor
        if not plain or not (weight.is_floating_point() or leaf in module._buffers):
            kind = str(weight.dtype) if plain else type(weight).__name__
            raise HostError(
                f"{self._socket} holds {name} as {kind}, a quantisation that LoRA² cannot read; "
                "load the model in fp16, bf16, fp8 or scaled fp8."
            )
        convert = getattr(module, f"convert_{leaf}", None)  # of fp8 with a scale, until 0.3.x
        wide = weight if convert is None else convert(weight, inplace=False)
        if wide is weight:
            return None
        self.quantised[name] = f"scaled {weight.dtype}"
        return wide.float()

    def _from_gguf(self, name: str, weight: Any) -> Tensor:
        """By the layer's own way, without patches that a loaded clone has hung on the tensor."""
        bare = type(weight)(
            weight.data, tensor_type=weight.tensor_type, tensor_shape=weight.tensor_shape
        )
        layer: Any = self._owners[name][0]
        self.quantised[name] = f"GGUF {getattr(weight.tensor_type, 'name', weight.tensor_type)}"
        return layer.get_weight(bare, torch.float32).as_subclass(Tensor).float()

    def _wrapped(self, name: str, wrapper: Any, weight: Tensor) -> Tensor:
        found = wrapper(weight)
        if not isinstance(found, Tensor) or found.shape != weight.shape:
            kind = getattr(wrapper, "__qualname__", type(wrapper).__qualname__)
            raise HostError(
                f"{self._socket} has its weight {name} wrapped by {kind} of another node, which "
                "gives something else than a weight of its shape; leave that node out."
            )
        return found.detach()


def frozen(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A copy in RAM: no second model on the GPU."""
    return nn.Parameter(value.detach().to("cpu", dtype, copy=True), requires_grad=False)


def _originals(patcher: Any) -> dict[str, Tensor]:
    """What merging or loading has put something else for: in this patcher, its clones, or others
    of the same model."""
    found: dict[str, Tensor] = {}
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    for one in (*loaded, patcher):
        if one is not None and one.model is patcher.model:
            found |= {name: kept[0] for name, kept in one.hook_backup.items()}
            found |= {name: kept.weight for name, kept in one.backup.items()}
            found |= getattr(one, "backup_buffers", {})
    return found


def _owners(root: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Where each tensor of a state dict lies, in its order."""
    for path, module in root.named_modules():
        tensors = {**module._parameters, **module._buffers}
        # Loading without memory set aside puts them in the file's order, which is another.
        for leaf in sorted(tensors, key=lambda leaf: leaf != "weight"):
            passing = leaf in module._non_persistent_buffers_set
            if tensors[leaf] is not None and leaf not in _SCALES and not passing:
                yield f"{path}.{leaf}".lstrip("."), (module, leaf)


def _seed(name: str) -> int:
    """What ComfyUI rounds a merged weight with; it has moved the function."""
    where: Any = comfy.utils
    if not hasattr(where, "string_to_seed"):
        where = comfy.model_patcher
    return where.string_to_seed(name)
