"""The loss: eq. 11 to 14, and the Gaussian priors of eq. 9.

The rank terms of eq. 12 are in :mod:`.adaptive_rank` since they are about ν alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Attention scores kept in memory at once; 2²² fp32 scores are 16 MB.
_CHUNK_ELEMENTS = 1 << 22


def denoising_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_MSE = (1/N) Σ ‖ε̂ − ε‖²; eq. 11, with ‖·‖² read as the mean over an image's elements.

    The mean is what the DreamBooth trainers use on which the paper builds; with the sum, λ_r and
    λ_e of 1e-4 would be 65,536 times weaker at 1024 px. Both: (batch, …). Returns an fp32 scalar.
    """
    return (prediction.float() - target.float()).square().mean()


def gaussian_prior(value: Tensor, mean: float, std: float) -> Tensor:
    """−Σ log N(value; mean, std) / N(value; value, 1), a term of eq. 9 as a loss.

    = Σ (value − mean)² / (2 std²) + n log std; the constants of the two densities cancel.
    """
    squares = (value.float() - mean).square().sum() / (2 * std * std)
    return squares + value.numel() * math.log(std)


def attention_entropy(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Mean entropy of the rows of one attention map, in nats; a term of eq. 13.

    −E_p[log p] with p = softmax(q kᵀ/√d) over the text tokens, averaged over images, heads and
    image tokens. ``query``: (batch, tokens, heads·d), ``key``: (batch, text, heads·d). Returns an
    fp32 scalar between 0 and ln(text). The map is never stored: forward and backward rebuild it
    chunk by chunk from q and k (126 million elements a sample at 1024 px on SDXL otherwise).
    """
    return _AttentionEntropy.apply(query, key, heads)  # type: ignore[no-any-return]


class _AttentionEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, heads: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(query, key)
        ctx.heads = heads
        q, k = _split_heads(query, heads), _split_heads(key, heads)  # (batch, heads, ·, d)
        total = torch.zeros((), device=query.device)
        for rows in _chunks(q, k):
            log_p = _log_attention(q[:, :, rows], k)
            total -= (log_p.exp() * log_p).sum()
        return total / (q.shape[0] * q.shape[1] * q.shape[2])

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        query, key = ctx.saved_tensors
        q, k = _split_heads(query, ctx.heads), _split_heads(key, ctx.heads)
        scale = grad.float() / (q.shape[0] * q.shape[1] * q.shape[2] * math.sqrt(q.shape[3]))
        grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k)
        for rows in _chunks(q, k):
            log_p = _log_attention(q[:, :, rows], k)
            p = log_p.exp()
            plogp = p * log_p
            # dH/ds = −p (log p + H) with H = −Σ p log p
            grad_s = p * plogp.sum(-1, keepdim=True) - plogp  # (batch, heads, rows, text)
            grad_q[:, :, rows] = grad_s @ k * scale
            grad_k += grad_s.transpose(-1, -2) @ q[:, :, rows] * scale
        return _join_heads(grad_q, query), _join_heads(grad_k, key), None


class CrossAttentionEntropy:
    """Collects eq. 13 over the cross-attention layers of a model during its forward pass.

    ``layers``: modules with ``to_q``, ``to_k`` and ``heads``. Forward hooks on the two
    projections see what the attention itself sees and collide with nobody's attention patches.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self._terms: list[Tensor] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hooks in, forget earlier terms; hooks out at the end whatever happens."""
        self._terms = []
        handles = [handle for layer in self.layers for handle in self._hook(layer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def value(self) -> Tensor:
        """L_entropy, the mean over the collected layers; a scalar."""
        if not self._terms:
            raise RuntimeError("no cross-attention ran while its entropy was collected")
        return torch.stack(self._terms).mean()

    def _hook(self, layer: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        query: list[Tensor] = []
        heads = int(layer.heads)  # type: ignore[arg-type]

        def keep_query(_module: nn.Module, _args: object, output: Tensor) -> None:
            query[:] = [output]

        def add_term(_module: nn.Module, _args: object, output: Tensor) -> None:
            self._terms.append(attention_entropy(query.pop(), output, heads))

        yield layer.to_q.register_forward_hook(keep_query)  # type: ignore[union-attr,operator]
        yield layer.to_k.register_forward_hook(add_term)  # type: ignore[union-attr,operator]


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    """(batch, n, heads·d) → (batch, heads, n, d), fp32."""
    batch, n, width = tensor.shape
    return tensor.float().view(batch, n, heads, width // heads).transpose(1, 2)


def _join_heads(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.transpose(1, 2).reshape(like.shape).to(like.dtype)


def _log_attention(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).log_softmax(-1)


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    per_row = q.shape[0] * q.shape[1] * k.shape[2]
    size = max(1, _CHUNK_ELEMENTS // per_row)
    for start in range(0, q.shape[2], size):
        yield slice(start, start + size)
