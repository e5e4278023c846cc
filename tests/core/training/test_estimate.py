"""What a run takes, counted on small models whose every tensor is known."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import OptimizerConfig, SampleConfig, TrainConfig
from lora2_pack.lora2_core.training import estimate
from lora2_pack.lora2_core.training.memory import Memory, counted, kept, size
from lora2_pack.lora2_core.training.objective import CrossAttentionEntropy, Prediction, loss_parts
from lora2_pack.tests.core.toy import Transformer, TransformerTask, adapt

PLAIN = TrainConfig(entropy_weight=0.0, probes=0, kept_gain=1.0)


class Parts:
    """A model with adapters, and its task."""

    def __init__(self, blocks: int = 2, width: int = 16, **rank: Any):
        self.model = Transformer(blocks, width)
        self.task = TransformerTask(self.model)
        self.network = adapt(self.model, **{"target_rank": 2.0, **rank})

    def memory(self, config: TrainConfig = PLAIN, entropy: Any = None) -> Memory:
        batch = self.task.draw(torch.Generator().manual_seed(0), config.batch_size)
        roots, blocks = {"unet": self.model}, list(self.model.blocks)
        return counted(self.network, self.task, entropy, roots, blocks, config, batch)

    def told(self, config: TrainConfig = PLAIN) -> estimate.Estimate:
        return estimate.estimate(*self.arguments(config))

    def arguments(self, config: TrainConfig = PLAIN) -> tuple[Any, ...]:
        blocks = list(self.model.blocks)
        return self.network, self.task, None, {"unet": self.model}, blocks, config


def kept_by_autograd(network: AdaptiveRankNetwork, task: Any, size: int) -> int:
    """Bytes that a real forward pass keeps, weights apart, each storage once."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.refresh()
        batch = task.draw(torch.Generator().manual_seed(0), size)
        loss = sum(loss_parts(task.predict(batch)))
    learnt = network.weights()
    weights = {w.untyped_storage().data_ptr() for w in (*task.model.parameters(), *learnt)}
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


def test_frozen_weights_are_counted_to_the_byte():
    parts = Parts()
    frozen = sum(4 * w.numel() for w in parts.model.parameters() if not w.requires_grad)
    assert parts.memory().frozen == frozen


@pytest.mark.parametrize(
    ("optimizer", "each"), [("adamw", 16), ("adamw8bit", 10.1), ("prodigy", 24)]
)
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_learning_takes_so_many_bytes_a_number(optimizer: Any, each: float, ema: float):
    parts = Parts()
    layers = parts.network.layers
    numbers = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)
    config = dataclasses.replace(PLAIN, optimizer=OptimizerConfig(name=optimizer, ema=ema))
    assert parts.memory(config).learning == int((each + 4 * (ema > 0)) * numbers)


@pytest.mark.parametrize("size", [1, 3])
def test_activations_are_those_that_autograd_keeps(size: int):
    parts = Parts()
    config = dataclasses.replace(PLAIN, batch_size=size)
    told = parts.memory(config).activations
    real = kept_by_autograd(parts.network, parts.task, size)
    *others, _ = parts.arguments(config)
    batch = parts.task.draw(torch.Generator(), size)
    found = kept(*others, batch)
    assert found.outside + sum(found.inside) == real
    assert told == found.activations(()) == int(real + 1.3 * found.outside + max(found.inside))


@settings(deadline=None, max_examples=15)
@given(blocks=st.integers(1, 4), size=st.integers(1, 4), width=st.sampled_from([8, 16, 32]))
def test_more_of_anything_takes_more(blocks: int, size: int, width: int):
    config = dataclasses.replace(PLAIN, batch_size=size)
    more = dataclasses.replace(config, batch_size=size + 1)
    found = Parts(blocks, width).memory(config)
    parts = dataclasses.astuple(found)
    assert min(parts) > 0 and sum(parts) == found.total
    assert Parts(blocks, width).memory(more).activations > found.activations
    deeper = dataclasses.astuple(Parts(blocks + 1, width).memory(config))
    assert all(a > b for a, b in zip(deeper, parts, strict=True))


def test_with_checkpointing_one_block_counts_the_inputs_of_all_and_what_is_folded():
    checkpointed = dataclasses.replace(PLAIN, gradient_checkpointing=True)
    shallow, deep = (Parts(blocks, 64) for blocks in (4, 8))
    inputs = 4 * TransformerTask(Transformer(width=64)).draw(torch.Generator(), 1)[0].numel()

    def of(parts: Parts, config: TrainConfig = PLAIN) -> float:
        """Without ΛA, B among zeros and whose rows are whose, there for all layers in any case."""
        stacks = parts.network.all_stacks
        folded = sum(4 * stack.down.numel() for stack in stacks)
        for stack in stacks:
            if (count := stack.together) > 1:
                folded += 4 * count * stack.up.numel() + stack.rows * (4 * count + 8)
        return parts.memory(config).activations - 2.3 * folded

    more = of(deep, checkpointed) - of(shallow, checkpointed)
    assert 4 * inputs <= more + 4 < 1.6 * 4 * inputs  # the rest: Λ of more layers
    assert of(deep) - of(shallow) > 4 * more


