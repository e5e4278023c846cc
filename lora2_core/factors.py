"""One component's two factors: exact singular values, what each column holds, and sums.

Stateless mathematics of ΔW = B A. ΔW itself (out × in) is never formed: a QR of both sides and the
decomposition of a rank × rank matrix say the same in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .component import Component

# Singular values below this share of a component's largest are rounding, not content.
_NOISE = 1e-12


def from_tensors(
    name: str, down: Tensor, up: Tensor, alpha: float | None, mid: Tensor | None = None
) -> Component:
    """What a file holds of a component, in fp32, its scale alpha/rank taken into ``lora_up``.

    ``down``: (rank, in, …); ``up``: (out, rank, …); ``mid``: (rank, rank, height, width), the third
    factor of some convolutions, which is multiplied into ``lora_down`` (exact).
    """
    down, up = down.float(), up.float()
    if mid is not None:
        down = torch.einsum("abhw,bi->aihw", mid.float(), down.flatten(1))  # (rank, in, h, w)
        up = up.view(*up.shape[:2], 1, 1)
    rank = down.shape[0]
    if alpha is not None and alpha != rank:
        up = up * (alpha / rank)
    return Component(name, down, up, torch.ones(rank), nu=None, root="file")


def decompose(component: Component) -> Component:
    """The same ΔW as its singular value decomposition, columns of most weight first.

    By QR of both sides and the SVD of a rank × rank matrix, in fp64; ΔW itself (out × in) is never
    formed. Convolutions are unrolled for it. Columns that add nothing are gone.
    """
    down, up = (side.flatten(1).double() for side in (component.lora_down, component.lora_up))
    up_q, up_r = torch.linalg.qr(up * component.importance.double())  # (out, rank), (rank, rank)
    down_q, down_r = torch.linalg.qr(down.t())  # (in, rank), (rank, rank)
    left, values, right = torch.linalg.svd(up_r @ down_r.t())
    rank = int((values > _NOISE * values[0]).sum())
    new_up, new_down = up_q @ left[:, :rank], right[:rank] @ down_q.t()
    return Component(
        component.name,
        new_down.float().view(rank, *component.lora_down.shape[1:]),
        new_up.float().view(component.out_features, rank, *component.lora_up.shape[2:]),
        values[:rank].float(),
        component.nu,
        component.root,
    )


def energies(component: Component) -> Tensor:
    """What each column adds when the columns before it are there, in the order of the file.

    Returns fp64 (rank,), in units of ‖ΔW‖²: the squared error of keeping the first n columns is
    the sum of what follows. Falls for a decomposition, and mostly for what LoRA² has learnt;
    entries may be negative where columns work against each other.
    """
    down, up = (side.flatten(1).double() for side in (component.lora_down, component.lora_up))
    up = up * component.importance.double()
    products = (up.t() @ up) * (down @ down.t())  # (rank, rank)
    # ‖columns from n on‖²: the sums of the trailing squares of it
    tails = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)  # (rank,)
    return tails - torch.cat([tails[1:], tails.new_zeros(1)])


def add(name: str, components: Sequence[tuple[Component, float]]) -> Component:
    """The sum of weighted components as one, exactly: their columns side by side.

    All are of the same layer, of any rank. More columns than min(in, out) can say nothing more, and
    some readers refuse them; such a sum is decomposed, which is exact too.
    """
    first = components[0][0]
    down = torch.cat([c.lora_down for c, _ in components])  # (Σ rank, in, …)
    scaled = [_scaled(c, weight) for c, weight in components]
    up = torch.cat(scaled, dim=1)  # (out, Σ rank, …)
    total = Component(name, down, up, torch.ones(down.shape[0]), first.nu, first.root)
    if len(components) > 1:
        total = Component(name, down, up, total.importance, None, first.root)
    return within_bounds(total)


def _scaled(component: Component, weight: float) -> Tensor:
    shape = (1, -1, *(1 for _ in component.lora_up.shape[2:]))
    up = component.lora_up
    if not bool((component.importance == 1).all()):
        up = up * component.importance.view(shape)
    return up if weight == 1 else up * weight


def within_bounds(component: Component) -> Component:
    """The same ΔW at a rank of min(in, out) at most: more says nothing, and some readers refuse."""
    largest = min(component.in_features, component.out_features)
    return component if component.rank <= largest else decompose(component)
