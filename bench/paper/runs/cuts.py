"""A LoRA of a fixed rank made smaller after its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ....lora2_core import lora_file
from ....lora2_core.config.load import Limits
from ....lora2_core.files.component import column_energies, decompose
from ....lora2_core.files.encode import encode, to_state
from ....lora2_core.resizing.resize import resize_file
from ....lora2_core.resizing.source import LoRASource

ROUNDS = 40  # of halving the share that is kept


def cut(source: Path, target: Path, megabytes: float, how: str) -> dict[str, float]:
    """Write ``source`` within a size: by one SVD over all layers, or by each layer's own."""
    if how == "svd":
        limits = Limits(megabytes=megabytes, order="svd")
        resize_file(source, target, limits)
    else:
        _by_each_layer(source, target, int(megabytes * 1e6))
    components, _ = lora_file.inspect(target)
    ranks = [one.rank for one in components]
    return {"mean_rank": sum(ranks) / len(ranks), "megabytes": target.stat().st_size / 1e6}


def _by_each_layer(source: Path, target: Path, limit: int) -> None:
    """As kohya's resize script does with ``sv_fro``: every layer keeps the fewest columns that
    hold a share of its own Frobenius norm; here the largest share that fits into ``limit``."""
    with LoRASource(source) as opened:
        found = [decompose(opened.component(key)) for key in opened.keys]
        metadata = dict(opened.metadata)
    norms = [column_energies(component).cumsum(0).sqrt() for component in found]  # (rank,) each
    low, high = 0.0, 1.0
    best: list[Any] | None = None
    sizes: dict[tuple[int, ...], int] = {}  # shares that are close keep the same columns
    for _ in range(ROUNDS):
        share = (low + high) / 2
        ranks = tuple(
            int((norm < share * norm[-1]).sum()) + 1 if len(norm) else 0 for norm in norms
        )
        kept = [component.first(rank) for component, rank in zip(found, ranks, strict=True)]
        if ranks not in sizes:
            sizes[ranks] = len(encode(to_state(kept), metadata))
        if sizes[ranks] <= limit:
            low, best = share, kept
        else:
            high = share
    if best is None:
        raise ValueError(f"{source.name} cannot be cut to {limit} bytes: rank 1 takes more.")
    lora_file.save(target, best, metadata)
