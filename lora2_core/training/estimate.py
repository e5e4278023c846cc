"""What a run will take, told before it starts: memory, time, and the size of its file.

Memory is counted, see :mod:`.memory`. Time is that of a forward pass, times what a step takes of
them. Both are right within a third on the demo model, see bench/memory.py.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..adapters.network import AdaptiveRankNetwork
from ..adapters.swapping import bytes_of_weights, computes_in_ram, is_swapped
from ..config.train import PROBE_DRAWS, TrainConfig
from ..files.header import first_line
from .losses.strength import STRENGTHS
from .memory import Memory, kept, lasting, size
from .objective import CrossAttentionEntropy

# A step in forward passes without gradient. Measured on the demo model and on two blocks of SDXL's
# width on a CPU: 2.1 to 2.4; checkpointing adds the pass that is repeated.
_PASSES, _PASSES_CHECKPOINTED = 2.5, 3.6


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    memory: Memory
    seconds: float
    file: int  # bytes
    file_shrinks: bool = False  # ranks start at their largest, so that ``file`` is a bound
    twice: tuple[int, ...] = ()  # blocks to compute twice, for ``memory`` to fit
    blocks: int = 0  # in all
    swapped: tuple[int, ...] = ()  # blocks whose weights stay in RAM

    def text(self) -> str:
        """One line for people."""
        bound = "at most " if self.file_shrinks else ""
        twice = f", {len(self.twice)} of {self.blocks} blocks computed twice" if self.twice else ""
        if self.swapped:
            twice += f", the weights of {len(self.swapped)} kept in RAM"
        return (
            f"about {size(self.memory.total)} of memory and {_duration(self.seconds)}, "
            f"give or take a third, and a file of {bound}{size(self.file)}{twice}"
        )


def attempt(*parts: Any) -> Estimate | None:
    """What :func:`estimate` says of ``parts``, or None, with a warning in the log, where it fails.

    A run must not end before it begins because a model is too unusual to be counted, or because
    it lacks the memory even for the look ahead: training says better what to do about that.
    """
    try:
        return estimate(*parts)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        told = "LoRA²: what this run takes cannot be told before it starts: %s"
        logging.warning(told, first_line(error))
        return None


def estimate(
    network: AdaptiveRankNetwork,
    task: Any,
    entropy: CrossAttentionEntropy | None,
    roots: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    config: TrainConfig,
    free: int | None = None,
) -> Estimate:
    """What ``config`` takes on the models of ``roots``, adapters in and checkpoints not yet.

    ``blocks``: those that gradient checkpointing computes twice, and whose weights may be in RAM
    by now; ``free``: bytes that are free now, to choose as few of them for either as that asks
    for, None for what ``config`` says. Draws nothing from any generator of the run.
    """
    batch = _largest(task, config)
    found = kept(network, task, entropy, roots, blocks, batch)
    parameters = sum(weight.numel() for weight in network.weights())
    to_come = lasting(roots, parameters, config).learning - 4 * parameters  # A and B are there
    swapped = tuple(number for number, block in enumerate(blocks) if is_swapped(block))
    twice = tuple(range(len(blocks))) if config.gradient_checkpointing or swapped else ()
    if free is not None and not twice:
        twice = found.fewest_twice(free - to_come)
    if free is not None and not config.block_swap:
        room = free - to_come - found.activations(twice)
        swapped = _fewest_swapped(bytes_of_weights(blocks), swapped, room)
    held = lasting(roots, parameters, config, [blocks[number] for number in swapped])
    if _computes_in_ram(network):  # then what waits takes as much, and its places more
        waiting = sum(bytes_of_weights([blocks[number] for number in swapped]))
        held = replace(held, frozen=held.frozen + waiting)
    return Estimate(
        memory=replace(held, activations=found.activations(twice)),
        seconds=_seconds(network, task, batch, config, len(twice) / max(1, len(blocks))),
        file=network.expected_bytes(),
        file_shrinks=config.rank.mode == "paper" and config.rank.target_megabytes is None,
        twice=twice,
        blocks=len(blocks),
        swapped=swapped,
    )


def _computes_in_ram(network: AdaptiveRankNetwork) -> bool:
    return computes_in_ram(network.log_nu.device)


def _fewest_swapped(sizes: Sequence[int], now: tuple[int, ...], room: int) -> tuple[int, ...]:
    """Those of the blocks ``now`` in RAM that have to stay there, so that the others, of
    ``sizes``, take no more than ``room`` bytes of the device; as far apart as can be, which leaves
    time to fetch each."""
    for count in range(len(now)):
        stay = {now[place * len(now) // count] for place in range(count)}
        if sum(sizes[number] for number in now if number not in stay) <= room:
            return tuple(sorted(stay))
    return now


def _largest(task: Any, config: TrainConfig) -> Any:
    """A draw of a whole batch, class images included, of the task's own but undone."""
    before = task.state()
    try:
        return task.draw(torch.Generator().manual_seed(0), config.batch_size)
    finally:
        task.load_state(before)


def _seconds(
    network: AdaptiveRankNetwork, task: Any, batch: Any, config: TrainConfig, twice: float
) -> float:
    """Of the whole run: from the second of two forward passes, the first one warms up. ``twice``:
    share of the blocks that are computed so."""
    one = 0.0
    with torch.no_grad():
        network.refresh()
        for _ in range(2):
            _synchronize(network.log_nu.device)
            started = time.perf_counter()
            task.predict(batch)
            _synchronize(network.log_nu.device)
            one = time.perf_counter() - started
    passes = _PASSES + twice * (_PASSES_CHECKPOINTED - _PASSES)
    steps = config.steps * config.optimizer.accumulation * passes
    images = max(1, config.batch_size)
    measured = (config.probes + 1 if config.probes else 0) + (
        len(STRENGTHS) if config.gain_to_keep < 1 else 0
    )
    probes = measured * PROBE_DRAWS / images
    samples = config.samples
    guided = 2 if samples.guidance != 1 else 1
    paintings = config.steps // samples.every * len(samples.prompts)
    painted = paintings * samples.steps * guided / images
    return one * (steps + probes + painted)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{seconds / 3600:.1f} hours"