def test_the_entropy_takes_its_share():
    parts = Parts()
    entropy = CrossAttentionEntropy([block.attn2 for block in parts.model.blocks])
    assert parts.memory(entropy=entropy).activations > parts.memory().activations


def test_counting_leaves_nothing_behind():
    parts = Parts()
    before = parts.network.state()
    parts.told()
    after = parts.network.state()
    assert torch.equal(before["generator"], after["generator"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in parts.model.modules())
    assert all(type(layer.importance) is torch.Tensor for layer in parts.network.layers)
    assert all(w.grad is None for w in parts.network.weights())


def test_samples_and_probes_cost_time_and_steps_most_of_it():
    # Of the same measured second, so that only what is counted makes the difference.
    parts, seconds = Parts(), {}
    variants = {
        "plain": PLAIN,
        "twice": dataclasses.replace(PLAIN, steps=2 * PLAIN.steps),
        "accumulated": dataclasses.replace(PLAIN, optimizer=OptimizerConfig(accumulation=4)),
        "checkpointed": dataclasses.replace(PLAIN, gradient_checkpointing=True),
        "weakened": dataclasses.replace(PLAIN, kept_gain=0.9),
        "probed": dataclasses.replace(PLAIN, probes=25),
        "sampled": dataclasses.replace(PLAIN, samples=SampleConfig(prompts=("a", "b"), every=50)),
    }
    with pytest.MonkeyPatch.context() as patch:
        clock = iter(range(100))
        patch.setattr(estimate.time, "perf_counter", lambda: float(next(clock)))
        for name, config in variants.items():
            seconds[name] = parts.told(config).seconds
    assert seconds["plain"] == 2.5 * 500  # forward passes of a second
    assert seconds["twice"] == 2 * seconds["plain"]
    assert seconds["accumulated"] == 4 * seconds["plain"]
    assert seconds["checkpointed"] == 3.6 * 500
    assert seconds["weakened"] - seconds["plain"] == 7 * 8  # strengths, draws
    assert seconds["probed"] - seconds["plain"] == 26 * 8  # as many draws, and one at the start
    assert seconds["sampled"] - seconds["plain"] == 10 * 2 * 20 * 2  # times, prompts, steps, guided


@pytest.mark.parametrize(
    ("rank", "bounded"),
    [
        (RankConfig.balanced(target_rank=2.0), False),
        (RankConfig.paper(), True),
        (RankConfig.paper(target_megabytes=0.02), False),
        (RankConfig.fixed(target_rank=2.0), False),
    ],
)
def test_the_paper_s_files_are_at_most_so_large(rank: RankConfig, bounded: bool):
    parts = Parts(
        mode=rank.mode, target_rank=rank.target_rank, target_megabytes=rank.target_megabytes
    )
    told = parts.told(dataclasses.replace(PLAIN, rank=rank))
    assert told.file == parts.network.expected_bytes()
    assert ("a file of at most" in told.text()) == bounded


def test_what_cannot_be_counted_is_no_end(caplog: pytest.LogCaptureFixture):
    class Odd(TransformerTask):
        def predict(self, batch: Any) -> Prediction:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")

    parts = Parts()
    parts.task = Odd(parts.model)
    with caplog.at_level(logging.WARNING):
        assert estimate.attempt(*parts.arguments()) is None
    assert "cannot be told before it starts: CUDA out of memory." in caplog.text
    assert "allocate" not in caplog.text
    assert all(type(layer.importance) is torch.Tensor for layer in parts.network.layers)
    parts.task = TransformerTask(parts.model)
    assert estimate.attempt(*parts.arguments()) is not None


def test_weights_without_data_can_be_counted():
    real = Parts().memory()
    model = Transformer().to("meta")
    network = AdaptiveRankNetwork(
        model, adapt(Transformer(), target_rank=2.0).targets, RankConfig.balanced(target_rank=2.0)
    )
    assert network.log_nu.device.type == "meta"
    task = TransformerTask(Transformer())
    batch = [part.to("meta") for part in task.draw(torch.Generator(), 1)]
    task.model = model
    task.matrix = task.matrix.to("meta")
    found = counted(network, task, None, {"unet": model}, list(model.blocks), PLAIN, batch)
    assert (found.frozen, found.learning) == (real.frozen, real.learning)
    # Attention keeps other tensors where there is no device to say how it is computed: q and k
    # scaled, beside the one tensor in which they lie with v.
    assert found.activations == pytest.approx(real.activations, rel=0.3)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0.0 kB"),
        (4000, "4.0 kB"),
        (430_000, "0.4 MB"),
        (9_940_000, "9.9 MB"),
        (45e6, "45 MB"),
        (7.94e9, "7.9 GB"),
        (4e15, "4,000,000.0 GB"),
    ],
)
def test_sizes_for_people(nbytes: float, text: str):
    assert size(nbytes) == text
