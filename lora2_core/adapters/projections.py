"""Linear layers with adapters as one differentiable function: eq. 1 with ΔW of eq. 10.

Stateless. Layers that share their input, such as q, k and v of an attention, are computed
together. There are two exact ways, and the cheaper one is taken: through the ranks, y = W x +
B Λ (A x), which costs 3 · tokens · rank · (in + out) for a step; or through the merged weight,
y = (W + B Λ A) x, which costs tokens · in · out for its gradient whatever the rank. Neither keeps
anything of the outputs' size for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Merging takes half as many operations, which is what counts where layers are small.
_MERGING_FAVOUR = 4 / 3


def project(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    importances: Sequence[Tensor],
    ups: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """y_i = W_i x + b_i + B_i Λ_i A_i x for layers that share their input.

    ``x``: (…, in) in the dtype of the frozen ``weights``, (out_i, in) each; ``downs``: (rank_i,
    in); ``importances``: (rank_i,); ``ups``: (out_i, rank_i), these three in any float dtype.
    Returns (…, out_i) each. Gradients go to x, A, Λ and B.
    """
    if _merging_pays(x, weights, downs):
        return _merged(x, weights, biases, downs, importances, ups)
    if len(weights) == 1:
        return (_through_rank(x, weights[0], biases[0], downs[0], importances[0], ups[0]),)
    parts = (*weights, *biases, *downs, *importances, *ups)
    return _ThroughRanks.apply(x, len(weights), *parts)  # type: ignore[no-any-return]


def _merging_pays(x: Tensor, weights: Sequence[Tensor], downs: Sequence[Tensor]) -> bool:
    if x.dtype != torch.float32:
        return False  # W + ΔW rounded to 8 or 11 bits would lose a small ΔW
    full = sum(weight.numel() for weight in weights)
    sides = zip(weights, downs, strict=True)
    through_ranks = 3 * sum(down.shape[0] * sum(weight.shape) for weight, down in sides)
    return full < _MERGING_FAVOUR * through_ranks


def _merged(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    importances: Sequence[Tensor],
    ups: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    parts = zip(weights, biases, downs, importances, ups, strict=True)
    return tuple(
        F.linear(x, torch.addmm(weight, up * scale, down), bias)
        for weight, bias, down, scale, up in parts
    )


def _through_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, scale: Tensor, up: Tensor
) -> Tensor:
    """One layer alone: what is saved by sharing does not pay for a function of our own."""
    rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
    hidden = F.linear(rows, down.to(x.dtype)) * scale.to(x.dtype)  # (tokens, rank)
    flat = F.linear(rows, weight, bias).addmm_(hidden, up.to(x.dtype).t())  # (tokens, out)
    return flat.view(*x.shape[:-1], -1)


class _ThroughRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, count: int, *parts: Tensor | None):  # type: ignore[override]
        weights, biases, downs, importances, ups = _fifths(parts, count)
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        ranks = [down.shape[0] for down in downs]
        down = _joined(downs).to(x.dtype)  # (Σ rank, in)
        scale = _joined(importances).to(x.dtype)  # (Σ rank,)
        ups = [up.to(x.dtype) for up in ups]
        hidden = rows @ down.t()  # (tokens, Σ rank)
        scaled = (hidden * scale).split(ranks, 1)  # (tokens, rank) each
        outputs = []
        for weight, bias, up, part in zip(weights, biases, ups, scaled, strict=True):
            flat = _linear(rows, weight, bias)
            outputs.append(flat.addmm_(part, up.t()).view(*x.shape[:-1], -1))
        ctx.save_for_backward(x, hidden, down, scale, *weights, *ups)
        ctx.ranks = ranks
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        x, hidden, down, scale, *rest = ctx.saved_tensors
        count = len(ctx.ranks)
        weights, ups = rest[:count], rest[count:]
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # (tokens, out) each
        scaled = (hidden * scale).split(ctx.ranks, 1)
        grad_ups = [g.t() @ part for g, part in zip(flat, scaled, strict=True)]
        grad_scaled = _joined([g @ up for g, up in zip(flat, ups, strict=True)], 1)
        grad_hidden = grad_scaled * scale  # (tokens, Σ rank)
        grad_downs = (grad_hidden.t() @ rows).split(ctx.ranks)
        grad_importances: Sequence[Tensor | None] = [None] * count
        if ctx.needs_input_grad[2 + 3 * count]:
            grad_importances = (grad_scaled * hidden).sum(0).split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_hidden @ down  # (tokens, in)
            for g, weight in zip(flat, weights, strict=True):
                grad_x.addmm_(g, weight)
            grad_x = grad_x.view_as(x)
        frozen = [None] * (2 * count)
        # autograd casts each to the dtype of its own input
        return grad_x, None, *frozen, *grad_downs, *grad_importances, *grad_ups


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _fifths(parts: Sequence, count: int) -> list[Sequence]:
    return [parts[n * count : (n + 1) * count] for n in range(5)]
