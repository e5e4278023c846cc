"""The loss: eq. 11 to 14, and the Gaussian priors of eq. 9.

The rank terms of eq. 12 are in :mod:`..adaptive_rank` since they are about ν alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adaptive_rank import denoising_loss

# Attention scores computed at once. On a CPU 16 MB in fp32, which caches nearly hold; on a GPU
# 64 MB: there calls cost more than what they compute, so that maps alike are gathered up to that.
_SCORES_CPU, _SCORES = 1 << 22, 1 << 24
_SMALL_MAP_CPU = 1 << 17  # scores up to which copying maps together costs a CPU less than calls


@dataclass(frozen=True)
class Prediction:
    """What a model said of a batch, and what it should have said."""

    value: Tensor  # (batch, …), in units of the network's output
    target: Tensor  # same shape
    weight: Tensor | None = None  # fp32, broadcasts to value: masks, min-SNR, priors; None is 1
    class_images: int = 0  # rows at the end that are class images (prior preservation)


def loss_parts(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """The loss of the photos and that of the class images; scalars that add up to the loss."""
    loss = denoising_loss(prediction.value, prediction.target, prediction.weight)
    if not prediction.class_images:
        return loss, torch.zeros_like(loss)
    rows = slice(-prediction.class_images, None)
    weight = prediction.weight if prediction.weight is None else prediction.weight[rows]
    share = prediction.class_images / prediction.value.shape[0]
    prior = share * denoising_loss(prediction.value[rows], prediction.target[rows], weight)
    return loss - prior, prior


def attention_entropy(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Mean entropy of the rows of one attention map, in nats; a term of eq. 13.

    −E_p[log p] with p = softmax(q kᵀ/√d) over the text tokens, averaged over images, heads and
    image tokens. ``query``: (batch, tokens, heads·d), ``key``: (batch, text, heads·d). Returns an
    fp32 scalar between 0 and ln(text). The map is never stored: it is built chunk by
    chunk from q and k (126 million elements a sample at 1024 px on SDXL otherwise).
    """
    return _AttentionEntropy.apply(query, key, heads)  # type: ignore[no-any-return]


