"""The other layout of LoRA² files in the wild, read so that its weights come out right.

Per component: the two factors cut to the effective rank, ``lora2_nu`` (one number), and ``alpha``
as configured. What its trainer computed is B Λ A · alpha / dim, with Λ as the paper writes it
(eq. 10) and dim the configured rank. Neither Λ nor dim are in the tensors: a stock loader leaves
out Λ and divides alpha by the rank that is stored, which is wrong twice.
"""

from __future__ import annotations

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
    """One component of such a file.

    ``down``: (rank, in, …); ``up``: (out, rank, …); ``nu``: one number. Where the metadata names
    no single configured rank, alpha is taken for it, which is how such files are mostly trained.
    Raises ValueError for a ν that gives no importances.
    """
    value = float(nu.flatten()[0]) if nu.numel() == 1 else float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} has a lora2_nu that is no number above 0; copy the file again.")
    rank = down.shape[0]
    importance = adaptive_rank.importance(torch.tensor(value), rank, "paper")  # (rank,)
    scale = 1.0 if alpha is None else alpha / _configured_rank(alpha, metadata)
    return Component(name, down.float(), up.float() * scale, importance, value, "file")


def _configured_rank(alpha: float, metadata: Mapping[str, str]) -> float:
    try:
        found = float(metadata.get("ss_network_dim", ""))
    except ValueError:  # "Dynamic", or nothing
        found = 0.0
    return found if 0 < found < float("inf") else alpha or 1.0
