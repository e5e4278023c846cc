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
Schedule = Literal["constant", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")
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
        _check("prior weight", self.weight, 0, math.inf, "0 switches it off")
        _check("prior mean", self.mean, -math.inf, math.inf, "the paper's μ, 0 for A and B")
        _check("prior std", self.std, 1e-12, math.inf, "the paper's σ")


@dataclass(frozen=True)
class RankConfig:
    """How components choose their rank. Make it with :meth:`balanced`, :meth:`paper` or
    :meth:`fixed`."""

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
        _choice("mode", self.mode, MODES)
        _choice("growth", self.growth, ("zero", "random"))
        _choice("start", self.start, ("target", "maximum"))
        _check("quantile", self.quantile, 1e-6, 1 - 1e-6, "the paper uses 0.9")
        if self.max_rank is not None:
            _whole("max_rank", self.max_rank, 1, 4096, "the paper uses 512")
        if self.target_megabytes is None:
            limit = self.rank_limit
            fix = f"at most max_rank ({limit}), so lower it or raise max_rank"
            _check("target_rank", self.target_rank, 1, limit, fix)
        else:
            _check("target_megabytes", self.target_megabytes, 1e-3, 1e6, "4 gives 4 MB")
        _check("rank_learning_rate", self.rank_learning_rate, 1e-9, 1, "use 0.02")
        _check("rank_weight", self.rank_weight, 0, 1e9, "use 0.005")
        _check("controller_gain", self.controller_gain, 0, 1000, "use 15, or 0 to hold κ")
        _check("freeze_fraction", self.freeze_fraction, 0, 1, "use 0.2")
        _check("growth_std", self.growth_std, 0, 1e3, "use 0.02")
        _is_a("hysteresis", self.hysteresis, bool)
        _is_a("nu_prior", self.nu_prior, Prior)
        _is_a("weight_prior", self.weight_prior, Prior)


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    steps: int = 500  # the paper: 500 on SDXL, 800 on KOALA-700m
    learning_rate: float = 1e-4  # of A and B; the paper: 5e-5 with Adam
    schedule: Schedule = "constant"  # of the learning rate; the paper names none
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
        _check("learning_rate", self.learning_rate, 1e-9, 1, "use 0.0001")
        _choice("schedule", self.schedule, SCHEDULES)
        _whole("batch_size", self.batch_size, 1, 256, "the paper uses 1")
        _whole("resolution", self.resolution, 64, 4096, "SDXL is at home at 1024")
        if self.resolution % 32:
            nearest = max(64, round(self.resolution / 32) * 32)
            raise ConfigError(
                f"resolution is {self.resolution}; it must be a multiple of 32: use {nearest}."
            )
        _whole("seed", self.seed, 0, 2**63 - 1, "any number in it gives a valid run")
        _choice("precision", self.precision, PRECISIONS)
        _check("entropy_weight", self.entropy_weight, 0, 1e6, "the paper uses 0.0001")
        _whole("probes", self.probes, 0, 10_000, "25 is enough for a curve")
        if not isinstance(self.targets, str) or not self.targets.strip():
            raise ConfigError(f"targets is {self.targets!r}; it must be text: use 'attention'.")
        _is_a("rank", self.rank, RankConfig)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return dataclasses.asdict(self)


def _check(name: str, value: object, low: float, high: float, fix: str) -> None:
    """A finite number from ``low`` to ``high``, both included."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and low <= number <= high):
        upper = f"to {high:g}" if math.isfinite(high) else "or more"
        raise ConfigError(f"{name} is {value!r}; it must be a number from {low:g} {upper}: {fix}.")


def _whole(name: str, value: object, low: int, high: int, fix: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"{name} is {value!r}; it must be a whole number from {low} to {high}: {fix}."
        )


def _choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(valid)}.")


def _is_a(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}; it must be a {kind.__name__}: leave it out.")