class _AttentionEntropy(torch.autograd.Function):
    """The gradient is computed beside the value: one softmax instead of two, and what is kept for
    the backward pass is as small as q and k."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, heads: int) -> Tensor:  # type: ignore[override]
        q, k = _split_heads(query, heads), _split_heads(key, heads)  # (batch · heads, ·, d)
        learning = any(ctx.needs_input_grad)
        scale = 1 / math.sqrt(q.shape[-1])
        totals, grads_q, grad_k = [], [], None
        for rows in _chunks(q, k):
            log_p = _log_attention(q[:, rows], k, scale)  # (batch · heads, rows, text)
            p = log_p.exp()
            plogp = log_p.mul_(p)
            of_rows = plogp.sum(-1, keepdim=True)  # −H
            totals.append(of_rows.sum())
            if learning:
                # −dH/ds = p (log p + H), unscaled, so that fp16 can hold it
                slope = plogp.addcmul_(p, of_rows, value=-1)
                grads_q.append(torch.bmm(slope, k))
                of_keys = torch.bmm(slope.transpose(1, 2), q[:, rows])
                grad_k = of_keys if grad_k is None else grad_k.add_(of_keys)
        count = q.shape[0] * q.shape[1]
        if grad_k is not None:
            grad_q = grads_q[0] if len(grads_q) == 1 else torch.cat(grads_q, 1)
            ctx.save_for_backward(_join_heads(grad_q, query), _join_heads(grad_k, key))
            ctx.scale = -scale / count
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
        return total * (-1 / count)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        size = grad * ctx.scale
        grad_q, grad_k = (kept * size for kept in ctx.saved_tensors)
        return grad_q, grad_k, None


class CrossAttentionEntropy:
    """Collects eq. 13 over the cross-attention layers of a model during its forward pass.

    ``layers``: modules with ``to_q``, ``to_k`` and ``heads``. Forward hooks on the two
    projections see what the attention itself sees and collide with nobody's attention patches.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.gathers = True  # maps alike; False computes each where it arises
        self.apart: Collection[nn.Module] = ()  # layers of which each is computed so
        self._terms: list[Tensor] = []
        self._gathered = 0  # layers beyond one a term
        self._waiting: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        self._collects = False

    @property
    def is_collecting(self) -> bool:
        return self._collects

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hooks in, forget earlier terms; hooks out at the end whatever happens."""
        self._terms, self._waiting, self._gathered = [], {}, 0
        self._collects = True
        try:
            with self._hooked(self.layers, self._terms):
                yield
        finally:
            self._collects = False

    @contextmanager
    def each_in_its_place(self) -> Iterator[None]:
        """Collects as :meth:`collecting` does, but gathers nothing: for who counts by block."""
        gathers, self.gathers = self.gathers, False
        try:
            with self.collecting():
                yield
        finally:
            self.gathers = gathers

    def repeating(self, layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Inside, ``layers`` compute their terms once more, and nobody collects them.

        A checkpoint's second pass must save what the first one saved: the terms take their
        gradient from it, long after ``collecting`` has ended.
        """
        return self._hooked(layers, [])

    @contextmanager
    def _hooked(self, layers: Sequence[nn.Module], terms: list[Tensor]) -> Iterator[None]:
        handles = [handle for layer in layers for handle in self._hook(layer, terms)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def value(self) -> Tensor:
        """L_entropy, the mean over the collected layers; a scalar."""
        waiting, self._waiting = self._waiting, {}
        for (heads, *_), pairs in waiting.items():
            most = max(1, _at_once(pairs[0][0]) // _scores(*pairs[0], heads))
            for first in range(0, len(pairs), most):
                queries, keys = zip(*pairs[first : first + most], strict=True)
                together = attention_entropy(torch.cat(queries), torch.cat(keys), heads)
                self._terms.append(len(queries) * together)
                self._gathered += len(queries) - 1
        if not self._terms:
            raise RuntimeError("no cross-attention ran while its entropy was collected")
        return torch.stack(self._terms).sum() / (len(self._terms) + self._gathered)

    def _hook(
        self, layer: nn.Module, terms: list[Tensor]
    ) -> Iterator[torch.utils.hooks.RemovableHandle]:
        query: list[Tensor] = []
        heads = int(layer.heads)  # type: ignore[arg-type]

        def keep_query(_module: nn.Module, _args: object, output: Tensor) -> None:
            query[:] = [output]

        def add_term(_module: nn.Module, _args: object, output: Tensor) -> None:
            q = query.pop()
            gathers = self.gathers and layer not in self.apart
            if gathers and _scores(q, output, heads) <= _small_map(q):
                alike = heads, q.shape, output.shape, q.dtype
                self._waiting.setdefault(alike, []).append((q, output))
            else:
                terms.append(attention_entropy(q, output, heads))

        yield layer.to_q.register_forward_hook(keep_query)  # type: ignore[union-attr,operator]
        yield layer.to_k.register_forward_hook(add_term)  # type: ignore[union-attr,operator]


def _at_once(tensor: Tensor) -> int:
    return _SCORES_CPU if tensor.device.type == "cpu" else _SCORES


def _small_map(tensor: Tensor) -> int:
    return _SMALL_MAP_CPU if tensor.device.type == "cpu" else _SCORES // 2


def _scores(query: Tensor, key: Tensor, heads: int) -> int:
    return query.shape[0] * heads * query.shape[1] * key.shape[1]


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    """(batch, n, heads·d) → (batch · heads, n, d), fp32."""
    batch, n, width = tensor.shape
    split = tensor.view(batch, n, heads, width // heads).transpose(1, 2)
    copied = split.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return copied.view(batch * heads, n, width // heads)


def _join_heads(tensor: Tensor, like: Tensor) -> Tensor:
    batch, n, width = like.shape
    joined = tensor.view(batch, -1, n, tensor.shape[-1]).transpose(1, 2)
    copied = joined.to(like.dtype, copy=True, memory_format=torch.contiguous_format)
    return copied.view(batch, n, width)


def _log_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """log softmax(q kᵀ · scale); (batch · heads, rows, text)."""
    blank = q.new_empty(())
    return torch.baddbmm(blank, q, k.transpose(1, 2), beta=0, alpha=scale).log_softmax(-1)


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    size = max(1, _at_once(q) // (q.shape[0] * k.shape[1]))
    for start in range(0, q.shape[1], size):
        yield slice(start, start + size)
