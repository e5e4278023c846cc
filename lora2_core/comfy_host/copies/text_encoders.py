"""SDXL's two text encoders as private copies that adapters can be trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import comfy.clip_model
import comfy.sd1_clip
import comfy.sdxl_clip
import torch
from torch import Tensor, nn

from .. import surface
from ..checkpointing import recomputed
from ..errors import HostError
from .structure import copied, free_of_holders
from .weights import Weights

if TYPE_CHECKING:
    from comfy.clip_model import CLIPLayer

# Our name of a tower, ComfyUI's, and the tokenizer's. Kohya's keys start with the first.
_TOWERS = (("te1", "clip_l", "l"), ("te2", "clip_g", "g"))

Window = list[tuple[Any, float]]  # 77 tokens with their weights; a learnt embedding is a tensor


class _Read(NamedTuple):
    """What one tower says of some texts."""

    contexts: list[Tensor]  # (tokens, width) of each text, 77 tokens a window
    pooled: Tensor  # (texts, width), of the first window


class TextEncoders:
    """What ``clip`` makes of texts, computed by copies of its towers; frozen but for adapters.

    ``clip``: a CLIP of SDXL; its patches and its choice of layer go into the copies, and nothing
    of it changes. ``device``: of the copies; by default where ComfyUI would compute.
    ``checkpointing``: compute every layer twice instead of keeping its activations and, where the
    CLIP is in half precision, its weights cast to fp32. Computes in fp32 as ComfyUI does. May be
    made under inference mode. Raises HostError for a CLIP of another family.
    """

    @torch.inference_mode(False)
    def __init__(self, clip: Any, device: torch.device | None = None, checkpointing: bool = False):
        surface.need(surface.Part.TEXT)
        model = clip.cond_stage_model
        if not isinstance(model, comfy.sdxl_clip.SDXLClipModel):
            raise HostError(
                f"clip is a {type(model).__name__}; the text encoders of SDXL are trained. Connect "
                "the CLIP of an SDXL checkpoint."
            )
        weights = Weights(clip.patcher, "clip")
        self._tokenizer, self._options = clip.tokenizer, dict(clip.tokenizer_options)
        self.load_device = clip.patcher.load_device  # where ComfyUI would compute
        self._towers = {
            root: _private_tower(model, name, weights, clip.layer_idx, checkpointing)
            for root, name, _ in _TOWERS
        }
        self.move_to(self.load_device if device is None else device)
        _cut_above_read_layer(self._towers["te1"])  # its pooled embedding is not used

    def move_to(self, device: torch.device) -> None:
        """Before adapters are put on them."""
        for tower in self._towers.values():
            tower.transformer.to(device)

    @property
    def roots(self) -> dict[str, nn.Module]:
        """The modules whose layers can be adapted: "te1" is CLIP-L, "te2" is CLIP-G.

        The layers of te1 above the one that is read are missing: they would learn nothing.
        """
        return {root: tower.transformer for root, tower in self._towers.items()}

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Contexts (texts, tokens, width) and pooled embeddings (texts, width), fp32.

        As CLIPTextEncode gives them, weights in parentheses included. Texts of several windows of
        77 tokens make the others repeat theirs, as ComfyUI does when it samples them together.
        Differentiable with respect to the adapters.
        """
        if not texts:
            raise ValueError("no text to read; give at least one, which may be empty.")
        tokens = [self._tokens(text) for text in texts]
        reads = [
            _read(self._towers[root], [found[key] for found in tokens]) for root, _, key in _TOWERS
        ]
        contexts = []
        for parts in zip(*(read.contexts for read in reads), strict=True):
            shortest = min(len(part) for part in parts)
            contexts.append(torch.cat([part[:shortest] for part in parts], -1))
        length = math.lcm(*(len(context) for context in contexts))
        repeated = [context.repeat(length // len(context), 1) for context in contexts]
        return torch.stack(repeated), reads[-1].pooled

    def _tokens(self, text: str) -> dict[str, list[Window]]:
        options = {"tokenizer_options": dict(self._options)} if self._options else {}
        return self._tokenizer.tokenize_with_weights(text, False, **options)


def _private_tower(
    model: Any, name: str, weights: Weights, layer: int | None, checkpointing: bool
) -> Any:
    """ComfyUI's encoder around a copy of its network."""
    tower = getattr(model, name)
    kept = tower.transformer.dtype if checkpointing else torch.float32
    if kept not in (torch.float16, torch.bfloat16):
        kept = torch.float32  # fp8 too: casting it anew for every use would cost more than it saves
    private = tower.__class__.__new__(tower.__class__)
    private.__dict__ = free_of_holders(tower.__dict__)
    network = copied(tower.transformer, weights, f"{name}.transformer.", kept)
    private._modules = {**tower._modules, "transformer": network}
    private.reset_clip_options()
    if layer is not None:
        private.set_clip_options({"layer": layer})
    for module in private.transformer.modules():
        if isinstance(module, comfy.clip_model.CLIPLayer):
            module.forward = _Layer(module, checkpointing)
    return private


def _cut_above_read_layer(tower: Any) -> None:
    if tower.layer != "hidden":
        return
    encoder = tower.transformer.text_model.encoder
    read = range(len(encoder.layers))[tower.layer_idx]
    encoder.layers = encoder.layers[: read + 1]
    tower.layer_idx = read  # it may have been counted from the end


class _Layer:
    """A CLIPLayer's forward that leaves its input alone: ComfyUI's adds to it in place, which
    overwrites what the backward pass needs."""

    def __init__(self, layer: CLIPLayer, checkpointing: bool):
        self._layer, self._checkpointing = layer, checkpointing

    def __call__(self, x: Tensor, mask: Tensor | None = None, optimized_attention: Any = None):
        if self._checkpointing and torch.is_grad_enabled():
            return recomputed(self._once, x, mask, optimized_attention)
        return self._once(x, mask, optimized_attention)

    def _once(self, x: Tensor, mask: Tensor | None, attention: Any) -> Tensor:
        layer = self._layer
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention)
        return x + layer.mlp(layer.layer_norm2(x))


def _read(tower: Any, texts: Sequence[list[Window]]) -> _Read:
    """All windows of all texts in one pass."""
    windows = [window for text in texts for window in text]
    weighted = any(weight != 1 for window in windows for _, weight in window)
    tokens = [[token for token, _ in window] for window in windows]
    if weighted:
        tokens.append(comfy.sd1_clip.gen_empty_tokens(tower.special_tokens, len(tokens[0])))
    hidden, pooled = tower(tokens)[:2]  # (windows, 77, width), (windows, width)
    if weighted:
        hidden = _weighed(hidden[:-1], hidden[-1], windows)
    counts = [len(text) for text in texts]
    firsts = [sum(counts[:place]) for place in range(len(counts))]
    return _Read([part.flatten(0, 1) for part in hidden.split(counts)], pooled[firsts])


def _weighed(hidden: Tensor, empty: Tensor, windows: Sequence[Window]) -> Tensor:
    """ComfyUI's weights in parentheses: away from what the empty prompt says at that place."""
    weights = torch.tensor([[weight for _, weight in window] for window in windows])
    weights = weights.to(hidden)[..., None]  # (windows, 77, 1)
    return torch.where(weights == 1, hidden, empty + (hidden - empty) * weights)
