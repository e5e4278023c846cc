"""Every setting of a training run, with its unit, range and source.

The dataclasses are frozen and reject a bad value when they are made, so no step is ever spent
on one. "Source: ours" marks a choice that the paper leaves open; "field" one that is common to
trainers of LoRAs. How ranks are chosen stands in :mod:`.ranks`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from . import checks
from .ranks import RankConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16", "fp16")
AS_PRECISION = "as precision"
FrozenWeights = Literal["as precision", "fp8"]
FROZEN_WEIGHTS: tuple[FrozenWeights, ...] = (AS_PRECISION, "fp8")
Schedule = Literal["constant", "cosine", "linear"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine", "linear")
OptimizerName = Literal["adamw", "adamw8bit", "prodigy"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "adamw8bit", "prodigy")
MAX_PROMPTS = 4
_MOST_OF_ADAM, _LEAST_OF_PRODIGY = 0.02, 0.1  # learning rates beyond which a word is due
_KEPT_GAIN = 0.96  # of balanced; source: ours, docs/method.md
PROBE_DRAWS = 8  # images, noises and timesteps on which the comparable loss is measured


@dataclass(frozen=True)
class OptimizerConfig:
    """What moves A and B. ν has an Adam of its own, see RankConfig.rank_learning_rate."""

    name: OptimizerName = "adamw"  # the paper: 8-bit Adam, which is adamw8bit without decay
    weight_decay: float = 0.0  # per step and learning rate; the paper: none
    warm_up: float | None = None  # share of the steps; None: see TrainConfig.warm_up
    accumulation: int = 1  # batches whose mean gradient makes one step; field
    clip_norm: float = 0.0  # largest norm of the gradient of A and B together; 0: off; field: 1
    ema: float = 0.0  # decay per step of the averaged A and B that are saved; 0: off; field: 0.99

    def __post_init__(self) -> None:
        checks.choice("optimizer", self.name, OPTIMIZERS)
        checks.number("weight_decay", self.weight_decay, 0, 10, "use 0, or 0.01")
        if self.warm_up is not None:
            checks.number("warm_up", self.warm_up, 0, 1, "use 0.05, a twentieth of the steps")
        checks.whole("accumulation", self.accumulation, 1, 1024, "use 1")
        checks.number("clip_norm", self.clip_norm, 0, 1e9, "use 1, or 0 to switch it off")
        checks.number("ema", self.ema, 0, 0.999999, "use 0.99, or 0 to switch it off")


@dataclass(frozen=True)
class DataConfig:
    """From photos and captions to batches."""

    buckets: bool = False  # keep aspect ratios, at about resolution² px; else centred squares
    flip: bool = False  # each photo also as its mirror image
    trigger: str = ""  # put before every caption that does not hold it
    caption_dropout: float = 0.0  # share of the draws with an empty caption; field: 0 to 0.1
    caption_shuffle: bool = False  # the order of comma-separated tags, behind the kept ones
    keep_tags: int = 1  # tags at the front that never move
    class_prompt: str = ""  # of the class images; empty: no prior preservation (DreamBooth)
    class_images: int = 0  # wanted in all; what the folder lacks the base model paints
    prior_weight: float = 1.0  # of the class images' loss; DreamBooth: 1

    def __post_init__(self) -> None:
        for name in ("buckets", "flip", "caption_shuffle"):
            checks.is_a(name, getattr(self, name), bool)
        for name in ("trigger", "class_prompt"):
            checks.is_a(name, getattr(self, name), str)
        checks.number("caption_dropout", self.caption_dropout, 0, 1, "use 0, or 0.1")
        checks.whole("keep_tags", self.keep_tags, 0, 1000, "use 1")
        checks.whole("class_images", self.class_images, 0, 10_000, "use 0, or 100")
        checks.number("prior_weight", self.prior_weight, 0, 1e3, "use 1")
        if self.class_images and not self.class_prompt.strip():
            raise checks.ConfigError(
                f"class_images is {self.class_images}, but class_prompt is empty; write what the "
                "class images show: for example 'a photo of a cat'."
            )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which noise is drawn and how its loss is weighed."""

    min_snr_gamma: float = 0.0  # γ of min-SNR weighting, arXiv 2303.09556; 0: off; field: 5
    noise_offset: float = 0.0  # share of noise that is one number a channel; field: 0 to 0.1
    timestep_low: float = 0.0  # share of the schedule, 0 the least noise
    timestep_high: float = 1.0

    def __post_init__(self) -> None:
        checks.number("min_snr_gamma", self.min_snr_gamma, 0, 1e6, "use 5, or 0 to switch it off")
        checks.number("noise_offset", self.noise_offset, 0, 1, "use 0, or 0.05")
        checks.number("timestep_low", self.timestep_low, 0, 0.999, "use 0")
        checks.number("timestep_high", self.timestep_high, 0.001, 1, "use 1")
        if self.timestep_high - self.timestep_low < 0.001:
            raise checks.ConfigError(
                f"timestep_low is {self.timestep_low:g} and timestep_high {self.timestep_high:g}; "
                "the range must be at least 0.001 wide: use 0 and 1."
            )


