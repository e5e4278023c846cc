"""The mathematics of LoRA² as pure functions of tensors.

Source: "Not All Layers Are Created Equal: Adaptive LoRA Ranks for Personalized Image
Generation", arXiv 2603.21884, section 3. A component ℓ adds ΔW = B Λ A to a frozen weight,
where Λ = diag(f(1; ν), …, f(D; ν)) ranks the columns of B by importance and D, the effective
rank, is where the importance distribution reaches its q-quantile. ν is the only parameter
that decides a rank, and it learns by gradient descent like any other weight.

Three modes share every function. ``"paper"`` is the literal text. ``"balanced"``, ours, divides
the importance by its first entry: Λ then keeps the paper's order and drop-off but starts at 1
for every ν, so a change of ν says something about the rank and nothing about the overall scale.
``"fixed"`` is a plain LoRA, to compare with: Λ = 1, so no rank has a reason to move.

Shapes: L components, D = rank. Units: ranks are counts, ν is 1/rank, everything else is
dimensionless.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["balanced", "paper", "fixed"]
MODES: tuple[Mode, ...] = ("balanced", "paper", "fixed")

# −ln(1−q)/ν can land a hair above an integer because ν is fp32: without this allowance a file
# that stored rank 8 would come back as rank 9. It covers ν = exp(log ν) with log ν in fp32 too.
_CEIL_TOLERANCE = 1e-6


def importance_at(nu: Tensor, position: Tensor, mode: Mode = "paper") -> Tensor:
    """Importance of the rank at a 1-based ``position``; eq. 10 with f of section 3.2.

    f(x; ν) = (1 − e^{−ν(x+1)}) − (1 − e^{−νx}) = e^{−νx} (1 − e^{−ν}), and in ``balanced``
    mode f(x; ν)/f(1; ν) = e^{−ν(x−1)}. In ``fixed`` mode 1, without a gradient to ν.

    ``nu`` and ``position`` broadcast against each other. The result is fp32 or wider: the
    difference of two rounded exponentials in bf16 would give zeros from the 200th rank on.
    """
    _check_mode(mode)
    nu = _as_float(nu)
    if mode == "fixed":
        return torch.ones_like(nu * position)
    if mode == "balanced":
        return torch.exp(-nu * (position - 1))
    return torch.exp(-nu * position) * -torch.expm1(-nu)


def importance(nu: Tensor, rank: int, mode: Mode = "paper") -> Tensor:
    """The diagonal of Λ for ranks 1…``rank``; eq. 10.

    ``nu``: any shape (…), positive. Returns (…, rank), positive and strictly decreasing as
    long as fp32 can tell the entries apart; all 1 in ``fixed`` mode.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; a component has at least rank 1.")
    position = torch.arange(1, rank + 1, device=nu.device)  # (rank,)
    return importance_at(nu.unsqueeze(-1), position, mode)  # (…, rank)


def expected_rank(nu: Tensor, quantile: float) -> Tensor:
    """The effective rank before rounding, r = −ln(1−q)/ν: differentiable, in ranks."""
    return _log_tail(quantile) / nu


def effective_rank(
    nu: Tensor, quantile: float, max_rank: int | Tensor, min_rank: int | Tensor = 1
) -> Tensor:
    """D = ⌈−ln(1−q)/ν⌉ clipped to [``min_rank``, ``max_rank``]; section 3.2 (q-quantile of f).

    ``nu``: (L,); ``max_rank`` and ``min_rank`` (the paper: 1): numbers or (L,); where they cross
    the largest counts. Returns int64 (L,).
    """
    exact = expected_rank(nu.detach().double(), quantile)  # (L,)
    largest = torch.as_tensor(max_rank, dtype=torch.float64, device=nu.device)
    rounded = torch.ceil(exact * (1 - _CEIL_TOLERANCE))
    smallest = torch.as_tensor(min_rank, dtype=torch.float64, device=nu.device)
    # Clipping before the cast keeps ν = 0 (infinite rank) finite.
    return torch.minimum(torch.maximum(rounded, smallest), largest).long()


