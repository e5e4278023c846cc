"""bench/gpu.py's code for a card, which meets stand-ins for what ``torch.cuda`` tells."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora2_pack.bench.gpu_cells import meters, plan, record
from lora2_pack.bench.gpu_cells.meters import Cuda
from lora2_pack.bench.gpu_cells.rows import Row
from lora2_pack.bench.gpu_cells.running import ALONE
from lora2_pack.tests.bench.measuring import by_name, group, measure, stepping
from torch.autograd import DeviceType


class Card:
    """Stands in for what ``torch.cuda`` tells of a card of 24 GB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int = 20_000_000_000):
        self.calls: list[str] = []
        self.held = 4_098_632  # the tiny weights
        facts: dict[str, Any] = {
            "max_memory_allocated": 7_000_000_000,
            "max_memory_reserved": 8_000_000_000,
            "memory_reserved": 1_000_000_000,
            "mem_get_info": (free, 24_000_000_000),
            "current_device": 0,
            "device_count": 1,
            "get_allocator_backend": "native",
            "get_device_properties": SimpleNamespace(
                name="Some Card", total_memory=24_000_000_000, major=8, minor=6
            ),
        }
        for name, value in facts.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: self.calls.append(name))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: self.held)
        watches = meters.ProfilerActivity.CUDA
        monkeypatch.setattr(meters, "supported_activities", lambda: {watches})
        monkeypatch.setattr(meters, "profile", self.profile)
        monkeypatch.setattr(meters, "raw_events", lambda _: EVENTS)

    @contextmanager
    def profile(self, activities: list[Any]) -> Iterator[None]:
        assert activities == [meters.ProfilerActivity.CUDA]
        yield
        assert self.calls[-1] == "synchronize"  # or the last kernels are missed


def event(name: str, start: int, length: int, kind: Any = DeviceType.CUDA, user: bool = False):
    return SimpleNamespace(
        name=lambda: name,
        device_type=lambda: kind,
        start_ns=lambda: start,
        duration_ns=lambda: length,
        is_user_annotation=lambda: user,
    )


EVENTS = [
    event("cudaLaunchKernel", 0, 9_000_000, DeviceType.CPU),
    event("Optimizer.step#AdamW.step", 0, 9_000_000),
    event("people's own", 0, 9_000_000, user=True),
    event("gemm", 2_000_000, 1_000_000),
    event("softmax", 1_000_000, 1_500_000),  # half a millisecond beside the product
    event("Memcpy DtoH", 5_000_000, 500_000),
    event("inside of the copy", 5_100_000, 100_000),
]


def test_kernels_and_busy_time_of_a_profile():
    assert meters.on_card(EVENTS) == (3, pytest.approx(2.5e-3))
    assert meters.on_card(EVENTS[:3]) == (0, 0)
    old = SimpleNamespace(**{k: v for k, v in vars(EVENTS[3]).items() if k[:7] != "is_user"})
    assert meters.on_card([old]) == (1, pytest.approx(1e-3))


def test_the_rows_of_a_card(monkeypatch: pytest.MonkeyPatch):
    card = Card(monkeypatch)
    told: list[Row] = []
    rows = measure(group("12 GB", plan.FLOOR), Cuda(torch.device("cpu")), say=told.append)
    ours = rows["LoRA², 12 GB"]
    assert ours.status == "measured", ours.note
    assert (ours.peak_allocated_mb, ours.peak_reserved_mb, ours.kernels) == (7000, 8000, 3)
    assert ours.told_mb and ours.told_of_taken == pytest.approx(ours.told_mb / 7000)
    assert ours.step_ms and ours.idle == pytest.approx(max(0, 1 - 2.5 / ours.step_ms))
    assert ours.in_turns and ours.of_floor and ours.note == ""
    assert list(by_name(told)) == list(rows)
    emptied = card.calls.index("reset_peak_memory_stats")
    assert card.calls[emptied - 1] == "empty_cache"  # what is reserved is of these steps
    assert card.calls.count("synchronize") >= 2 * 2 * 2


def test_a_profiler_that_sees_no_kernels_tells_nothing(monkeypatch: pytest.MonkeyPatch):
    Card(monkeypatch)
    monkeypatch.setattr(meters, "raw_events", lambda _: EVENTS[:1])
    (row,) = measure(group(plan.FLOOR), Cuda(torch.device("cpu"))).values()
    assert row.kernels is None and row.idle is None and row.step_ms
    monkeypatch.setattr(meters, "supported_activities", set)
    monkeypatch.setattr(meters, "profile", None)
    with Cuda(torch.device("cpu")).profiling() as found:
        pass
    assert found.kernels is None


def test_what_would_fill_the_card_is_not_put_side_by_side(monkeypatch: pytest.MonkeyPatch):
    Card(monkeypatch, free=6_000_000_000)  # and the peak of each is 7 GB
    cells = group(plan.FLOOR, plan.KOHYA)
    rows = measure(cells, Cuda(torch.device("cpu")), make=lambda *_: stepping(lambda: None))
    assert {(row.note, row.in_turns) for row in rows.values()} == {(ALONE, False)}


def test_what_others_left_on_the_card_is_said(monkeypatch: pytest.MonkeyPatch):
    Card(monkeypatch).held += 12_000_000
    cells = group(plan.FLOOR)
    rows = measure(cells, Cuda(torch.device("cpu")), make=lambda *_: stepping(lambda: None))
    assert rows[plan.FLOOR].note == "12 MB of others were still on the card"


def test_cards_are_asked_for_by_number(monkeypatch: pytest.MonkeyPatch):
    card = Card(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert meters.meter("cuda").device == torch.device("cuda:0")
    assert card.calls == ["set_device"]
    with pytest.raises(ValueError, match="--device is cuda:1, and there are 1 cards: use cuda:0"):
        meters.meter("cuda:1")


def test_where_a_result_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    Card(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))  # neither nvidia-smi nor git
    found = record.record([], torch.device("cuda", 0), tmp_path, ["--minutes", "3"], minutes=3)
    assert found["card"] == {
        "name": "Some Card", "memory_mb": 24_000, "capability": "8.6", "allocator": "native",
    }  # fmt: skip
    assert (found["driver"], found["commit"], found["comfyui"]) == ("unknown",) * 3
    assert found["command"] == "python bench/gpu.py --minutes 3"
    if os.name != "nt":
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 570.1\necho 570.1\n")
        tool.chmod(0o755)
        again = record.record([], torch.device("cuda", 0), tmp_path, [])
        assert again["driver"] == "570.1"
