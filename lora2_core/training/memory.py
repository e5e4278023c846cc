"""What a training holds in memory: frozen weights, what learns, and activations.

Counted, not guessed: one forward pass of the very model tells every tensor that the backward pass
will want. What other settings would make of that are ratios, see :func:`scaled`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..adapters.frozen import largest_cast
from ..adapters.network import AdaptiveRankNetwork
from ..adapters.swapping import PLACES, bytes_of_weights, places_of
from ..config.train import AS_PRECISION, OptimizerConfig, TrainConfig
from .objective import CrossAttentionEntropy, loss_parts

# Bytes a number of A and B: itself, its gradient, and what the optimizer remembers of it. In 16
# bits what layers compute with and the gradient of that are no larger, and are gone by then.
LEARNING_BYTES = {"adamw": 16, "adamw8bit": 10.1, "prodigy": 24}
# The peak over what is kept, in shares of what is kept outside of blocks, by the convolutions at
# full size: gradients on their way, and what is there for a moment. Measured on the demo model at
# 192 and 384 px, batch 1 and 2, with and without checkpoints, convolutions keeping no input, as on
# a GPU: 0.9 to 1.35 (bench/memory.py, which keeps it: 0.8).
_PASSING = 1.3

# Ratios of SDXL, counted on its real shapes.
_TEXT = 0.32  # both text encoders to the U-Net
_CHECKPOINTED, _ENTROPY = 0.245, 1.05  # activations with it to those without
_TARGETS = {"attention+ff": 1.9, "attention+ff+conv": 2.6, "cross-attention": 0.5}  # to attention
_EIGHT_BITS = 1.024  # bytes of a weight in fp8, with what stays in 16 bits and one that is cast
# What of frozen weights stays on the device where those of blocks wait in RAM.
_SWAPPED = {AS_PRECISION: 0.176, "fp8": 0.195}
_MEGABYTES_PER_RANK = 2.9  # of attention, in a file


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds on its device."""

    frozen: int  # weights that stay as they are, and the largest one cast of those in 8 bits
    learning: int  # A and B, their gradients, and the optimizer's memory
    activations: int  # at the peak: what is kept for the backward pass, and gradients on their way

    @property
    def total(self) -> int:
        """What has to be free before the model is copied there."""
        return self.frozen + self.learning + self.activations


