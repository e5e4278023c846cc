"""One component of a LoRA: two factors, and what can be calculated without their product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Singular values below this share of a component's largest are rounding, not content.
_NOISE = 1e-12
# The same where inner products, which hold squares, are all that is looked at. What is that faint
# beside the columns themselves is rounding too: of columns that cancel, fp32 leaves no less.
_FAINT = 1e-7


@dataclass(frozen=True)
class Component:
    """One trained component, on the CPU: what a file needs."""

    name: str  # dotted path in the model that ``root`` names
    lora_down: Tensor  # (rank, in, …), fp32
    lora_up: Tensor  # (out, rank, …), fp32
    importance: Tensor  # (rank,), fp32
    nu: float | None  # None where LoRA² did not learn the rank
    root: str = "unet"  # or "te1", "te2": the text encoders; "file": ``name`` is a file's own key

    @property
    def rank(self) -> int:
        return self.importance.numel()

    @property
    def in_features(self) -> int:
        """Of the unrolled weight (out, in · kernel area)."""
        return math.prod(self.lora_down.shape[1:])

    @property
    def out_features(self) -> int:
        return self.lora_up.shape[0]

    def first(self, rank: int) -> Component:
        """The component cut to its first ``rank`` columns; 0 leaves nothing of it."""
        return Component(
            self.name,
            self.lora_down[:rank],
            self.lora_up[:, :rank],
            self.importance[:rank],
            self.nu,
            self.root,
        )


def component_from_tensors(
    name: str, down: Tensor, up: Tensor, alpha: float | None, mid: Tensor | None = None
) -> Component:
    """What a file holds of a component, in fp32, its scale alpha/rank taken into ``lora_up``.

    ``down``: (rank, in, …); ``up``: (out, rank, …), which comes out with as many dimensions;
    ``mid``: (rank, rank, height, width), the third factor of some convolutions, which is multiplied
    into ``lora_down`` (exact).
    """
    down, up = down.float(), up.float()
    if mid is not None:
        down = torch.einsum("abhw,bi->aihw", mid.float(), down.flatten(1))  # (rank, in, h, w)
    up = up.reshape(*up.shape[:2], *(1 for _ in down.shape[2:]))
    rank = down.shape[0]
    if alpha is not None and rank and alpha != rank:
        up = up * (alpha / rank)
    return Component(name, down, up, torch.ones(rank), nu=None, root="file")


def sum_of(name: str, components: Sequence[tuple[Component, float]]) -> Component:
    """The sum of weighted components as one, exactly: their columns side by side.

    All are of the same layer, of any rank. More columns than min(in, out) can say nothing more, and
    some readers refuse them; such a sum is decomposed, which is exact too.
    """
    first = components[0][0]
    down = torch.cat([c.lora_down for c, _ in components])  # (Σ rank, in, …)
    scaled = [_scaled(c, weight) for c, weight in components]
    up = torch.cat(scaled, dim=1)  # (out, Σ rank, …)
    nu = first.nu if len(components) == 1 else None  # that of a sum says nothing
    return within_bounds(Component(name, down, up, torch.ones(down.shape[0]), nu, first.root))


def within_bounds(component: Component) -> Component:
    """The same ΔW at a rank of min(in, out) at most: more says nothing, and some readers refuse.

    What is not finite cannot be decomposed and stays; writing it is refused with a sentence.
    """
    if component.rank <= min(component.in_features, component.out_features):
        return component
    sides = (component.lora_down, component.lora_up, component.importance)
    finite = all(bool(side.isfinite().all()) for side in sides)
    return decompose(component) if finite else component


def decompose(component: Component) -> Component:
    """The same ΔW as its singular value decomposition, columns of most weight first.

    By QR of both sides and the SVD of a rank × rank matrix, in fp64; ΔW itself (out × in) is never
    formed. Convolutions are unrolled for it. Columns that add nothing are gone.
    """
    if not component.rank:
        return component
    down, up = _sides(component)
    up_q, up_r = torch.linalg.qr(up * component.importance.double())  # (out, rank), (rank, rank)
    down_q, down_r = torch.linalg.qr(down.t())  # (in, rank), (rank, rank)
    left, values, right = torch.linalg.svd(up_r @ down_r.t())
    rank = int((values > _NOISE * values[0]).sum())
    new_up, new_down = up_q @ left[:, :rank], right[:rank] @ down_q.t()
    return _taken_apart(component, new_down, new_up, values[:rank])


def decompose_quickly(component: Component) -> Component:
    """:func:`decompose` to what :func:`singular_values` sees, by inner products.

    With DDᵀ = Q w Qᵀ and H = Q √w, the eigenvectors of HᵀUᵀUH turn the rows of D into the right
    singular vectors of U D: both sides follow by products with U and D alone.
    """
    if not component.rank:
        return component
    down, up = _sides(component)
    products = _Products(down, up, component.importance.double())
    squares, vectors = torch.linalg.eigh(products.inner)
    some = products.not_faint(squares)
    values, vectors = squares[some].flip(0).sqrt(), vectors[:, some].flip(1)
    new_up = up @ (products.of_up[:, None] * (products.half @ vectors) / values)  # (out, rank)
    # H = Q √w, so H w⁻¹ is the inverse of Hᵀ
    inverse = products.half / products.half.square().sum(0)
    new_down = ((inverse @ vectors).t() * products.of_down) @ down  # (rank, in)
    return _taken_apart(component, new_down, new_up, values)


def singular_values(component: Component) -> Tensor:
    """Those of ΔW, fp64 (min(rank, in, out) or fewer,), falling; no vectors are computed.

    From the rank × rank matrices of inner products: to 1e-7 of the largest, or of the columns'
    norm, below which they are left out. A few times faster than :func:`decompose`.
    """
    if not component.rank:
        return torch.zeros(0, dtype=torch.float64)
    products = _Products(*_sides(component), component.importance.double())
    squares = torch.linalg.eigvalsh(products.inner)
    return squares[products.not_faint(squares)].flip(0).sqrt()


def column_energies(component: Component) -> Tensor:
    """What each column adds when the columns before it are there, in the order of the file.

    Returns fp64 (rank,), in units of ‖ΔW‖²: the squared error of keeping the first n columns is
    the sum of what follows. Falls for a decomposition, and mostly for what LoRA² has learnt;
    entries are negative where a column works against the later ones: what it adds is then further
    from ΔW than nothing. Their sum never is.
    """
    if not component.rank:
        return torch.zeros(0, dtype=torch.float64)
    down, up = _sides(component)
    up = up * component.importance.double()
    products = (up.t() @ up) * (down @ down.t())  # (rank, rank)
    # ‖columns from n on‖²: the sums of the trailing squares of it
    tails = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)  # (rank,)
    tails = torch.where(tails > _FAINT**2 * products.diagonal().sum(), tails, 0.0)
    if not tails[0]:  # all columns together add nothing
        return torch.zeros_like(tails)
    return tails - torch.cat([tails[1:], tails.new_zeros(1)])


class _Products:
    """H and HᵀUᵀUH of :func:`decompose_quickly`, fp64, of a D and U whose columns are even.

    Every column is first made as long on one side as on the other: else a row of D might pass for
    rounding whose column of U makes up for it. D is ``of_down`` times what is stored, U ``of_up``
    times it, (rank,) each; a column that is 0 on one side is 0 on both.
    """

    def __init__(self, down: Tensor, up: Tensor, importance: Tensor):
        d, u = down @ down.t(), up.t() @ up  # (rank, rank)
        down_norm, up_norm = d.diagonal().sqrt(), u.diagonal().sqrt() * importance
        length = (down_norm * up_norm).sqrt()  # (rank,)
        some = length > 0
        self.of_down = torch.where(some, length / down_norm, 0.0)
        self.of_up = torch.where(some, length / up_norm, 0.0) * importance
        w, q = torch.linalg.eigh(d * self.of_down * self.of_down[:, None])
        kept = w > _FAINT**2 * w[-1]
        self.half = q[:, kept] * w[kept].sqrt()  # (rank, n)
        self.inner = self.half.t() @ (u * self.of_up * self.of_up[:, None]) @ self.half  # (n, n)
        self._columns = length.pow(4).sum()  # Σ of their squared norms

    def not_faint(self, squares: Tensor) -> Tensor:
        """Of squared singular values, rising: those that are no rounding."""
        if not squares.numel():
            return squares > 0
        return squares > _FAINT**2 * torch.maximum(squares[-1], self._columns)


def _taken_apart(component: Component, down: Tensor, up: Tensor, values: Tensor) -> Component:
    """``component`` with other sides, still unrolled, and singular values as its importance."""
    rank = values.numel()
    return Component(
        component.name,
        down.float().view(rank, *component.lora_down.shape[1:]),
        up.float().view(component.out_features, rank, *component.lora_up.shape[2:]),
        values.float(),
        component.nu,
        component.root,
    )


def _sides(component: Component) -> tuple[Tensor, Tensor]:
    """(down, up), unrolled, in fp64."""
    return component.lora_down.flatten(1).double(), component.lora_up.flatten(1).double()


def _scaled(component: Component, weight: float) -> Tensor:
    shape = (1, -1, *(1 for _ in component.lora_up.shape[2:]))
    up = component.lora_up
    if not bool((component.importance == 1).all()):
        up = up * component.importance.view(shape)
    return up if weight == 1 else up * weight
