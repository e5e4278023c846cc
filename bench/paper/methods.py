"""What is compared. Ranks are the paper's, scaled to the base's width where that is smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PAPERS_RANKS = (8, 16, 32, 64, 128, 256, 512)  # on layers 640 and 1280 wide
PAPERS_WIDTH = 640
SHARE = 7  # LoRA² is asked for this part of the largest rank's bytes


@dataclass(frozen=True)
class Method:
    """A way to a LoRA file."""

    label: str
    kind: Literal["ours", "peft", "cut"]
    rate: float = 4e-3  # where nothing has been tuned
    rank: Mapping[str, Any] = field(default_factory=dict)  # of RankConfig; of PEFT: its own words
    mode: str = ""  # of ours; "adalora" or "dora"; "svd" or "sv_fro"
    entropy: float = 0.0  # weight, λ_e
    of: str = ""  # a cut: of which method's file
    to: str = ""  # … to the bytes of which other's

    @property
    def trained(self) -> bool:
        return self.kind != "cut"


def fixed_ranks(width: int) -> tuple[int, ...]:
    """The paper's ranks for a base whose narrowest attention is ``width`` wide; from 1 up."""
    scale = min(1.0, width / PAPERS_WIDTH)
    return tuple(dict.fromkeys(2 ** round_log2(rank * scale) for rank in PAPERS_RANKS))


def round_log2(value: float) -> int:
    """The exponent of the power of two next to a value, by proportion; not below 0."""
    return max(0, round(math.log2(value)))


def methods_for(width: int) -> dict[str, Method]:
    """Every method by its name, in the order of a table."""
    ranks = fixed_ranks(width)
    next_largest, largest = ranks[-2:]
    target = max(1, round(largest / SHARE))
    own = {"target_rank": float(target)}
    free = {**own, "rank_weight": 0.0, "controller_gain": 0.0}  # nothing pulls at the ranks
    found = {
        f"fixed-{rank}": Method(f"LoRA, rank {rank}", "ours", mode="fixed",
                                rank={"target_rank": float(rank), "max_rank": rank})
        for rank in ranks
    }  # fmt: skip
    found |= {
        "balanced": Method("LoRA² balanced", "ours", mode="balanced", rank=own, entropy=1e-4),
        "balanced-no-rank": Method(
            "… without rank term", "ours", mode="balanced", rank=free, entropy=1e-4
        ),
        "balanced-no-entropy": Method("… without entropy", "ours", mode="balanced", rank=own),
        "balanced-neither": Method("… without both", "ours", mode="balanced", rank=free),
        "paper": Method(
            "LoRA² paper", "ours", mode="paper", entropy=1e-4, rank={"max_rank": largest}
        ),
        "adalora": Method(
            "AdaLoRA (PEFT)", "peft", mode="adalora",
            rank={"init_r": 2 * target, "target_r": target},
        ),
        "dora": Method("DoRA (PEFT)", "peft", mode="dora", rank={"r": ranks[3]}),
        "svd-largest": Method(
            f"rank {largest}, then SVD", "cut", mode="svd", of=f"fixed-{largest}", to="balanced"
        ),
        "sv-fro-largest": Method(
            f"rank {largest}, then sv_fro", "cut", mode="sv_fro", of=f"fixed-{largest}",
            to="balanced",
        ),
        "svd-next": Method(
            f"rank {next_largest}, then SVD", "cut", mode="svd", of=f"fixed-{next_largest}",
            to="balanced",
        ),
    }  # fmt: skip
    return found


QUICK = ("fixed-1", "fixed-8", "balanced", "svd-next")  # methods of --quick