SDXL = Memory(5_135_000_000, 372_000_000, 6_316_000_000)  # counted with TrainConfig(), 16 bits


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps for the backward pass, by transformer block."""

    outside: int
    inside: tuple[int, ...]  # of each block
    inputs: tuple[int, ...]  # of each block: what is kept of it if it is computed twice

    def activations(self, twice: Collection[int]) -> int:
        """What is taken at the peak where blocks ``twice`` are computed twice: of them one is there
        whole at a time."""
        whole = sum(size for block, size in enumerate(self.inside) if block not in twice)
        again = max((self.inside[block] for block in twice), default=0)
        inputs = sum(self.inputs[block] for block in twice)
        passing = _PASSING * self.outside + max(self.inside, default=0)  # gradients of one block
        return int(self.outside + whole + inputs + again + passing)

    def fewest_twice(self, room: int) -> tuple[int, ...]:
        """The fewest blocks to compute twice, so that activations fit into ``room`` bytes; all of
        them where even that is too much."""
        largest = sorted(range(len(self.inside)), key=lambda block: -self.inside[block])
        for count in range(len(largest) + 1):
            if self.activations(largest[:count]) <= room:
                return tuple(sorted(largest[:count]))
        return tuple(range(len(self.inside)))


def counted(
    network: AdaptiveRankNetwork,
    task: Any,
    entropy: CrossAttentionEntropy | None,
    roots: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    config: TrainConfig,
    batch: Any,
) -> Memory:
    """What ``config`` takes on the models of ``roots``; meta tensors do too.

    Adapters are in and checkpoints not yet; ``blocks``: those that checkpointing computes twice.
    """
    found = kept(network, task, entropy, roots, blocks, batch)
    swapped = blocks if config.block_swap is True else ()
    twice = range(len(blocks)) if _computes_twice(config) else ()
    parameters = sum(weight.numel() for weight in network.weights())
    held = lasting(roots, parameters, config, swapped)
    return replace(held, activations=found.activations(twice))


def lasting(
    roots: Mapping[str, nn.Module],
    parameters: int,
    config: TrainConfig,
    swapped: Sequence[nn.Module] = (),
) -> Memory:
    """What ``config`` takes all the time, without activations, which is known before anything is
    computed. ``parameters``: numbers in A and B; ``swapped``: blocks whose weights stay in RAM."""
    frozen = {id(p): p for root in roots.values() for p in _weights(root) if not p.requires_grad}
    in_ram = sorted(bytes_of_weights(swapped))
    return Memory(
        frozen=sum(_bytes(weight) for weight in frozen.values())
        - sum(in_ram)
        + sum(in_ram[-1:]) * min(PLACES, len(in_ram))
        + max(map(largest_cast, roots.values()), default=0),
        learning=int(_learning_bytes(config.optimizer) * parameters),
        activations=0,
    )


def scaled(memory: Memory, before: TrainConfig, after: TrainConfig) -> Memory:
    """What ``memory``, of a run with the settings ``before``, becomes with ``after``; about."""
    old, new = _factors(before), _factors(after)
    return Memory(
        frozen=round(memory.frozen * new[0] / old[0]),
        learning=round(memory.learning * new[1] / old[1]),
        activations=round(memory.activations * new[2] / old[2]),
    )


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten as files and cards are sold."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:,.1f} GB"
    if nbytes >= 1e7:
        return f"{nbytes / 1e6:.0f} MB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 5e4 else f"{nbytes / 1e3:.1f} kB"


def _learning_bytes(optimizer: OptimizerConfig) -> float:
    return LEARNING_BYTES[optimizer.name] + 4 * (optimizer.ema > 0)


def _factors(config: TrainConfig) -> tuple[float, float, float]:
    """How settings scale frozen weights, what learns, and activations. Only the ratios between two
    configurations mean something."""
    value = 4 if config.precision == "fp32" else 2
    frozen = _EIGHT_BITS if config.frozen_weights == "fp8" else value
    frozen *= _SWAPPED[config.frozen_weights] if config.block_swap is True else 1
    text = _TEXT * (config.text.learning_rate > 0)
    rank = config.rank
    if rank.target_megabytes is not None:
        ranks = rank.target_megabytes / _MEGABYTES_PER_RANK
    else:
        wanted = max([rank.target_rank, *(target for _, target in rank.group_targets)])
        ranks = wanted * _TARGETS.get(config.targets, 1.0)
    images = config.batch_size * (1 + (config.data.class_images > 0))
    activations = value * images * config.resolution**2
    activations *= _ENTROPY if config.entropy_weight else 1
    activations *= _CHECKPOINTED if _computes_twice(config) else 1
    return frozen + value * text, ranks * _learning_bytes(config.optimizer), activations


def _computes_twice(config: TrainConfig) -> bool:
    """Whether every block is computed twice: so are those whose weights wait in RAM."""
    return bool(config.gradient_checkpointing) or config.block_swap is True


def kept(
    network: AdaptiveRankNetwork,
    task: Any,
    entropy: CrossAttentionEntropy | None,
    roots: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    batch: Any,
) -> Kept:
    """What one forward pass of ``batch`` keeps, arguments as :func:`counted` takes them."""
    frozen = [weight for root in roots.values() for weight in _weights(root)]
    fetched = [place for root in roots.values() for place in places_of(root)]
    counter = _Counter([*frozen, *fetched, *network.weights()])
    try:
        looking = entropy.each_in_its_place() if entropy else nullcontext()
        with torch.enable_grad(), counter.counting(blocks), looking:
            network.refresh()
            counter.begin_with(part for part in network.folded() if part.element_size() > 2)
            counter.leave_out(network.folded())
            total = sum(loss_parts(task.predict(batch)))
            if entropy:
                total = total + entropy.value()
    finally:
        network.refresh()  # not of the graph whose tensors are gone
    count = range(len(blocks))
    inside, inputs = (
        [by.get(block, 0) for block in count] for by in (counter.inside, counter.inputs)
    )
    return Kept(counter.outside, tuple(inside), tuple(inputs))


class _Counter:
    """Counts the memory of what autograd saves, each only once, by the block it is saved in.

    Nothing is held: what is counted is free again at once, so that looking ahead takes no more
    memory than a forward pass without gradients.
    """

    def __init__(self, own: Sequence[Tensor]):
        self.outside = 0
        self.inside: dict[int, int] = {}
        self.inputs: dict[int, int] = {}
        # Weak references keep the identity of a storage from being given to a later one.
        self._seen: set[StorageWeakRef] = set()
        self.leave_out(own)
        self._block: int | None = None

    def begin_with(self, tensors: Iterable[Tensor]) -> None:
        """Count these, which outlast every block."""
        for tensor in tensors:
            self._pack(tensor)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these."""
        self._seen |= {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}

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
            self.inputs[number] = sum(_bytes(part) for part in args[:1] if torch.is_tensor(part))

        return enter

    def _leaving(self, *_: Any) -> None:
        self._block = None

    def _pack(self, tensor: Tensor) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage in self._seen:
            return
        self._seen.add(storage)
        nbytes = tensor.untyped_storage().nbytes()
        if self._block is None:
            self.outside += nbytes
        else:
            self.inside[self._block] = self.inside.get(self._block, 0) + nbytes


def _forgotten(_: Any) -> Tensor:
    raise RuntimeError("Counting what a backward pass wants is no preparation of one.")


def _weights(root: nn.Module) -> Iterator[Tensor]:
    yield from root.parameters()
    yield from root.buffers()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
