"""What a network may take: sizes are those of whole files, and what cannot be is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import adaptive_rank
from lora2_pack.lora2_core.adapters.budget import HEADROOM, METADATA_BYTES, file_bytes
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.files.encode import encode, to_state
from lora2_pack.lora2_core.files.metadata import complete_metadata
from lora2_pack.tests.core import toy

torch.set_num_threads(1)


@pytest.mark.parametrize("mode", adaptive_rank.MODES)
def test_a_budget_in_megabytes_is_that_of_the_whole_file(mode: str) -> None:
    net = toy.adapt(toy.Transformer(), mode=mode, target_megabytes=0.018)
    assert net.expected_bytes() == 18_000
    # What training aims at, with all that is not tensors of ranks taken off.
    (target,) = net.budget.targets
    cost = sum(t.parameters_per_rank for t in net.targets)
    frame = file_bytes(net.targets, [1] * 16) - 2 * cost
    assert 16 * 300 < frame - METADATA_BYTES < 16 * 700
    assert target == pytest.approx(HEADROOM * (18_000 - frame) / (2 * cost), rel=1e-6)
    # What the controller compares with its target is the size of the tensors, whatever the ranks.
    size = sum(t.parameters_per_rank * r for t, r in zip(net.targets, net.ranks, strict=True))
    assert net.mean_rank()[0] == pytest.approx(size / cost, rel=1e-5)


def test_what_training_aims_at_is_said_and_is_no_more_than_can_be(caplog) -> None:
    caplog.set_level("INFO")
    net = toy.adapt(toy.Transformer(), target_megabytes=0.028)
    costs = [t.parameters_per_rank for t in net.targets]
    most = sum(c * t.largest_rank for c, t in zip(costs, net.targets, strict=True)) / sum(costs)
    assert net.budget.targets == pytest.approx((most,))
    assert f"training aims at {most:.2f}" in caplog.text


@settings(deadline=None, max_examples=25)
@given(ranks=st.lists(st.integers(1, 12), min_size=16, max_size=16))
def test_the_expected_size_is_nearly_that_of_a_file(ranks: list[int]) -> None:
    targets = find_targets(toy.Transformer())
    components = [
        toy.component(t.name, rank, (t.out_features, t.in_features), importance=torch.ones(rank))
        for t, rank in zip(targets, ranks, strict=True)
    ]
    metadata = complete_metadata({}, components, ranks)
    size = len(encode(to_state(components), metadata))
    expected = file_bytes(targets, ranks) - METADATA_BYTES
    assert size <= expected <= size + 16 * 24  # here ν has few digits


def test_a_size_that_is_too_small_is_named_with_the_smallest() -> None:
    with pytest.raises(ValueError, match=r"target_megabytes is 0\.004;.*ranks 1 to 128") as caught:
        toy.adapt(toy.Transformer(), target_megabytes=0.004)
    smallest = float(str(caught.value).split("files of ")[1].split(" ")[0])
    net = toy.adapt(toy.Transformer(), target_megabytes=smallest)
    cost = sum(t.parameters_per_rank for t in net.targets)
    exact = file_bytes(net.targets, [1] * 16)
    assert exact <= smallest * 1e6 <= 1.01 * exact
    assert 2 * cost < exact
    with pytest.raises(ValueError, match="target_megabytes"):
        toy.adapt(toy.Transformer(), target_megabytes=exact / 1e6 - 1e-6)
    with pytest.raises(ValueError, match="at ranks 4 to 128"):
        toy.adapt(toy.Transformer(), target_megabytes=smallest, min_rank=4)


@pytest.mark.parametrize(("mode", "share"), [("balanced", 0.5), ("paper", 1.0), ("fixed", 0.5)])
def test_the_disk_is_checked_for_a_file_of_what_is_to_come(mode: str, share: float) -> None:
    net = toy.adapt(toy.Transformer(), mode=mode, target_rank=6.0, max_rank=12)
    ranks = [round(12 * share)] * 16
    assert net.expected_bytes() == file_bytes(net.targets, ranks)
