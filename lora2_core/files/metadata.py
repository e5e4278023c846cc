"""The metadata of a file: ours, kohya's ``ss_*`` and ModelSpec; all strings.

No clock and no path goes in: the same run gives the same bytes, and a shared file tells nothing
about its maker's machine.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..config.patterns import Pattern, PatternError
from ..config.train import AS_PRECISION, OptimizerConfig, TrainConfig
from .component import Component
from .encode import STORED_ALPHA, kohya_key
from .header import one_line, shown_key
from .keys import plain_name

FORMAT_VERSION = "1"  # of LoRA files
VERSION, COMPONENTS = "lora2.format_version", "lora2.components"
# Settings that came later, as they were before: left out where they are still so, as a run of then
# has to go on, and files stay what they were.
LATER = {"frozen_weights": AS_PRECISION}
_DECIDE_NOTHING = {"keep", "samples", "block_swap", "kept_gain"}
RUN = "lora2.run"  # the hash of the run that a file is of
STRENGTH = "lora2.strength"  # at which it was saved, of that which was trained; none: the full one
ADAPTER = "lora_adapter_metadata"  # of diffusers: PEFT's settings of each network
_ARGUMENTS = "ss_network_args"
_RANKS = {
    "conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas",
    "rank", "linear_dim", "linear_alpha",
}  # fmt: skip
_TOLD_ALPHA = "lora_alpha"
_LARGEST_ALPHA = 1e6
_MOST_PATTERNS = 20  # that are more than names
_MODULE_NAME = re.compile(r"[\w.-]{1,300}")
_SHOWN = 200  # characters of a value in a headline
_MODULE = "lora2_core.network"
_CLASSES = {
    "adamw": "torch.optim.adamw.AdamW",
    "adamw8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "prodigy": "prodigyopt.prodigy.Prodigy",
}


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what is learnt: all but how a run is kept, watched and saved, and
    where weights wait meanwhile.

    Without those of :data:`LATER` that are as they ever were.
    """
    return {
        name: value
        for name, value in config.as_dict().items()
        if name not in _DECIDE_NOTHING and not (name in LATER and value == LATER[name])
    }


def describe_run(
    config: TrainConfig,
    captions: Sequence[str],
    base_hash: str,
    ranks: Sequence[int],
    losses: Sequence[float],
    probes: Sequence[float],
    title: str,
    run: str = "",
    strength: float = 1.0,
) -> dict[str, str]:
    """Everything a loader, a manager or a person may want to know of a trained file.

    ``losses``: one a step; ``probes``: the loss on fixed noise and timesteps, in order; ``run``:
    the hash of the run; ``strength``: at which it is saved, of that which was trained.
    """
    return {
        **_ours(config, base_hash, ranks, losses, probes),
        **({STRENGTH: f"{strength:g}"} if strength != 1 else {}),
        **({RUN: run} if run else {}),
        **_kohya(config, captions, title, len(losses)),
        **_kohya_options(config),
        **({"ss_fp8_base": "True"} if config.frozen_weights == "fp8" else {}),
        **_model_spec(config, captions, title),
    }


def complete_metadata(
    metadata: Mapping[str, str], components: Iterable[Component], ranks: Iterable[int]
) -> dict[str, str]:
    """``metadata`` and what a reader needs of every component at its rank, in forward order."""
    return with_listing(
        metadata,
        {
            kohya_key(c.name, c.root): listing_entry(c.nu, rank, c.in_features, c.out_features)
            for c, rank in zip(components, ranks, strict=True)
        },
    )


def with_listing(
    metadata: Mapping[str, str], entries: Mapping[str, Mapping[str, float | None]]
) -> dict[str, str]:
    """``metadata`` and the list of components, each a :func:`listing_entry` by its key."""
    return {**metadata, VERSION: FORMAT_VERSION, COMPONENTS: json.dumps(entries)}


def listing_entry(
    nu: float | None, rank: int, in_features: int, out_features: int
) -> dict[str, float | None]:
    """One line of the list of components."""
    return {"nu": nu, "rank": rank, "in": in_features, "out": out_features}


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether a file is of our format, in the version that we write."""
    return metadata.get(VERSION) == FORMAT_VERSION


def newer_version(metadata: Mapping[str, str]) -> str:
    """The version of our format that a file has and we do not know; mostly empty."""
    version = metadata.get(VERSION, "")
    return "" if version == FORMAT_VERSION else version


def understood_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` without our keys if they are of a newer version, whose rules we do not know."""
    if metadata.get(VERSION, FORMAT_VERSION) == FORMAT_VERSION:
        return dict(metadata)
    return {name: text for name, text in metadata.items() if not name.startswith("lora2.")}


