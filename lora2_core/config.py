"""Every setting of a training run, with its unit, range and source.

The dataclasses are frozen and reject a bad value when they are made, so no step is ever spent
on one. "Source: ours" marks a choice that the paper leaves open.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from .adaptive_rank import MODES, Mode

Growth = Literal["zero", "random"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16", "fp16")


class ConfigError(ValueError):
    """A setting is out of range; the message names it, its value, the range and the fix."""


@dataclass(frozen=True)
class Prior:
    """A Gaussian prior of eq. 9. ``weight`` 0 switches it off, as in the paper's own runs."""

    weight: float = 0.0  # ≥ 0, share in the loss
    mean: float = 0.0  # μ; the paper fixes 0 for the rows of A and B
    std: float = 1.0  # σ > 0

    def __post_init__(self) -> None:
        _check("prior weight", self.weight, self.weight >= 0, "0 or more", "0 switches it off")
        _check("prior std", self.std, self.std > 0, "above 0", "the paper's notation is σ")


@dataclass(frozen=True)
class RankConfig:
    """How components choose their rank. Make it with :meth:`balanced` or :meth:`paper`."""

    mode: Mode = "balanced"
    quantile: float = 0.9  # in (0, 1); the paper's q
    max_rank: int | None = None  # of one component; None: the mode's own, see rank_limit
    target_rank: float = 16.0  # ranks, the mean to aim at; the paper's r_target
    target_megabytes: float | None = None  # 10⁶ bytes of the fp16 file; replaces target_rank
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
            "rank_weight": 1e-3,
            "controller_gain": 0.0,
            "freeze_fraction": 0.0,
            "growth": "random",
            "hysteresis": False,
        }
        return cls(**{**literal, **changes})

    @classmethod
    def for_mode(cls, mode: str, **changes: Any) -> RankConfig:
        """The defaults of a mode given by its name; an unknown one is rejected."""
        return cls.paper(**changes) if mode == "paper" else cls.balanced(mode=mode, **changes)

    @property
    def rank_limit(self) -> int:
        """Largest rank of any component; each is also held to its own min(in, out)."""
        if self.max_rank is not None:
            return self.max_rank
        return 512 if self.mode == "paper" else 128

    def __post_init__(self) -> None:
        _choice("mode", self.mode, MODES)
        _choice("growth", self.growth, ("zero", "random"))
        _choice("start", self.start, ("target", "maximum"))
        _check("quantile", self.quantile, 0 < self.quantile < 1, "between 0 and 1", "use 0.9")
        if self.max_rank is not None:
            _whole("max_rank", self.max_rank, 1, 4096, "the paper uses 512")
        _check(
            "target_rank",
            self.target_rank,
            0 < self.target_rank <= self.rank_limit,
            f"above 0 and at most max_rank ({self.rank_limit})",
            "lower target_rank or raise max_rank",
        )
        if self.target_megabytes is not None:
            size = self.target_megabytes
            _check("target_megabytes", size, size > 0, "above 0", "4 gives a file of 4 MB")
        rate = self.rank_learning_rate
        _check("rank_learning_rate", rate, 0 < rate <= 1, "above 0, at most 1", "use 0.02")
        _check("rank_weight", self.rank_weight, self.rank_weight >= 0, "0 or more", "use 0.005")
        gain = self.controller_gain
        _check("controller_gain", gain, 0 <= gain <= 1000, "from 0 to 1000", "use 15")
        share = self.freeze_fraction
        _check("freeze_fraction", share, 0 <= share < 1, "from 0 to below 1", "use 0.2")
        _check("growth_std", self.growth_std, self.growth_std >= 0, "0 or more", "use 0.02")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    steps: int = 500  # the paper: 500 on SDXL, 800 on KOALA-700m
    learning_rate: float = 1e-4  # of A and B; the paper: 5e-5 with Adam
    batch_size: int = 1  # images a step; the paper: 1
    resolution: int = 1024  # px, multiple of 32; the paper: 1024
    seed: int = 0  # of weights, noise, timesteps and the order of images
    precision: Precision = "auto"  # of the frozen model; adapters and ν are always fp32
    entropy_weight: float = 1e-4  # λ_e of eq. 14; 0 switches the term off
    probes: int = 25  # measurements of the loss on fixed noise and timesteps during a run
    targets: str = "attention"  # preset of network.PRESETS or a regular expression
    rank: RankConfig = field(default_factory=RankConfig)

    def __post_init__(self) -> None:
        _whole("steps", self.steps, 1, 1_000_000, "the paper uses 500")
        rate = self.learning_rate
        _check("learning_rate", rate, 0 < rate <= 1, "above 0, at most 1", "use 0.0001")
        _whole("batch_size", self.batch_size, 1, 256, "the paper uses 1")
        _whole("resolution", self.resolution, 64, 4096, "SDXL is at home at 1024")
        multiple = self.resolution % 32 == 0
        nearest = max(64, round(self.resolution / 32) * 32)
        _check("resolution", self.resolution, multiple, "a multiple of 32", f"use {nearest}")
        _whole("seed", self.seed, 0, 2**63 - 1, "any number gives a valid run")
        _choice("precision", self.precision, PRECISIONS)
        weight = self.entropy_weight
        _check("entropy_weight", weight, weight >= 0, "0 or more", "the paper uses 0.0001")
        _whole("probes", self.probes, 0, 10_000, "25 is enough for a curve")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return dataclasses.asdict(self)


def _check(name: str, value: float, ok: bool, valid: str, fix: str) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and ok):
        raise ConfigError(f"{name} is {value}; it must be {valid}: {fix}.")


def _whole(name: str, value: int, low: int, high: int, fix: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must be a whole number {low} to {high}: {fix}.")


def _choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(valid)}.")