def nu_for_rank(rank: float, quantile: float) -> float:
    """ν whose effective rank is ``rank``; eq. 12 with r_target = ``rank``."""
    if not rank > 0:
        raise ValueError(f"rank is {rank}; ν exists only for a rank above 0.")
    return _log_tail(quantile) / rank


def init_std(nu: Tensor, rank: int | Tensor) -> Tensor:
    """Standard deviation of A at the start, √2 / √(Σ_{j≤D} f²(j)); section 3.3.1.

    ``nu``: (L,); ``rank``: a number or (L,). Returns fp32 (L,). The sum is geometric, so it is
    evaluated in closed form, Σ f² = (1−e^{−ν})² e^{−2ν} (1−e^{−2νD}) / (1−e^{−2ν}), in fp64:
    a term-by-term fp32 sum of 512 squares near 1e-5 loses three digits.
    """
    nu64 = nu.detach().double()
    rank64 = torch.as_tensor(rank, dtype=torch.float64, device=nu.device)
    first = torch.expm1(-nu64).square() * torch.exp(-2 * nu64)  # f(1)², (L,)
    ratio_sum = torch.expm1(-2 * nu64 * rank64) / torch.expm1(-2 * nu64)
    # The floor keeps the result finite in fp32 where f² underflows (ν above 80).
    total = (first * ratio_sum).clamp(min=1e-70)
    return (math.sqrt(2) / total.sqrt()).float()


def hysteresis(rank: Tensor, proposed: Tensor) -> Tensor:
    """``proposed`` where it left ``rank`` by more than ½√rank, else ``rank``; both int64 (L,).

    Ours: without it a component whose ν sits at a rounding edge grows and shrinks at every
    step and never trains its last row (measured: 898 resizes against 171 at the same loss).
    """
    moved = (proposed - rank).abs().double() > 0.5 * rank.double().sqrt()
    return torch.where(moved, proposed, rank)


def rank_penalty(nu: Tensor, target_rank: float, quantile: float) -> Tensor:
    """L_reg = Σ_ℓ |ν_ℓ − ν_target|; eq. 12. ``nu``: (L,). Returns a scalar."""
    return (nu - nu_for_rank(target_rank, quantile)).abs().sum()


def rank_budget(nu: Tensor, weight: Tensor, target_rank: float | Tensor, quantile: float) -> Tensor:
    """Mean expected rank in units of its target, Σ w_ℓ r_ℓ / (r_target Σ w_ℓ). Ours.

    The balanced mode's regulariser: linear in the rank, so each component pays the same for
    one more rank however large it is. ``weight``: (…, L), 1 to count ranks, in + out to count
    bytes, 0 for a component that another budget counts; ``target_rank``: a number or (…).
    Returns (…), 1 where a budget is met.
    """
    return (weight * expected_rank(nu, quantile)).sum(-1) / (weight.sum(-1) * target_rank)


def _log_tail(quantile: float) -> float:
    if not 0 < quantile < 1:
        raise ValueError(
            f"quantile is {quantile}; it must lie between 0 and 1, the paper uses 0.9."
        )
    return -math.log1p(-quantile)


def _as_float(nu: Tensor) -> Tensor:
    return nu if nu.dtype in (torch.float32, torch.float64) else nu.float()


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(MODES)}.")


def denoising_loss(value: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """L_MSE = (1/N) Σ ‖ε̂ − ε‖²; eq. 11, with ‖·‖² read as the mean over an image's elements.

    The mean is what the DreamBooth trainers use on which the paper builds; with the sum, λ_r and
    λ_e of 1e-4 would be 65,536 times weaker at 1024 px. Both: (batch, …). Where ``weight`` is 0
    an element counts as met. Returns an fp32 scalar.
    """
    squares = (value.float() - target.float()).square()
    return (squares if weight is None else squares * weight).mean()


def gaussian_prior(value: Tensor, mean: float, std: float) -> Tensor:
    """−Σ log N(value; mean, std) / N(value; value, 1), a term of eq. 9 as a loss.

    = Σ (value − mean)² / (2 std²) + n log std; the constants of the two densities cancel.
    """
    squares = (value.float() - mean).square().sum() / (2 * std * std)
    return squares + value.numel() * math.log(std)