def without_old_ranks(metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` without what it says of factors that are to be replaced: PEFT's settings, and
    ranks and alphas among kohya's arguments."""
    kept = {name: text for name, text in metadata.items() if name != ADAPTER}
    try:
        arguments = json.loads(kept.get(_ARGUMENTS, ""))
    except (ValueError, RecursionError):  # somebody else's words
        return kept
    if isinstance(arguments, dict) and (stale := arguments.keys() & _RANKS):
        left = {name: value for name, value in arguments.items() if name not in stale}
        kept[_ARGUMENTS] = json.dumps(left)
    return kept


def told_alphas(metadata: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, float]:
    """What diffusers told of alpha in ``lora_adapter_metadata``, for components without their own.

    ``ranks``: by name as in the file. As PEFT scales: alpha / rank, or alpha / √rank where it says
    ``use_rslora``; what is returned is to be divided by the rank. Raises ValueError for what is no
    such metadata, and for an ``alpha_pattern`` that needs more than :mod:`..config.patterns` reads.
    """
    if not metadata.get(ADAPTER):
        return {}
    try:
        told = json.loads(metadata[ADAPTER])
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(told, dict):
        raise ValueError("it is no list of settings")
    roots = {key.removesuffix(_TOLD_ALPHA) for key in told if key.endswith(_TOLD_ALPHA)}
    patterns = {root: _Patterns(told.get(f"{root}alpha_pattern")) for root in roots}
    found = {}
    for name, rank in ranks.items():
        root, module = _under_root(plain_name(name), roots)
        if root is None or not rank:
            continue
        alpha = patterns[root].value(module)
        alpha = _checked_alpha(told[root + _TOLD_ALPHA] if alpha is None else alpha)
        found[name] = alpha * rank**0.5 if told.get(f"{root}use_rslora") is True else alpha
    return found


def scales_by_root(metadata: Mapping[str, str]) -> bool:
    """Whether PEFT's ``use_rslora`` is among what diffusers told, and alpha counts over √rank."""
    try:
        told = json.loads(metadata.get(ADAPTER, "{}"))
    except (ValueError, RecursionError):
        return False
    ours = told.items() if isinstance(told, dict) else ()
    return any(key.endswith("use_rslora") and value is True for key, value in ours)


def _under_root(name: str, roots: Collection[str]) -> tuple[str | None, str]:
    """Which network of several a component is of ("unet."), and its name there."""
    for root in roots:
        if root and name.startswith(root):
            return root, name.removeprefix(root)
    alone = next(iter(roots)) if len(roots) == 1 else None
    return alone, name


class _Patterns:
    """PEFT's ``alpha_pattern``: a value for each module that a pattern matches, as PEFT matches it,
    ``(.*\\.)?(pattern)$`` from the beginning of the module's name. Raises ValueError for what
    cannot be read."""

    def __init__(self, told: Any):
        if told and not isinstance(told, dict):
            raise ValueError("its alpha_pattern is no table")
        self._each = [(text, self._read(text), value) for text, value in (told or {}).items()]
        if sum(pattern is not None for _, pattern, _ in self._each) > _MOST_PATTERNS:
            raise ValueError(f"its alpha_pattern has more than {_MOST_PATTERNS} patterns")

    def value(self, module: str) -> Any:
        """Of the first that matches; None where none does."""
        for text, pattern, value in self._each:
            plain = text.removeprefix("^")
            if pattern is not None:
                try:
                    found = pattern.search(module)
                except PatternError as error:
                    raise self._refusal(text, error) from None
            else:
                found = module == plain or (text == plain and module.endswith(f".{plain}"))
            if found:
                return value
        return None

    def _read(self, text: str) -> Pattern | None:
        """None for what is no more than a name."""
        if _MODULE_NAME.fullmatch(text.removeprefix("^")):
            return None
        try:
            return Pattern(rf"^(.*\.)?({text})$")
        except PatternError as error:
            raise self._refusal(text, error) from None

    @staticmethod
    def _refusal(text: str, error: PatternError) -> ValueError:
        return ValueError(f"its alpha_pattern {shown_key(text)} {one_line(str(error))[:200]}")


def _checked_alpha(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("its lora_alpha is no number")
    number = float(value) if abs(value) < _LARGEST_ALPHA else math.inf
    if not math.isfinite(number):
        raise ValueError("its lora_alpha is no usable number")
    return number


def headline(metadata: Mapping[str, str]) -> str:
    """One line about a file; empty when its metadata says nothing.

    A stranger may have written megabytes: of each value the beginning.
    """
    names = ("lora2.mode", "ss_steps", STRENGTH, "modelspec.trigger_phrase")
    mode, steps, strength, trigger = (
        metadata[name][:_SHOWN] if name in metadata else None for name in names
    )
    facts = (
        f"LoRA² {mode} mode" if is_ours(metadata) and mode is not None else "",
        f"{steps} steps" if steps else "",
        f"saved at {strength} of its strength" if is_ours(metadata) and strength else "",
        f'"{trigger}"' if trigger else "",
    )
    return " · ".join(filter(None, facts))


def _first_and_last(values: Sequence[float]) -> list[float]:
    """Medians of the first and of the last fifth; single steps are too noisy to compare."""
    fifth = max(1, len(values) // 5)
    return [statistics.median(values[:fifth]), statistics.median(values[-fifth:])]


def _ours(
    config: TrainConfig,
    base_hash: str,
    ranks: Sequence[int],
    losses: Sequence[float],
    probes: Sequence[float],
) -> dict[str, str]:
    summary = {"training": _first_and_last(losses)}
    kept = {"kept_gain": config.gain_to_keep} if config.gain_to_keep < 1 else {}
    if probes:
        summary["fixed_noise"] = _first_and_last(probes)
    return {
        "lora2.mode": config.rank.mode,
        "lora2.quantile": str(config.rank.quantile),
        "lora2.config": json.dumps({**deciding(config), **kept}, sort_keys=True),
        "lora2.base_model_hash": base_hash,
        "lora2.seed": str(config.seed),
        "lora2.steps": str(len(losses)),
        "lora2.loss": json.dumps(summary),
        "lora2.mean_rank": f"{statistics.fmean(ranks):.3f}",
    }


def _kohya(config: TrainConfig, captions: Sequence[str], title: str, steps: int) -> dict[str, str]:
    tags = Counter(tag.strip() for text in captions for tag in text.split(",") if tag.strip())
    frequency = {f"1_{title}": dict(sorted(tags.items()))}
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": _MODULE,
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": str(STORED_ALPHA),
        "ss_network_args": json.dumps({"mode": config.rank.mode, "targets": config.targets}),
        "ss_output_name": title,
        "ss_learning_rate": str(config.learning_rate),
        "ss_unet_lr": str(config.learning_rate),
        "ss_steps": str(steps),
        "ss_max_train_steps": str(config.steps),
        "ss_seed": str(config.seed),
        "ss_mixed_precision": {"fp32": "no"}.get(config.precision, config.precision),
        "ss_resolution": f"({config.resolution}, {config.resolution})",
        "ss_batch_size_per_device": str(config.batch_size),
        "ss_num_train_images": str(len(captions)),
        "ss_tag_frequency": json.dumps(frequency, sort_keys=True),
    }


def _kohya_options(config: TrainConfig) -> dict[str, str]:
    """Settings that may be off, by kohya's names and in his way: "None" is off."""
    data, optimizer, objective = config.data, config.optimizer, config.objective
    warm_steps = round(config.warm_up * config.steps)
    constant = config.schedule == "constant" and warm_steps > 0
    return {
        "ss_optimizer": _optimizer(optimizer),
        "ss_lr_scheduler": "constant_with_warmup" if constant else config.schedule,
        "ss_lr_warmup_steps": str(warm_steps),
        "ss_text_encoder_lr": _or_none(config.text.learning_rate),
        "ss_gradient_accumulation_steps": str(optimizer.accumulation),
        "ss_total_batch_size": str(config.batch_size * optimizer.accumulation),
        "ss_gradient_checkpointing": str(config.gradient_checkpointing),
        "ss_max_grad_norm": str(optimizer.clip_norm),
        "ss_min_snr_gamma": _or_none(objective.min_snr_gamma),
        "ss_noise_offset": _or_none(objective.noise_offset),
        "ss_caption_dropout_rate": str(data.caption_dropout),
        "ss_shuffle_caption": str(data.caption_shuffle),
        "ss_keep_tokens": str(data.keep_tags),
        "ss_flip_aug": str(data.flip),
        "ss_enable_bucket": str(data.buckets),
        "ss_bucket_no_upscale": str(data.buckets),
        "ss_prior_loss_weight": str(data.prior_weight),
        "ss_num_reg_images": str(data.class_images),
    }


def _optimizer(optimizer: OptimizerConfig) -> str:
    """The class and what it is given, as kohya writes it."""
    options = [f"weight_decay={optimizer.weight_decay}"]
    if optimizer.name == "prodigy":
        options += ["use_bias_correction=True", "safeguard_warmup=True"]
    return f"{_CLASSES[optimizer.name]}({','.join(options)})"


def _or_none(value: float) -> str:
    return str(value) if value else "None"


def _model_spec(config: TrainConfig, captions: Sequence[str], title: str) -> dict[str, str]:
    only = captions[0] if captions and len(set(captions)) == 1 else ""
    trigger = config.data.trigger.strip() or only
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.usage_hint": (
            "Load with any LoRA loader at strength 1. Every layer has a rank of its own."
        ),
    }
    if trigger:
        spec["modelspec.trigger_phrase"] = trigger
    return spec
