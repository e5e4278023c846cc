"""How components choose their rank: every setting, with its unit, range and source."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..adaptive_rank import MODES, Mode
from . import checks

Growth = Literal["zero", "random"]

# Where a component lies and what it attends to; a component belongs to the first group of
# ``group_targets`` that it is in.
GROUPS = ("self", "cross", "down", "mid", "up")


@dataclass(frozen=True)
class Prior:
    """A Gaussian prior of eq. 9. ``weight`` 0 switches it off, as in the paper's own runs."""

    weight: float = 0.0  # ≥ 0, share in the loss
    mean: float = 0.0  # μ; the paper fixes 0 for the rows of A and B
    std: float = 1.0  # σ > 0

    def __post_init__(self) -> None:
        checks.number("prior weight", self.weight, 0, math.inf, "0 switches it off")
        checks.number("prior mean", self.mean, -math.inf, math.inf, "the paper's μ, 0 for A and B")
        checks.number("prior std", self.std, 1e-12, math.inf, "the paper's σ")


@dataclass(frozen=True)
class RankConfig:
    """How components choose their rank. Make it with :meth:`balanced`, :meth:`paper` or
    :meth:`fixed`."""

    mode: Mode = "balanced"
    quantile: float = 0.9  # in (0, 1); the paper's q
    min_rank: int = 1  # of one component; the paper: 1
    max_rank: int | None = None  # of one component; None: the mode's own, see rank_limit
    target_rank: float = 16.0  # ranks, the mean to aim at; the paper's r_target
    target_megabytes: float | None = None  # 10⁶ bytes of the file, never exceeded; for target_rank
    group_targets: tuple[tuple[str, float], ...] = ()  # (group, mean rank), see GROUPS; ours
    start: Literal["target", "maximum"] = "target"  # source: ours
    rank_learning_rate: float = 2e-2  # of log ν, per step; source: ours
    rank_weight: float = 5e-3  # λ_r in `paper`, first κ in `balanced`
    controller_gain: float = 15.0  # κ ×= exp(gain/steps · excess), 0 holds κ; source: ours
    freeze_fraction: float = 0.2  # share of the steps at the end with ν held; source: ours
    growth: Growth = "zero"  # new columns of B; the paper: "random"
    growth_std: float = 0.02  # of new columns of B when random; source: ours
    hysteresis: bool = True  # resize only past ½√rank; source: ours
    nu_prior: Prior = field(default_factory=Prior)  # eq. 9, first term
    weight_prior: Prior = field(default_factory=Prior)  # eq. 9, second term

    @classmethod
    def balanced(cls, **changes: Any) -> RankConfig:
        """Our default: ranks that mean something, within a budget."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes: Any) -> RankConfig:
        """Every formula literal; what the paper leaves open at the values that gave its shape
        (many components at rank 1, many at the maximum)."""
        literal: dict[str, Any] = {
            "mode": "paper",
            "target_rank": 1.0,
            "start": "maximum",
            "rank_weight": 1e-4,  # λ_r of section 4
            "controller_gain": 0.0,
            "freeze_fraction": 0.0,
            "growth": "random",
            "hysteresis": False,
        }
        return cls(**{**literal, **changes})

    @classmethod
    def fixed(cls, **changes: Any) -> RankConfig:
        """A plain LoRA to compare with: ``target_rank`` in every layer that can take it."""
        plain: dict[str, Any] = {
            "mode": "fixed",
            "rank_weight": 0.0,
            "controller_gain": 0.0,
            "freeze_fraction": 1.0,
        }
        return cls(**{**plain, **changes})

    @classmethod
    def for_mode(cls, mode: str, **changes: Any) -> RankConfig:
        """The defaults of a mode given by its name; an unknown one is rejected."""
        if mode == "paper":
            return cls.paper(**changes)
        return cls.fixed(**changes) if mode == "fixed" else cls.balanced(mode=mode, **changes)

    @property
    def rank_limit(self) -> int:
        """Largest rank of any component; each is also held to its own min(in, out)."""
        if self.max_rank is not None:
            return self.max_rank
        return 128 if self.mode == "balanced" else 512

    def __post_init__(self) -> None:
        checks.choice("mode", self.mode, MODES)
        checks.choice("growth", self.growth, ("zero", "random"))
        checks.choice("start", self.start, ("target", "maximum"))
        checks.number("quantile", self.quantile, 1e-6, 1 - 1e-6, "the paper uses 0.9")
        if self.max_rank is not None:
            checks.whole("max_rank", self.max_rank, 1, 4096, "the paper uses 512")
        fix = f"{self.rank_limit} is max_rank, which can be raised"
        checks.whole("min_rank", self.min_rank, 1, self.rank_limit, fix)
        if self.target_megabytes is None:
            checks.number("target_rank", self.target_rank, 1, self.rank_limit, fix)
        else:
            checks.number("target_megabytes", self.target_megabytes, 1e-3, 1e6, "4 gives 4 MB")
        self._check_groups(fix)
        checks.number("rank_learning_rate", self.rank_learning_rate, 1e-9, 1, "use 0.02")
        checks.number("rank_weight", self.rank_weight, 0, 1e9, "use 0.005")
        checks.number("controller_gain", self.controller_gain, 0, 1000, "use 15, or 0 to hold κ")
        checks.number("freeze_fraction", self.freeze_fraction, 0, 1, "use 0.2")
        checks.number("growth_std", self.growth_std, 0, 1e3, "use 0.02")
        checks.is_a("hysteresis", self.hysteresis, bool)
        checks.is_a("nu_prior", self.nu_prior, Prior)
        checks.is_a("weight_prior", self.weight_prior, Prior)

    def _check_groups(self, fix: str) -> None:
        for group, rank in self.group_targets:
            checks.choice("group_targets", group, GROUPS)
            checks.number(f"group_targets {group}", rank, 1, self.rank_limit, fix)
        if self.group_targets and self.mode == "paper":
            raise checks.ConfigError(
                f"group_targets is {self.group_targets!r}; `paper` mode has one target for all "
                "components: use `balanced`, or leave it out."
            )
        if self.group_targets and self.target_megabytes is not None:
            raise checks.ConfigError(
                f"group_targets is {self.group_targets!r} beside target_megabytes "
                f"{self.target_megabytes:g}; only one of them can rule: leave one out."
            )
