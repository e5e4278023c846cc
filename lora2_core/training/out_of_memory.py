"""Out of memory: what was asked for, what was free, and which settings need less.

The advice scales what was counted of the run, or what SDXL takes where nothing was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ..config.train import TrainConfig
from .estimate import Estimate
from .memory import SDXL, scaled, size

_SIGNS = (
    "out of memory", "not enough memory", "can't allocate memory", "alloc_failed",
    "could not create a primitive",  # of oneDNN, which does not say why: it is out of memory
)  # fmt: skip
_UNITS = {"": 1, "bytes": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_AMOUNT = r"([\d.]+)\s*([kmgt]|bytes)i?b?"

_SMALLEST_SIDE = 256  # px; below it nothing recognisable is learnt


class OutOfMemory(RuntimeError):
    """A step does not fit into memory; the message says what would."""


@dataclass(frozen=True)
class Advice:
    """One change of settings, and the share of memory that it saves, about."""

    text: str
    saving: float  # 0 … 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that failed, on whichever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def needed_and_free(text: str) -> tuple[int | None, int | None]:
    """Bytes that an allocator's message says were asked for and free; None where it says nothing.

    Of CUDA ("Tried to allocate 20.00 GiB … of which 5.03 GiB is free"), MPS (which names what is
    allocated and the maximum) and the CPU ("you tried to allocate 4000 bytes").
    """
    text = text.lower()
    needed = _bytes(rf"tried to allocate {_AMOUNT}", text)
    free = _bytes(rf"of which {_AMOUNT} is free", text)
    largest = _bytes(rf"max allowed: {_AMOUNT}", text)
    if free is None and largest is not None:
        used = [rf"mps allocated: {_AMOUNT}", rf"other allocations: {_AMOUNT}"]
        free = max(0, largest - sum(_bytes(pattern, text) or 0 for pattern in used))
    return needed, free


def message(
    config: TrainConfig,
    step: int,
    needed: int | None,
    free: int | None,
    checkpointing: bool,
    expected: Estimate | None = None,
    in_ram: bool = False,
) -> str:
    """What a person reads.

    ``step``: 0 before the first; ``checkpointing``: whether gradients are checkpointed by now;
    ``in_ram``: whether all is computed there, so that nothing could wait there.
    """
    asked = f"{size(needed)} more were needed" if needed is not None else "more was needed"
    there = f"{size(free)} were free" if free is not None else "how much was free is not known"
    advice = suggestions(config, needed, free, checkpointing, expected, in_ram)
    ways = "; or ".join(part.text for part in advice)
    again = " even with gradient checkpointing" if checkpointing else ""
    when = f"in step {step}" if step else "before the first step"
    lead = f"Out of memory {when}{again}: {asked} and {there}."
    if not advice:
        return f"{lead} Every setting is at its leanest already: free memory, or use a larger card."
    return f"{lead} What would fit: {ways}. Or close what else uses this memory."


def suggestions(
    config: TrainConfig,
    needed: int | None = None,
    free: int | None = None,
    checkpointing: bool = False,
    expected: Estimate | None = None,
    in_ram: bool = False,
) -> tuple[Advice, ...]:
    """The three changes that save the most and are not in use yet, the best first.

    Fewer when so few are left. The resolution is lowered so far that its share of tokens brings
    ``needed`` below ``free``. ``expected``: what was told of the run with ``config`` before it
    began; ``in_ram``: as in :func:`message`.
    """
    config = config if expected is None else _as_it_runs(config, expected)
    taken = scaled(SDXL, TrainConfig(), config) if expected is None else expected.memory
    if checkpointing:
        by_now = replace(config, gradient_checkpointing=True)
        config, taken = by_now, scaled(taken, config, by_now)
    found = []
    for text, changed in _changes(config, needed, free):
        if in_ram and changed.block_swap != config.block_swap:
            continue
        saving = 1 - scaled(taken, config, changed).total / taken.total
        if saving > 0:
            found.append(Advice(f"{text} (about {max(1, round(100 * saving))} % less)", saving))
    return tuple(sorted(found, key=lambda advice: -advice.saving)[:3])


def _as_it_runs(config: TrainConfig, expected: Estimate) -> TrainConfig:
    """``config`` with what memory has decided of it by now: no advice is what is done already."""
    twice = 0 < expected.blocks == len(expected.twice)
    swaps = 0 < expected.blocks == len(expected.swapped)
    return replace(
        config,
        gradient_checkpointing=config.gradient_checkpointing or twice,
        block_swap=config.block_swap or swaps,
    )


def lower_resolution(resolution: int, needed: int | None, free: int | None) -> int | None:
    """The next resolution whose tokens fit, a multiple of 64 px (of 32 below 512); None if none.

    Without figures three quarters: from 1024 to 768.
    """
    share = 0.75**2
    if needed and free is not None:
        share = min(share, 0.9 * free / needed)
    step = 64 if resolution > 512 else 32
    found = max(_SMALLEST_SIDE, int(resolution * share**0.5) // step * step)
    return found if found < resolution else None


def _changes(
    config: TrainConfig, needed: int | None, free: int | None
) -> Iterable[tuple[str, TrainConfig]]:
    """Every change that leaves the subject learnable, with what to say of it."""
    optimizer, rank = config.optimizer, config.rank
    if not config.gradient_checkpointing:
        yield "set gradient_checkpointing on", replace(config, gradient_checkpointing=True)
    if config.batch_size > 1:
        parts = optimizer.accumulation * config.batch_size
        text = f"set batch_size to 1 and accumulation to {parts}, which learns the same"
        yield text, replace(config, batch_size=1)
    if config.precision == "fp32":
        yield "set precision to bf16", replace(config, precision="bf16")
    if config.frozen_weights != "fp8":
        yield "set frozen_weights to fp8", replace(config, frozen_weights="fp8")
    if config.gradient_checkpointing and config.block_swap is not True:
        yield "set block_swap on", replace(config, block_swap=True)
    if optimizer.name != "adamw8bit":
        leaner = replace(optimizer, name="adamw8bit")
        yield "set optimizer to adamw8bit", replace(config, optimizer=leaner)
    if side := lower_resolution(config.resolution, needed, free):
        text = f"lower resolution from {config.resolution} to {side}"
        yield text, replace(config, resolution=side)
    if rank.target_megabytes is not None and rank.target_megabytes > 1:
        half = rank.target_megabytes / 2
        text = f"lower target_megabytes from {rank.target_megabytes:g} to {half:g}"
        yield text, replace(config, rank=replace(rank, target_megabytes=half))
    elif rank.target_megabytes is None and rank.target_rank > 1 and not rank.group_targets:
        half = max(1.0, rank.target_rank // 2)
        text = f"lower target_rank from {rank.target_rank:g} to {half:g}"
        yield text, replace(config, rank=replace(rank, target_rank=half))
    if config.targets in ("attention+ff", "attention+ff+conv"):
        yield "set targets to attention", replace(config, targets="attention")
    elif config.targets == "attention":
        yield "set targets to cross-attention", replace(config, targets="cross-attention")
    if config.text.learning_rate:
        leaner_text = replace(config.text, learning_rate=0.0)
        yield "set text_learning_rate to 0", replace(config, text=leaner_text)
    if config.entropy_weight:
        yield "set entropy_weight to 0", replace(config, entropy_weight=0.0)


def _bytes(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])
