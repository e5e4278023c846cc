"""The other layout of LoRA² files in the wild, read so that its weights come out right.

Source: the LoRA² module of 67372a's fork of LyCORIS; only facts are taken from it. Per component:
the two factors cut to the effective rank, ``lora2_nu`` (ν itself, one number), and ``alpha``, all
in the type of the file. What its trainer computed, and what it merges, is B Λ A · alpha / dim, with
Λ as the paper writes it (eq. 10), never as our balanced mode does, and dim the configured rank.
Neither Λ nor dim are in the tensors: a stock loader leaves out Λ and divides alpha by the rank that
is stored, which is wrong twice.

ν learns freely there and may cross 0. Its rank is then the largest and Λ zero or negative: odd, but
what was trained. ``rs_lora`` needs no care, since that trainer multiplies it into alpha.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from . import adaptive_rank
from .component import Component
from .lora_keys import NU


def is_foreign(keys: Iterable[str]) -> bool:
    """Whether a file is of that layout."""
    return any(key.endswith(NU) for key in keys)


def component(
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
    shape = (1, -1, *(1 for _ in up.shape[2:]))
    scaled = up.double() * (importance * scale).view(shape)  # (out, rank, …)
    known = value if value > 0 else None
    return Component(name, down.float(), scaled.float(), torch.ones(rank), known, "file")


def _configured_rank(alpha: float, kernel: tuple[int, ...], metadata: Mapping[str, str]) -> float:
    """Of a component with this kernel; that trainer tells kernels by their first side."""
    found = _positive(metadata.get("ss_network_dim"))
    if kernel and kernel[0] > 1:
        found = _positive(_arguments(metadata).get("conv_dim")) or found
    return found or alpha or 1.0


def _arguments(metadata: Mapping[str, str]) -> Mapping[str, object]:
    try:
        found = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):  # somebody else's words
        return {}
    return found if isinstance(found, dict) else {}


def _positive(value: object) -> float:
    """A number above 0, or 0 for what is none ("Dynamic", nothing)."""
    try:
        found = float(value) if isinstance(value, (str, int, float)) else 0.0
    except (ValueError, OverflowError):
        return 0.0
    return found if 0 < found < math.inf else 0.0
