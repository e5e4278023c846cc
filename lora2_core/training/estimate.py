"""What a run will take, told before it starts: memory, time, and the size of its file.

Memory is counted, not guessed: one forward pass of the very model tells every tensor that the
backward pass will want. Time is that of a forward pass, times what a step takes of them. Both are
right within a third on the demo model, see bench/memory.py.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..adapters.network import AdaptiveRankNetwork
from ..config.train import TrainConfig
from .objective import CrossAttentionEntropy, loss_parts

# Bytes a number of A and B: itself, its gradient, and what the optimizer remembers of it.
_LEARNING_BYTES = {"adamw": 16, "adamw8bit": 10.1, "prodigy": 24}
# A step in forward passes without gradient. Measured on the demo model and on two blocks of SDXL's
# width on a CPU: 2.1 to 2.4; checkpointing adds the pass that is repeated.
_PASSES, _PASSES_CHECKPOINTED = 2.5, 3.6
_PROBE_DRAWS = 8
# The peak over what is kept: gradients on their way, and what the allocator cannot fill. Measured
# on the demo model at 192 and 384 px, batch 1 and 2 (bench/memory.py): 1.36 to 1.6.
_SPARE = 1.45


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a run."""

    frozen: int  # weights that stay as they are
    learning: int  # A and B, their gradients, and the optimizer's memory
    activations: int  # kept from the forward pass for the backward pass, with some to spare
    seconds: float
    file: int
    file_shrinks: bool = False  # ranks start at their largest, so that ``file`` is a bound

    @property
    def memory(self) -> int:
        """All of it: what has to be free on the device before the model is copied there."""
        return self.frozen + self.learning + self.activations

    def text(self) -> str:
        """One line for people."""
        bound = "at most " if self.file_shrinks else ""
        return (
            f"about {size(self.memory)} of memory and {_duration(self.seconds)}, give or take a "
            f"third, and a file of {bound}{size(self.file)}"
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logging.warning("LoRA²: what this run takes cannot be told before it starts: %s", reason)
        return None


def estimate(
    network: AdaptiveRankNetwork,
    task: Any,
    entropy: CrossAttentionEntropy | None,
    roots: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    config: TrainConfig,
) -> Estimate:
    """What ``config`` takes on the models of ``roots``, adapters in and checkpoints not yet.

    ``blocks``: those that gradient checkpointing computes twice. Draws nothing from any generator
    of the run.
    """
    batch = _largest(task, config)
    frozen, learning, activations = memory(network, task, entropy, roots, blocks, config, batch)
    return Estimate(
        frozen=frozen,
        learning=learning,
        activations=activations,
        seconds=_seconds(network, task, batch, config),
        file=network.expected_bytes(),
        file_shrinks=config.rank.mode == "paper" and config.rank.target_megabytes is None,
    )


def memory(
    network: AdaptiveRankNetwork,
    task: Any,
    entropy: CrossAttentionEntropy | None,
    roots: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    config: TrainConfig,
    batch: Any,
) -> tuple[int, int, int]:
    """Bytes of frozen weights, of what learns, and of activations. Works on meta tensors too."""
    outside, inside, inputs = _kept(network, task, entropy, roots, blocks, batch)
    kept = outside + sum(inside.values())
    if config.gradient_checkpointing:
        kept = outside + inputs + max(inside.values(), default=0)
    frozen = {id(p): p for root in roots.values() for p in _weights(root) if not p.requires_grad}
    parameters = sum(weight.numel() for weight in network.weights())
    each = _LEARNING_BYTES[config.optimizer.name] + 4 * (config.optimizer.ema > 0)
    return (
        sum(weight.numel() * weight.element_size() for weight in frozen.values()),
        int(each * parameters),
        int(_SPARE * kept),
    )


def _largest(task: Any, config: TrainConfig) -> Any:
    """A draw of a whole batch, class images included, of the task's own but undone."""
    before = task.state()
    try:
        return task.draw(torch.Generator().manual_seed(0), config.batch_size)
    finally:
        task.load_state(before)


def _kept(
    network: AdaptiveRankNetwork,
    task: Any,
    entropy: CrossAttentionEntropy | None,
    roots: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    batch: Any,
) -> tuple[int, dict[int, int], int]:
    """Bytes kept for the backward pass outside of ``blocks``, in each of them, and their inputs."""
    counter = _Counter([weight for root in roots.values() for weight in _weights(root)])
    try:
        looking = entropy.collecting() if entropy else nullcontext()
        with torch.enable_grad(), counter.counting(blocks), looking:
            network.refresh_importance()
            total = sum(loss_parts(task.predict(batch)))
            if entropy:
                total = total + entropy.value()
    finally:
        network.refresh_importance()  # not of the graph whose tensors are gone
    return counter.outside, counter.inside, counter.inputs


class _Counter:
    """Counts the memory of what autograd saves, each only once, by the block it is saved in.

    Nothing is held: what is counted is free again at once, so that looking ahead takes no more
    memory than a forward pass without gradients.
    """

    def __init__(self, own: Sequence[Tensor]):
        self.outside, self.inputs = 0, 0
        self.inside: dict[int, int] = {}
        # Weak references keep the identity of a storage from being given to a later one.
        self._seen = {StorageWeakRef(weight.untyped_storage()) for weight in own}
        self._block: int | None = None

    @contextmanager
    def counting(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        handles = []
        for number, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(self._entering(number)))
            handles.append(block.register_forward_hook(self._leaving))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _forgotten):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, number: int) -> Callable[..., None]:
        def enter(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self._block = number
            self.inputs += sum(_bytes(part) for part in args[:1] if torch.is_tensor(part))

        return enter

    def _leaving(self, *_: Any) -> None:
        self._block = None

    def _pack(self, tensor: Tensor) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = tensor.untyped_storage().nbytes()
        if self._block is None:
            self.outside += size
        else:
            self.inside[self._block] = self.inside.get(self._block, 0) + size


def _forgotten(_: Any) -> Tensor:
    raise RuntimeError("Counting what a backward pass wants is no preparation of one.")


def _seconds(network: AdaptiveRankNetwork, task: Any, batch: Any, config: TrainConfig) -> float:
    """Of the whole run: from the second of two forward passes, the first one warms up."""
    one = 0.0
    with torch.no_grad():
        network.refresh_importance()
        for _ in range(2):
            _synchronize(network.log_nu.device)
            started = time.perf_counter()
            task.predict(batch)
            _synchronize(network.log_nu.device)
            one = time.perf_counter() - started
    passes = _PASSES_CHECKPOINTED if config.gradient_checkpointing else _PASSES
    steps = config.steps * config.optimizer.accumulation * passes
    images = max(1, config.batch_size)
    probes = (config.probes + 1) * _PROBE_DRAWS / images if config.probes else 0
    samples = config.samples
    guided = 2 if samples.guidance != 1 else 1
    paintings = config.steps // samples.every * len(samples.prompts)
    painted = paintings * samples.steps * guided / images
    return one * (steps + probes + painted)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _weights(root: nn.Module) -> Iterator[Tensor]:
    yield from root.parameters()
    yield from root.buffers()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten as files and cards are sold."""
    return (
        f"{nbytes / 1e9:.1f} GB"
        if nbytes >= 1e9
        else f"{nbytes / 1e6:.1f} MB"
        if nbytes < 1e7
        else f"{nbytes / 1e6:.0f} MB"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{seconds / 3600:.1f} hours"
