"""From a file's tensors to components, and back; the other layout of LoRA² among them.

That layout is of the LoRA² module of 67372a's fork of LyCORIS; only facts are taken from it. Per
component: the two factors cut to the effective rank, ``lora2_nu`` (ν itself, one number), and
``alpha``, all in the type of the file. What its trainer computed, and what it merges, is
B Λ A · alpha / dim, with Λ as the paper writes it (eq. 10), never as our balanced mode does, and
dim the configured rank. Neither Λ nor dim are in the tensors: a stock loader leaves out Λ and
divides alpha by the rank that is stored, which is wrong twice.

ν learns freely there and may cross 0. Its rank is then the largest and Λ zero or negative: odd, but
what was trained. ``rs_lora`` needs no care, since that trainer multiplies it into alpha.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .. import adaptive_rank
from .component import Component, component_from_tensors, within_bounds
from .encode import STORED_ALPHA, fits_half, fold, norms_and_half_errors
from .keys import ALPHA, DORA_SCALE, Pair
from .read import LoRAFile


def in_our_layout(file: LoRAFile) -> LoRAFile:
    """A file of the other layout of LoRA² (see above) as any loader reads it; others as they are.

    Raises ValueError for a ν that gives no importances.
    """
    foreign = [pair for pair in file.parsed.pairs if pair.nu is not None]
    if not foreign:
        return file
    out = dict(file.state)
    for pair in foreign:
        component = component_of(file.state, pair, metadata=file.metadata)
        put_component(out, pair, within_bounds(component))
    return file.with_state(out)


def component_of(
    state: Mapping[str, Tensor],
    pair: Pair,
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
    alpha: float | None = None,
) -> Component:
    """One component of a state, its scale in ``lora_up``; ``name``: another than the file's.

    ``alpha``: where the state has none.
    """
    alpha = alpha if pair.alpha is None else float(state[pair.alpha])
    if pair.nu is not None:
        parts = state[pair.down], state[pair.up], state[pair.nu]
        return _foreign_component(name or pair.name, *parts, alpha, metadata or {})
    mid = None if pair.mid is None else state[pair.mid]
    down, up = state[pair.down], state[pair.up]
    return component_from_tensors(name or pair.name, down, up, alpha, mid)


def as_dora_scale(magnitudes: Tensor) -> Tensor:
    """PEFT's magnitudes as kohya writes them: (out,) of a linear layer and (1, out, 1, 1) of a
    convolution become (out, 1, …)."""
    return magnitudes.reshape(-1, *(1 for _ in range(max(1, magnitudes.dim() - 1))))


def stored_magnitudes(key: str, magnitudes: Tensor) -> Tensor:
    """A DoRA's magnitudes as our files hold them; ``key``: what they were called."""
    known = key.endswith(DORA_SCALE)
    return (magnitudes if known else as_dora_scale(magnitudes)).float()


def put_component(
    out: dict[str, Tensor], pair: Pair, component: Component, half: bool | None = None
) -> None:
    """Put ``component`` where ``pair`` was in a state; nothing of it where it holds nothing.

    ``half``: as :func:`factor_tensors` has it.
    """
    factors = factor_tensors(component, half)
    if factors is None:
        for key in pair.keys:
            out.pop(key, None)
        return
    out[pair.down], out[pair.up] = factors
    for key in (pair.mid, pair.nu):  # their part is in the two factors now
        out.pop(key or "", None)
    out[pair.alpha or pair.name + ALPHA] = torch.tensor(STORED_ALPHA)


def factor_tensors(component: Component, half: bool | None = None) -> tuple[Tensor, Tensor] | None:
    """(down, up) as a file holds them; None when there is nothing to hold.

    In fp16 where ``half`` says so; None: where it does not show, as in :func:`.fits_half`.
    """
    if not component.rank or not bool(component.lora_up.any()):
        return None
    down, up = fold(component)
    if half is None:
        half = bool(fits_half(norms_and_half_errors(down, up)[1][-1]))
    if half:
        down, up = down.half(), up.half()
    return down.contiguous(), up.contiguous()


def _foreign_component(
    name: str,
    down: Tensor,
    up: Tensor,
    nu: Tensor,
    alpha: float | None,
    metadata: Mapping[str, str],
) -> Component:
    """One component of such a file, Λ and scale in ``lora_up``.

    ``down``: (rank, in, …); ``up``: (out, rank, …); ``nu``: one number. The configured rank is
    ``ss_network_dim``, for kernels larger than 1 ``conv_dim`` of ``ss_network_args``. Where the
    metadata names none, alpha is taken for it, which is how such files are mostly trained; if it
    was not, all components are too strong by the same factor. ν is None in the result where it
    says nothing of a rank. Raises ValueError for a ν that gives no importances.
    """
    value = float(nu.flatten()[0]) if nu.numel() == 1 else math.nan
    rank = down.shape[0]
    # fp64: below 0 the importances grow with the rank
    wide = torch.tensor(value, dtype=torch.float64)
    importance = adaptive_rank.importance(wide, rank, "paper")  # (rank,)
    if not bool(importance.isfinite().all()):
        raise ValueError(f"{name} has a lora2_nu that is no usable number; copy the file again.")
    scale = 1.0
    if alpha is not None:
        scale = alpha / _configured_rank(alpha, tuple(down.shape[2:]), metadata)
    ones = [1 for _ in down.shape[2:]]
    up = up.double().reshape(*up.shape[:2], *ones)
    scaled = up * (importance * scale).view(1, -1, *ones)  # (out, rank, …)
    known = value if value > 0 else None
    return Component(name, down.float(), scaled.float(), torch.ones(rank), known, "file")


def _configured_rank(alpha: float, kernel: tuple[int, ...], metadata: Mapping[str, str]) -> float:
    """Of a component with this kernel; that trainer tells kernels by their first side."""
    rank = _positive(metadata.get("ss_network_dim"))
    if kernel and kernel[0] > 1:
        rank = _positive(_arguments(metadata).get("conv_dim")) or rank
    return rank or alpha or 1.0


def _arguments(metadata: Mapping[str, str]) -> Mapping[str, object]:
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):  # somebody else's words
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _positive(value: object) -> float:
    """A number above 0, or 0 for what is none ("Dynamic", nothing)."""
    try:
        number = float(value) if isinstance(value, (str, int, float)) else 0.0
    except (ValueError, OverflowError):
        return 0.0
    return number if 0 < number < math.inf else 0.0
