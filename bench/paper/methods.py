"""What is compared. Ranks are the paper's, scaled to the base's width where that is smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...lora2_core.config.train import TrainConfig

PAPERS_RANKS = (8, 16, 32, 64, 128, 256, 512)  # on layers 640 and 1280 wide
PAPERS_WIDTH = 640
BASE = "base"  # in a method's place: no LoRA at all
OWN = "own"  # the subject itself, as the autoencoder gives it back
OURS = "balanced"
IN_RANKS = "balanced-in-ranks"  # the same without an SVD: what terms are left out of
SMALLER = "balanced-cut"  # in fewer bytes, where a rival's file has those
KEPT = "-kept"  # after a method's name: at the strength that keeps most of what it gained
GAIN = TrainConfig().gain_to_keep  # the share that is kept, as `balanced` keeps it by itself
SHARE = 7  # of the largest rank's bytes this part is what files are to fit into


@dataclass(frozen=True)
class Method:
    """A way to a LoRA file."""

    label: str
    kind: Literal["ours", "peft", "cut"]
    rank: Mapping[str, Any] = field(default_factory=dict)  # of RankConfig; of PEFT: its own words
    mode: str = ""  # of ours; "adalora" or "dora"; "svd", "sv_fro" or "strength"
    entropy: float = 0.0  # weight, λ_e
    of: str = ""  # a cut: of which method's file
    to: str = ""  # to the bytes of which other's file
    part: int = 1  # to this part of them
    gives: str = ""  # "frozen": ranks of another's run, `of`; "gradient": from its spectrum
    strength: float = 1.0  # or the whole of it at this strength,
    kept: float = 1.0  # or at the smallest that keeps this share of its gain on fixed noise

    @property
    def trained(self) -> bool:
        return self.kind != "cut"

    @property
    def adaptive(self) -> bool:
        """LoRA² to a rank, with all of its terms or without some: what table 1 compares."""
        return self.kind == "ours" and self.mode != "fixed" and not self.to

    @property
    def plain(self) -> bool:
        """A LoRA of one rank everywhere."""
        return self.kind == "ours" and self.mode == "fixed" and not self.gives

    @property
    def rival(self) -> bool:
        """Somebody else's way, or the paper's own."""
        theirs = self.kind == "peft" or self.mode == "paper" or self.of.startswith("fixed-")
        return theirs or bool(self.gives)


def fixed_ranks(width: int) -> tuple[int, ...]:
    """The paper's ranks for a base whose narrowest attention is ``width`` wide; from 1 up."""
    scale = min(1.0, width / PAPERS_WIDTH)
    return tuple(dict.fromkeys(2 ** round_log2(rank * scale) for rank in PAPERS_RANKS))


def round_log2(value: float) -> int:
    """The exponent of the power of two next to a value, by proportion; not below 0."""
    return max(0, round(math.log2(value)))


def methods_for(width: int, several: bool = False) -> dict[str, Method]:
    """Every method by its name, in the order of a table; ``several``: where rank matters, those
    too that are about where ranks go."""
    ranks = fixed_ranks(width)
    target = max(1, round(ranks[-1] / SHARE))
    own = {"target_rank": float(target)}
    free = {**own, "rank_weight": 0.0, "controller_gain": 0.0}  # nothing pulls at the ranks
    found = {
        f"fixed-{rank}": Method(f"LoRA, rank {rank}", "ours", mode="fixed",
                                rank={"target_rank": float(rank), "max_rank": rank})
        for rank in ranks
    }  # fmt: skip
    found |= {
        OURS: Method(
            "LoRA² balanced", "ours", mode="balanced", entropy=1e-4, to=f"fixed-{ranks[-1]}",
            part=SHARE,
        ),
        IN_RANKS: Method(
            "LoRA², budget in ranks", "ours", mode="balanced", rank=own, entropy=1e-4
        ),
        "balanced-no-rank": Method(
            "… without rank term", "ours", mode="balanced", rank=free, entropy=1e-4
        ),
        "balanced-no-entropy": Method("… without entropy", "ours", mode="balanced", rank=own),
        "balanced-neither": Method("… without both", "ours", mode="balanced", rank=free),
        "paper": Method(
            "LoRA² paper", "ours", mode="paper", entropy=1e-4, rank={"max_rank": ranks[-1]}
        ),
        "adalora": Method(
            "AdaLoRA (PEFT)", "peft", mode="adalora",
            rank={"init_r": 2 * target, "target_r": target},
        ),
        "dora": Method("DoRA (PEFT)", "peft", mode="dora", rank={"r": ranks[3]}),
    }  # fmt: skip
    found |= _cuts(ranks) | (_of_allocation(ranks) if several else {})
    return found | _weakened(found)


def _weakened(known: Mapping[str, Method]) -> dict[str, Method]:
    """All that files are compared by, at the strength that the same rule gives to each."""
    compared = [
        name for name, one in known.items() if one.rival or one.plain or name in (OURS, IN_RANKS)
    ]
    return {
        name + KEPT: Method(known[name].label, "cut", mode="strength", of=name, kept=GAIN)
        for name in compared
    }


def _of_allocation(ranks: Sequence[int]) -> dict[str, Method]:
    """As many bytes as ``balanced`` has, given out otherwise."""
    size: Any = {"to": f"fixed-{ranks[-1]}", "part": SHARE}
    return {
        "frozen": Method(
            "ranks of a finished balanced run", "ours", mode="fixed", of=OURS, gives="frozen"
        ),
        "gradient": Method(
            "ranks from the gradient", "ours", mode="fixed", gives="gradient", **size
        ),
    }


def _cuts(ranks: Sequence[int]) -> dict[str, Method]:
    """Of the largest ranks, to the bytes that ``balanced`` is to fit into; the third takes about as
    much memory to train as it does."""
    found: dict[str, Method] = {}
    size: Any = {"to": f"fixed-{ranks[-1]}", "part": SHARE}
    for rank in dict.fromkeys(reversed(ranks[-3:])):
        found[f"svd-{rank}"] = Method(
            f"LoRA, rank {rank}, then SVD", "cut", mode="svd", of=f"fixed-{rank}", **size
        )
    rank = ranks[-1]
    found[f"sv-fro-{rank}"] = Method(
        f"LoRA, rank {rank}, then sv_fro", "cut", mode="sv_fro", of=f"fixed-{rank}", **size
    )
    found[SMALLER] = Method("LoRA² balanced, smaller", "cut", mode="svd", of=OURS, to="adalora")
    return found


def uniform(known: Mapping[str, Method]) -> str:
    """Of the fixed ranks the one that takes about the bytes that ``balanced`` is to fit into; an
    empty name where there is none."""
    names = {one.rank["max_rank"]: name for name, one in known.items() if one.plain}
    small = [rank for rank in names if rank <= max(names) / SHARE]
    return names[max(small)] if small else ""


def quick(known: Mapping[str, Method]) -> tuple[str, ...]:
    """The four methods of ``--quick``."""
    cut = next(name for name, method in known.items() if method.kind == "cut")
    fixed = [name for name, method in known.items() if method.plain]
    return fixed[0], known[cut].of, OURS, cut
