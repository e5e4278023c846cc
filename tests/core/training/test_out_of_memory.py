"""What is said when memory runs out: figures that are the allocator's, settings that help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import (
    FROZEN_WEIGHTS,
    DataConfig,
    OptimizerConfig,
    TextConfig,
    TrainConfig,
)
from lora2_pack.lora2_core.files.raw.memory import free_ram
from lora2_pack.lora2_core.training import out_of_memory
from lora2_pack.lora2_core.training.estimate import Estimate
from lora2_pack.lora2_core.training.memory import SDXL, Memory, scaled
from lora2_pack.lora2_core.training.out_of_memory import suggestions

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 5.03 GiB is free. Process 1 has 74.07 GiB memory in use."
)
MPS = (
    "MPS backend out of memory (MPS allocated: 1.50 GB, other allocations: 384.00 KB, max "
    "allowed: 20.13 GB). Tried to allocate 512.00 MB on private pool."
)
LEAN = TrainConfig(
    precision="bf16",
    frozen_weights="fp8",
    gradient_checkpointing=True,
    block_swap=True,
    resolution=256,
    entropy_weight=0.0,
    targets="cross-attention",
    rank=RankConfig.balanced(target_rank=1.0),
    optimizer=OptimizerConfig("adamw8bit"),
)


def test_a_failed_allocation_of_the_cpu_is_known_and_read() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert out_of_memory.is_out_of_memory(caught.value)
    assert out_of_memory.needed_and_free(str(caught.value)) == (4 * 10**15, None)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what is left")
def test_a_limit_on_the_process_is_what_is_free() -> None:
    resource = pytest.importorskip("resource")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 300 * 2**20
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        torch.empty(50 * 2**20, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as caught:
            torch.empty(400 * 2**20, dtype=torch.uint8)
        free = free_ram()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert out_of_memory.is_out_of_memory(caught.value)
    assert out_of_memory.needed_and_free(str(caught.value))[0] == 400 * 2**20
    assert free is not None and 200 * 2**20 < free <= 300 * 2**20
    unlimited = free_ram()
    assert unlimited is not None and unlimited > 0


def test_messages_of_graphics_cards_are_read() -> None:
    assert out_of_memory.needed_and_free(CUDA) == (20 * 2**30, int(5.03 * 2**30))
    needed, free = out_of_memory.needed_and_free(MPS)
    assert needed == 512 * 2**20
    assert free == int(20.13 * 2**30) - int(1.5 * 2**30) - 384 * 2**10
    assert out_of_memory.is_out_of_memory(torch.OutOfMemoryError(CUDA))
    assert out_of_memory.is_out_of_memory(RuntimeError(MPS))
    assert out_of_memory.is_out_of_memory(MemoryError())
    assert out_of_memory.is_out_of_memory(RuntimeError("could not create a primitive"))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), ValueError(CUDA), KeyError("a")])
def test_other_errors_are_none_of_its_business(error: Exception) -> None:
    assert not out_of_memory.is_out_of_memory(error)


configs = st.builds(
    TrainConfig,
    batch_size=st.sampled_from([1, 2, 8]),
    resolution=st.sampled_from([64, 256, 512, 768, 1024, 2048]),
    precision=st.sampled_from(["auto", "fp32", "bf16"]),
    gradient_checkpointing=st.booleans(),
    block_swap=st.booleans(),
    frozen_weights=st.sampled_from(FROZEN_WEIGHTS),
    entropy_weight=st.sampled_from([0.0, 1e-4]),
    targets=st.sampled_from(["attention", "attention+ff+conv", "cross-attention", "b-lora"]),
    rank=st.sampled_from(
        [
            RankConfig.balanced(target_rank=64.0),
            RankConfig.balanced(target_megabytes=50.0),
            RankConfig.fixed(target_rank=1.0),
            RankConfig.balanced(group_targets=(("self", 4.0),)),
        ]
    ),
    optimizer=st.sampled_from([OptimizerConfig(n) for n in ("adamw", "adamw8bit", "prodigy")]),
    text=st.sampled_from([TextConfig(), TextConfig(learning_rate=1e-5)]),
    data=st.sampled_from([DataConfig(), DataConfig(class_prompt="a cat", class_images=3)]),
)
amounts = st.none() | st.integers(1, 2**42)


@given(config=configs, needed=amounts, free=amounts, checkpointing=st.booleans())
def test_advice_helps_and_is_new(
    config: TrainConfig, needed: int | None, free: int | None, checkpointing: bool
) -> None:
    found = suggestions(config, needed, free, checkpointing)
    assert len(found) <= 3
    assert [a.saving for a in found] == sorted((a.saving for a in found), reverse=True)
    assert all(0 < advice.saving < 1 for advice in found)
    text = out_of_memory.message(config, 3, needed, free, checkpointing)
    assert "\n" not in text and text.startswith("Out of memory in step 3")
    assert ("None" not in text) and all(advice.text in text for advice in found)
    if checkpointing or config.gradient_checkpointing:
        assert "set gradient_checkpointing on" not in text
    if config.frozen_weights == "fp8":
        assert "frozen_weights" not in text
    if config.block_swap:
        assert "block_swap" not in text
    if config.batch_size == 1:
        assert "batch_size" not in text
    if config.optimizer.name == "adamw8bit":
        assert "optimizer to" not in text


@given(first=configs, second=configs, third=configs)
def test_what_settings_make_of_memory_are_ratios(
    first: TrainConfig, second: TrainConfig, third: TrainConfig
) -> None:
    direct = dataclasses.astuple(scaled(SDXL, first, third))
    by_way_of = dataclasses.astuple(scaled(scaled(SDXL, first, second), second, third))
    assert by_way_of == pytest.approx(direct, rel=1e-4)
    assert dataclasses.astuple(scaled(SDXL, first, first)) == dataclasses.astuple(SDXL)


@pytest.mark.parametrize(
    ("counted", "text", "saving"),
    [
        (Memory(0, 0, 10**9), "set gradient_checkpointing on", 0.755),
        (Memory(0, 10**9, 0), "lower target_rank from 16 to 8", 0.5),
        (Memory(10**9, 0, 10**9), "set gradient_checkpointing on", 0.3775),
    ],
)
def test_advice_goes_by_what_was_counted(counted: Memory, text: str, saving: float) -> None:
    expected = Estimate(counted, seconds=1.0, file=1)
    first, *_ = suggestions(TrainConfig(precision="bf16"), expected=expected)
    assert first.text.startswith(text) and first.saving == pytest.approx(saving)
    told = out_of_memory.message(TrainConfig(precision="bf16"), 3, None, None, False, expected)
    assert first.text in told


def test_there_are_three_ways_out_of_usual_settings() -> None:
    found = suggestions(TrainConfig(precision="bf16", batch_size=4))
    assert [advice.text.split(" (")[0] for advice in found] == [
        "set gradient_checkpointing on",
        "set batch_size to 1 and accumulation to 4, which learns the same",
        "lower resolution from 1024 to 768",
    ]
    assert len(suggestions(TrainConfig(precision="fp32"), checkpointing=True)) == 3


def test_weights_that_do_not_learn_are_what_is_left() -> None:
    waits, halved, *_ = suggestions(TrainConfig(precision="bf16", gradient_checkpointing=True))
    assert waits.text.startswith("set block_swap on") and 0.55 < waits.saving < 0.65
    assert halved.text.startswith("set frozen_weights to fp8") and 0.3 < halved.saving < 0.4


@pytest.mark.parametrize(("waiting", "more"), [((0, 1), True), ((0, 1, 2), False), ((), True)])
def test_blocks_that_wait_already_are_no_advice(waiting: tuple[int, ...], more: bool) -> None:
    expected = Estimate(SDXL, 1.0, 1, twice=(0, 1, 2), blocks=3, swapped=waiting)
    config = TrainConfig(precision="bf16", gradient_checkpointing=True)
    told = suggestions(config, expected=expected)
    assert any("block_swap" in advice.text for advice in told) is more


@pytest.mark.parametrize(("twice", "more"), [((0, 1, 2), False), ((0, 1), True), ((), True)])
def test_blocks_that_are_computed_twice_already_are_no_advice(twice: tuple[int, ...], more: bool):
    """As memory has decided, which settings do not tell; where it has, blocks could wait in RAM."""
    config = TrainConfig(precision="bf16", frozen_weights="fp8", optimizer=LEAN.optimizer)
    told = suggestions(config, expected=Estimate(SDXL, 1.0, 1, twice=twice, blocks=3))
    assert any("gradient_checkpointing" in advice.text for advice in told) is more
    assert any("block_swap" in advice.text for advice in told) is not more


def test_nothing_can_wait_in_ram_where_ram_is_all_there_is() -> None:
    config = TrainConfig(precision="bf16", gradient_checkpointing=True)
    assert any("block_swap" in advice.text for advice in suggestions(config))
    assert not any("block_swap" in advice.text for advice in suggestions(config, in_ram=True))
    assert "block_swap" in out_of_memory.message(config, 1, None, None, True)
    assert "block_swap" not in out_of_memory.message(config, 1, None, None, True, in_ram=True)


def test_at_the_leanest_it_says_so() -> None:
    assert suggestions(LEAN) == ()
    assert "at its leanest" in out_of_memory.message(LEAN, 1, None, None, True)


@given(
    resolution=st.integers(2, 64).map(lambda n: 32 * n),
    needed=st.integers(1, 2**40),
    share=st.floats(0, 2),
)
def test_the_lower_resolution_fits_by_its_tokens(resolution: int, needed: int, share: float):
    free = int(needed * share)
    found = out_of_memory.lower_resolution(resolution, needed, free)
    if found is None:
        assert resolution <= 256
        return
    assert 256 <= found < resolution and found % 32 == 0
    TrainConfig(resolution=found)
    assert found == 256 or needed * (found / resolution) ** 2 <= free * 0.9 + 1 or share > 0.62


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"frozen_weights": "fp8"},
        {"block_swap": True},
        {"batch_size": 1},
        {"precision": "bf16"},
        {"optimizer": OptimizerConfig("adamw8bit")},
        {"resolution": 512},
        {"rank": RankConfig.balanced(target_rank=4.0)},
        {"data": DataConfig()},
        {"text": TextConfig()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_memory_falls_with_whatever_saves_memory(changes: dict[str, Any]) -> None:
    full = TrainConfig(
        batch_size=2,
        precision="fp32",
        data=DataConfig(class_prompt="a cat", class_images=3),
        text=TextConfig(learning_rate=1e-5),
    )
    leaner = dataclasses.replace(full, **changes)
    before, after = (scaled(SDXL, TrainConfig(), config) for config in (full, leaner))
    assert after.total < before.total
