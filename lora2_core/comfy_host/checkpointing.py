"""Gradient checkpointing: keep what goes into a transformer block and compute the block twice.

The paper trains with it on. ComfyUI's own flags do nothing where all weights are frozen; this
works on the blocks of a private copy, whose names, classes and weights stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import comfy.ldm.modules.attention
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..training.objective import CrossAttentionEntropy
from .running import deaf_to_cancel

Level = Literal["block", "transformer"]
_KINDS: dict[Level, str] = {"block": "BasicTransformerBlock", "transformer": "SpatialTransformer"}


def checkpoint_blocks(
    model: nn.Module,
    level: Level = "block",
    entropy: CrossAttentionEntropy | None = None,
    which: Collection[int] | None = None,
) -> None:
    """Let the blocks of a private U-Net forget their activations until the backward pass.

    ``level``: a checkpoint for every block, or only one for all blocks of a spatial transformer,
    which keeps less still. ``entropy``: whose terms the blocks yield while it collects.
    ``which``: numbers of the blocks, in their order; None for all. May be called again, with
    another level too. Gradients stay exactly the same. Raises ValueError for a
    model without such blocks.
    """
    remove_checkpoints(model)
    blocks = blocks_of(model, level)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no {_KINDS[level]} to checkpoint; switch "
            "gradient_checkpointing off."
        )
    chosen = [block for n, block in enumerate(blocks) if which is None or n in which]
    if entropy is not None:  # a gathered map would live on outside of its block
        inside = {module for block in chosen for module in block.modules()}
        entropy.apart = inside.intersection(entropy.layers)
    for block in chosen:
        block.forward = _Checkpoint(block, entropy)


def blocks_of(model: nn.Module, level: Level = "block") -> list[nn.Module]:
    """The parts of ``model`` that :func:`checkpoint_blocks` computes twice."""
    kind = getattr(comfy.ldm.modules.attention, _KINDS[level])
    return [module for module in model.modules() if isinstance(module, kind)]


def remove_checkpoints(model: nn.Module) -> None:
    """Undo :func:`checkpoint_blocks`."""
    for module in model.modules():
        if isinstance(module.forward, _Checkpoint):
            module.forward = module.forward.once


def is_checkpointed(model: nn.Module) -> bool:
    """Whether any block of ``model`` is computed twice."""
    return any(isinstance(module.forward, _Checkpoint) for module in model.modules())


def recomputed(
    run: Callable[..., Tensor],
    *args: Any,
    again: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """``run(*args)``, whose activations are computed once more when the backward pass wants them.

    ``again``: makes the context of that second pass.
    """
    passes = itertools.count()

    def one_pass(*args: Any) -> Tensor:
        if next(passes) == 0:
            return run(*args)
        # A GPU's backward runs in a thread of PyTorch's, which no job has made deaf to Cancel.
        with deaf_to_cancel(), again():
            return run(*args)

    # Without the RNG's state: nothing random is at work here, and restoring the global generator
    # would change what a prompt draws at the same moment.
    return checkpoint(one_pass, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class _Checkpoint:
    """Takes the place of a block's ``forward``; the original is ``once``."""

    def __init__(self, block: nn.Module, entropy: CrossAttentionEntropy | None):
        self.once: Callable[..., Tensor] = block.forward
        inside = set(block.modules())
        self._layers = [layer for layer in entropy.layers if layer in inside] if entropy else []
        self._entropy = entropy

    def __call__(
        self, x: Tensor, context: Any = None, transformer_options: dict[str, Any] | None = None
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        if not torch.is_grad_enabled():
            return self.once(x, context, options)
        # The blocks that follow write their own place into it: the second pass must read what
        # this one did.
        found = dict(options)
        collects = self._entropy is not None and self._entropy.is_collecting
        again = self._repeating if collects else nullcontext
        return recomputed(
            lambda x, context: self.once(x, context, dict(found)), x, context, again=again
        )

    def _repeating(self) -> AbstractContextManager[None]:
        return self._entropy.repeating(self._layers) if self._entropy else nullcontext()
