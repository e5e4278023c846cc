"""Linear layers with adapters as one differentiable function: eq. 1 with ΔW of eq. 10.

Stateless. Layers that share their input, such as q, k and v of an attention, are computed
together. There are two exact ways, and the cheaper one is taken: through the ranks, y = W x +
B (ΛA x), which costs 3 · tokens · rank · (in + out) for a step; or through the merged weight,
y = (W + B ΛA) x, which costs tokens · in · out for its gradient whatever the rank. Neither keeps
anything of the outputs' size for the backward pass. Sums are added up where the products are
made: on a GPU a call costs more than what it computes on a small layer.
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
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, ups: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """y_i = W_i x + b_i + B_i Λ_i A_i x for layers that share their input.

    ``x``: (…, in); ``weight``: every frozen W_i, one below the other, (Σ out, in), and ``bias``
    (Σ out,); ``down``: every Λ_i A_i, (Σ rank, in); ``ups``: B_i transposed, (rank_i, out_i). All
    in one dtype. Returns (…, out_i) each, parts of one tensor. Gradients go to x, ``down`` and
    ``ups``.
    """
    way = _Merged if _merging_pays(x, weight, ups) else _ThroughRanks
    return way.apply(x, weight, bias, down, *ups)  # type: ignore[return-value]


def _merging_pays(x: Tensor, weight: Tensor, ups: Sequence[Tensor]) -> bool:
    if x.dtype != torch.float32:
        return False  # W + ΔW rounded to 8 or 11 bits would lose a small ΔW
    inner = weight.shape[1]
    through_ranks = 3 * sum(rank * (inner + out) for rank, out in (up.shape for up in ups))
    return weight.numel() < _MERGING_FAVOUR * through_ranks


class _ThroughRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, *ups: Tensor):  # type: ignore[override]
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        hidden = rows @ down.t()  # (tokens, Σ rank)
        outputs = _own_outputs(F.linear(x, weight, bias), ups)  # (…, out) each
        for out, part, up in zip(outputs, _by_rank(hidden, ups, 1), ups, strict=True):
            out.view(-1, out.shape[-1]).addmm_(part, up)
        ctx.save_for_backward(x, weight, hidden, down, *ups)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        x, weight, hidden, down, *ups = ctx.saved_tensors
        rows, flat = x.reshape(-1, x.shape[-1]), _flat(grads)
        sides = list(zip(_by_rank(hidden, ups, 1), flat, ups, strict=True))
        grad_ups = [part.t() @ grad for part, grad, _ in sides]  # (rank, out) each
        grad_hidden = _joined([grad @ up.t() for _, grad, up in sides], 1)  # (tokens, Σ rank)
        grad_down = grad_hidden.t() @ rows  # (Σ rank, in)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_hidden @ down  # (tokens, in)
            for grad, part in zip(flat, _by_output(weight, ups), strict=True):
                grad_x.addmm_(grad, part)
            grad_x = grad_x.view_as(x)
        return grad_x, None, None, grad_down, *grad_ups


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, *ups: Tensor):  # type: ignore[override]
        merged = torch.empty_like(weight)  # (Σ out, in)
        parts = zip(
            _by_output(merged, ups), _by_output(weight, ups), _by_rank(down, ups), ups, strict=True
        )
        for whole, frozen, part, up in parts:
            torch.addmm(frozen, up.t(), part, out=whole)
        ctx.save_for_backward(x, merged, down, *ups)
        return tuple(_own_outputs(F.linear(x, merged, bias), ups))  # (…, out) each

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        x, merged, down, *ups = ctx.saved_tensors
        rows, flat = x.reshape(-1, x.shape[-1]), _flat(grads)
        grad_weights = [grad.t() @ rows for grad in flat]  # (out, in) each
        sides = list(zip(_by_rank(down, ups), grad_weights, ups, strict=True))
        grad_ups = [part @ grad.t() for part, grad, _ in sides]  # (rank, out) each
        grad_down = _joined([up @ grad for _, grad, up in sides])  # (Σ rank, in)
        grad_x = None
        if ctx.needs_input_grad[0]:
            parts = _by_output(merged, ups)
            grad_x = flat[0] @ parts[0]  # (tokens, in)
            for grad, part in zip(flat[1:], parts[1:], strict=True):
                grad_x.addmm_(grad, part)
            grad_x = grad_x.view_as(x)
        return grad_x, None, None, grad_down, *grad_ups


def _flat(grads: Sequence[Tensor]) -> list[Tensor]:
    return [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # (tokens, out) each


def _by_rank(joined: Tensor, ups: Sequence[Tensor], dim: int = 0) -> Sequence[Tensor]:
    """What belongs to each layer along the dimension of all ranks, views."""
    return joined.split([up.shape[0] for up in ups], dim)


def _by_output(joined: Tensor, ups: Sequence[Tensor]) -> Sequence[Tensor]:
    """What belongs to each layer along the first dimension, of all outputs, views."""
    return joined.split([up.shape[1] for up in ups])


def _own_outputs(joined: Tensor, ups: Sequence[Tensor]) -> Sequence[Tensor]:
    """The outputs of each layer, which a model may change in place: autograd refuses that for
    views that a function of our own returns. They lie side by side and never overlap."""
    return torch.unsafe_split_with_sizes(joined, [up.shape[1] for up in ups], -1)


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