@dataclass(frozen=True)
class TextConfig:
    """Adapters on the text encoders; off unless a learning rate is set. The paper has none."""

    learning_rate: float = 0.0  # of their A and B; 0: off; field: half of learning_rate
    targets: str = r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)$"  # regular expression

    def __post_init__(self) -> None:
        checks.number("text_learning_rate", self.learning_rate, 0, 1, "use 0, or 0.00005")
        _text("text targets", self.targets, "leave it out")


@dataclass(frozen=True)
class KeepConfig:
    """What outlives an accident."""

    checkpoint_steps: int = 100  # a checkpoint after so many steps; 0: never by steps
    checkpoint_minutes: float = 10.0  # and after so many minutes; 0: never by time
    resume: bool = True  # go on from a checkpoint of the same run

    def __post_init__(self) -> None:
        checks.whole("checkpoint_steps", self.checkpoint_steps, 0, 1_000_000, "use 100, or 0")
        checks.number("checkpoint_minutes", self.checkpoint_minutes, 0, 1e6, "use 10, or 0")
        checks.is_a("resume", self.resume, bool)


@dataclass(frozen=True)
class SampleConfig:
    """Pictures painted while training, on the private copy."""

    prompts: tuple[str, ...] = ()  # up to four
    every: int = 100  # steps
    seed: int = 0  # of the noise, the same at every painting
    steps: int = 20  # of the sampler
    guidance: float = 5.0  # classifier-free

    def __post_init__(self) -> None:
        if not isinstance(self.prompts, tuple) or not all(isinstance(p, str) for p in self.prompts):
            raise checks.ConfigError(f"sample prompts is {self.prompts!r}; use a tuple of texts.")
        checks.whole("number of sample prompts", len(self.prompts), 0, MAX_PROMPTS, "take fewer")
        checks.whole("sample_every", self.every, 1, 1_000_000, "use 100")
        checks.whole("sample_seed", self.seed, 0, 2**63 - 1, "any number in it is valid")
        checks.whole("sample_steps", self.steps, 1, 1000, "use 20")
        checks.number("sample_guidance", self.guidance, 0, 100, "use 5")


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
    frozen_weights: FrozenWeights = AS_PRECISION  # how the U-Net's are kept; fp8: in half of bf16
    # Recompute blocks in backward; the paper: on. "auto": as few as the free memory asks for.
    gradient_checkpointing: bool | Literal["auto"] = False
    # Frozen weights of transformer blocks wait in RAM; "auto": as few as the free memory asks for.
    block_swap: bool | Literal["auto"] = False
    # Share of what the full strength gains on fixed noise that the saved one keeps; 1: the full
    # strength; None: see gain_to_keep.
    kept_gain: float | None = None
    entropy_weight: float = 1e-4  # λ_e of eq. 14; 0 switches the term off
    probes: int = 25  # measurements of the loss on fixed noise and timesteps during a run
    targets: str = "attention"  # preset of targets.PRESETS or a regular expression
    rank: RankConfig = field(default_factory=RankConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    text: TextConfig = field(default_factory=TextConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1, 1_000_000, "the paper uses 500")
        checks.number("learning_rate", self.learning_rate, 1e-9, 1, "use 0.0001")
        checks.choice("schedule", self.schedule, SCHEDULES)
        checks.whole("batch_size", self.batch_size, 1, 256, "the paper uses 1")
        checks.whole("resolution", self.resolution, 64, 4096, "SDXL is at home at 1024")
        if self.resolution % 32:
            nearest = max(64, round(self.resolution / 32) * 32)
            raise checks.ConfigError(
                f"resolution is {self.resolution}; it must be a multiple of 32: use {nearest}."
            )
        checks.whole("seed", self.seed, 0, 2**63 - 1, "any number in it gives a valid run")
        checks.choice("precision", self.precision, PRECISIONS)
        checks.choice("frozen_weights", self.frozen_weights, FROZEN_WEIGHTS)
        for name in ("gradient_checkpointing", "block_swap"):
            if getattr(self, name) != "auto":
                checks.is_a(name, getattr(self, name), bool)
        if self.kept_gain is not None:
            checks.number("kept_gain", self.kept_gain, 0.5, 1, "use 0.96, or 1 to switch it off")
        checks.number("entropy_weight", self.entropy_weight, 0, 1e6, "the paper uses 0.0001")
        checks.whole("probes", self.probes, 0, 10_000, "25 is enough for a curve")
        _text("targets", self.targets, "use 'attention'")
        for name, kind in _PARTS.items():
            checks.is_a(name, getattr(self, name), kind)

    @property
    def warm_up(self) -> float:
        """Share of the steps over which the learning rate rises: a twentieth, or nothing for
        ``constant``, unless it is set."""
        if self.optimizer.warm_up is not None:
            return self.optimizer.warm_up
        return 0.0 if self.schedule == "constant" else 0.05

    @property
    def gain_to_keep(self) -> float:
        """0.96 in ``balanced``, and all of it in the other modes, unless it is set."""
        if self.kept_gain is not None:
            return self.kept_gain
        return _KEPT_GAIN if self.rank.mode == "balanced" else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return dataclasses.asdict(self)


def rate_to_try(config: TrainConfig) -> float:
    """A learning rate for a run that its own has ruined: a tenth, and at most 0.001.

    Prodigy multiplies a rate that it finds itself, so of its own a tenth will do. Source: ours.
    """
    tenth = config.learning_rate / 10
    return tenth if config.optimizer.name == "prodigy" else min(tenth, 1e-3)


def doubts_about_rates(config: TrainConfig) -> list[str]:
    """What to say before a run whose learning rates are those of another optimizer. Source: ours;
    on the demo model AdamW ruins a LoRA from 0.03 on."""
    rates = {"learning_rate": config.learning_rate, "text_learning_rate": config.text.learning_rate}
    if config.optimizer.name == "prodigy":
        return [
            f"{name} is {rate:g}, but Prodigy finds the rate itself and multiplies it by this: "
            "leave it at 1, or it hardly learns."
            for name, rate in rates.items()
            if 0 < rate < _LEAST_OF_PRODIGY
        ]
    return [
        f"{name} is {rate:g}, and {config.optimizer.name} is likely to ruin the LoRA above "
        f"{_MOST_OF_ADAM:g}: try 0.0001. (A rate of 1 is meant for the optimizer prodigy.)"
        for name, rate in rates.items()
        if rate > _MOST_OF_ADAM
    ]


_PARTS: dict[str, type] = {
    "rank": RankConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "objective": ObjectiveConfig,
    "text": TextConfig,
    "keep": KeepConfig,
    "samples": SampleConfig,
}


def _text(name: str, value: object, fix: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise checks.ConfigError(f"{name} is {value!r}; it must be text: {fix}.")
