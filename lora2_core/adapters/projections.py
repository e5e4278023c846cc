"""Linear layers with adapters as one differentiable function: eq. 1 with ΔW of eq. 10.

Stateless. Layers that share their input, such as q, k and v of an attention, are computed as one
layer whose outputs lie side by side: their A one below the other, their B along the diagonal of
one matrix. There are two exact ways, and the cheaper one is taken: through the ranks, y = W x +
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
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, count: int = 1
) -> tuple[Tensor, ...]:
    """y = W x + b + B Λ A x, cut into the outputs of ``count`` layers of one width.

    ``x``: (…, in); ``weight``: frozen, (out, in), and ``bias``: (out,); ``down``: ΛA, (rank, in);
    ``up``: B transposed, (rank, out). All in one dtype. Returns (…, out / count) each, views of
    one tensor. Gradients go to x, ``down`` and ``up``. Where the outputs will be kept in any case,
    as those that attention reads are, ``weight`` may hold ``down`` as well, below, (out + rank,
    in): then one product computes W x and ΛA x, which are kept together.
    """
    way = _Merged if _merging_pays(x, down, up) else _ThroughRanks
    return way.apply(x, weight, bias, down, up, count)  # type: ignore[return-value]


def _merging_pays(x: Tensor, down: Tensor, up: Tensor) -> bool:
    if x.dtype != torch.float32:
        return False  # W + ΔW rounded to 8 or 11 bits would lose a small ΔW
    (rank, inner), out = down.shape, up.shape[1]
    return out * inner < _MERGING_FAVOUR * 3 * rank * (out + inner)


class _ThroughRanks(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, count: int
    ):
        whole, width = F.linear(x, weight, bias), up.shape[1]
        flat = whole.view(-1, whole.shape[-1])  # (tokens, out), or (tokens, out + rank)
        if len(weight) == width:
            outputs, hidden = _cut(whole, count), x.reshape(-1, x.shape[-1]) @ down.t()
            flat.addmm_(hidden, up)
        else:
            flat[:, :width].addmm_(flat[:, width:], up)
            *outputs, hidden = _cut(whole, count, len(down))
        ctx.save_for_backward(x, weight[:width], hidden, down, up)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        x, weight, hidden, down, up = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), _joined(grads)  # (tokens, in), (tokens, out)
        grad_up = hidden.reshape(-1, len(down)).t() @ grad  # (rank, out)
        grad_hidden = grad @ up.t()  # (tokens, rank)
        grad_down = grad_hidden.t() @ rows  # (rank, in)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_hidden, down).view_as(x)
        return grad_x, None, None, grad_down, grad_up, None


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, count: int
    ):
        merged = torch.addmm(weight[: up.shape[1]], up.t(), down)  # (out, in)
        ctx.save_for_backward(x, merged, down, up)
        return tuple(_cut(F.linear(x, merged, bias), count))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        x, merged, down, up = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), _joined(grads)  # (tokens, in), (tokens, out)
        grad_weight = grad.t() @ rows  # (out, in)
        grad_up = down @ grad_weight.t()  # (rank, out)
        grad_down = up @ grad_weight  # (rank, in)
        grad_x = (grad @ merged).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_down, grad_up, None


def _cut(whole: Tensor, count: int, rank: int = 0) -> Sequence[Tensor]:
    """(…, out + rank) → (…, out / count) each, and (…, rank).

    They lie side by side, and a model may change its own in place, which autograd refuses for views
    that a function of ours returns; a product with a bias is one already.
    """
    sizes = [(whole.shape[-1] - rank) // count] * count
    return torch.unsafe_split_with_sizes(whole, [*sizes, rank] if rank else sizes, -1)


def _joined(grads: Sequence[Tensor]) -> Tensor:
    """(…, out / count) each → (tokens, out)."""
    grad = grads[0] if len(grads) == 1 else torch.cat(list(grads), -1)
    return grad.reshape(-1, grad.shape[-1])
