"""A tree of tensors and plain values comes back from its file exactly, or not at all."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.files import atomic, checkpoint
from lora2_pack.lora2_core.files.atomic import remove_leftovers, replacing
from lora2_pack.lora2_core.files.checkpoint import Checkpoint, CheckpointError
from lora2_pack.lora2_core.files.encode import DTYPE_NAMES
from lora2_pack.tests.core import spoiling, toy

DTYPES = [dtype for dtype in DTYPE_NAMES if dtype is not torch.bool] + [torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), generator=generator)
    tensor = raw.to(torch.uint8).view(dtype).view(shape)
    return tensor.movedim(0, -1) if draw(st.booleans()) and shape else tensor  # not contiguous


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(max_size=8)
    | tensors()
)
keys = st.text("abc é.$_0", min_size=1, max_size=5)
trees = st.dictionaries(
    keys,
    st.recursive(
        leaves,
        lambda part: st.lists(part, max_size=3) | st.dictionaries(keys, part, max_size=3),
        max_leaves=12,
    ),
    max_size=4,
)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if torch.is_tensor(one):
        assert one.dtype == other.dtype and one.shape == other.shape
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
        assert torch.equal(*raw)
    elif isinstance(one, dict):
        assert list(one) == list(other), "the order of keys counts: parameters follow it"
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        same = struct.pack("<d", one) == struct.pack("<d", other) if type(one) is float else False
        assert same or one == other or (one != one and other != other)


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(state=trees)
def test_any_tree_comes_back_exactly(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.write(path, Checkpoint("run", 7, "a/b.safetensors", state))
    read = checkpoint.read(path, "run")
    assert (read.run, read.step, read.target) == ("run", 7, "a/b.safetensors")
    assert_same(read.state, state)
    safetensors.torch.load_file(path)  # an ordinary safetensors file


def test_the_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    state = {"generator": generator.get_state(), "empty": {}, "zero": torch.tensor(0.1)}
    checkpoint.write(tmp_path / "x", Checkpoint("r", 0, "", state))
    wanted = torch.rand(5, generator=generator)
    read = checkpoint.read(tmp_path / "x", "r").state
    again = torch.Generator()
    again.set_state(read["generator"])
    assert torch.equal(torch.rand(5, generator=again), wanted)
    assert read["empty"] == {} and read["zero"].shape == ()


def test_equal_states_give_equal_bytes_and_a_new_one_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "x"
    checkpoint.write(path, _example(1.0))
    first = path.read_bytes()
    checkpoint.write(path, _example(2.0))
    assert path.read_bytes() != first
    checkpoint.write(path, _example(1.0))
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def _example(value: float = 1.0) -> Checkpoint:
    weights = torch.full((64, 64), value)
    return Checkpoint("run", 3, "there", {"weights": weights, "bytes": torch.zeros(3).byte()})


@pytest.mark.parametrize("place", [5, 40, 300, 2000, -5, -1])
def test_one_wrong_bit_is_noticed(tmp_path: Path, place: int) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.write(path, _example())
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path, "run")
    check_one_line(caught.value, path)


def check_one_line(error: CheckpointError, path: Path) -> None:
    assert str(path) in str(error)
    assert "\n" not in str(error)


def test_a_file_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.write(path, _example())
    data = path.read_bytes()
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read(path, "run")
        check_one_line(caught.value, path)


@pytest.mark.parametrize("name", toy.UNREADABLE)
def test_what_is_no_file_of_ours_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(toy.UNREADABLE[name][0])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path, "run")
    check_one_line(caught.value, path)


def test_other_files_say_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        checkpoint.read(path, "run")  # not there
    path.write_bytes(toy.GOOD)
    with pytest.raises(CheckpointError, match="is no checkpoint of LoRA²"):
        checkpoint.read(path, "run")
    checkpoint.write(path, _example())
    with pytest.raises(CheckpointError, match="a run with other settings or photos"):
        checkpoint.read(path, "another run")
    data = path.read_bytes()
    for step in ("x", "-1", "1e9", "7" * 5000, ""):
        head, body = spoiling.header_and_body(data)
        head["__metadata__"]["lora2.checkpoint.step"] = step
        text = json.dumps(head).encode()
        whole = len(text).to_bytes(8, "little") + text + body[:-4]
        path.write_bytes(whole + struct.pack("<I", zlib.crc32(whole)))
        with pytest.raises(CheckpointError, match="damaged or no checkpoint: its step is"):
            checkpoint.read(path, "run")
    monkeypatch.setattr(checkpoint, "_VERSION", "2")
    checkpoint.write(path, _example())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2, of another version"):
        checkpoint.read(path, "run")


@pytest.mark.parametrize(
    "state",
    [
        {"a": (1, 2)},
        {"a": np.float64(1.0)},
        {"a": {1: 2}},
        {"a": {"": 1}},
        {"a/b": 1},
        {"a": torch.zeros(1, dtype=torch.complex64)},
        {"a": ...},
    ],
    ids=str,
)
def test_what_would_come_back_changed_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="a"):
        checkpoint.write(tmp_path / "x", Checkpoint("r", 0, "", state))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    checkpoint.write(path, _example())
    before = path.read_bytes()
    with toy.file_size_limit(1000), pytest.raises(OSError):
        checkpoint.write(path, _example(2.0))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_mode_that_may_not_be_changed_fails_no_write(tmp_path: Path, monkeypatch) -> None:
    """As on exFAT, vfat and SMB."""

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for module, name in ((os, "chmod"), (Path, "chmod")):
        monkeypatch.setattr(module, name, refused)
    with replacing(tmp_path / "x") as file:
        file.write(b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_only_leftovers_of_the_file_itself_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "a [b].safetensors"
    others = [
        ".a [b].safetensors.backup01.x",
        "a [b].safetensors.abcd1234",
        ".a b.safetensors.abcd1234",
    ]
    for name in [*others, ".a [b].safetensors.abcd1234"]:
        (tmp_path / name).write_bytes(b"x")
    with replacing(path) as file:
        file.write(b"whole")
    remove_leftovers(path)
    assert {file.name for file in tmp_path.iterdir()} == {*others, path.name}
    remove_leftovers(tmp_path / "not there" / "x")


def test_what_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    """Neither of this process nor of another one, which may be another server."""
    path = tmp_path / "x"
    with replacing(path) as file:
        file.write(b"who")
        remove_leftovers(path)
        file.write(b"le")
    assert path.read_bytes() == b"whole"
    script = (
        "import runpy, sys, time; atomic = runpy.run_path(sys.argv[1])\n"
        "with atomic['replacing'](__import__('pathlib').Path(sys.argv[2])) as file:\n"
        "    file.write(b'other'); file.flush(); print('ready', flush=True); sys.stdin.readline()\n"
    )
    for end in ("writes on", "dies"):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(atomic.__file__), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        remove_leftovers(path)
        if end == "dies":
            process.kill()
        process.communicate("\n")
        left = {file.name for file in tmp_path.iterdir()} - {"x"}
        assert bool(left) == (end == "dies")
        assert path.read_bytes() == b"other"
    remove_leftovers(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x"], "its owner is dead"


def test_where_nothing_can_be_held_age_tells(tmp_path: Path, monkeypatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    young, old = tmp_path / ".x.abcd1234", tmp_path / ".x.abcd5678"
    for file in (young, old):
        file.write_bytes(b"x")
    os.utime(old, (1, 1))
    remove_leftovers(tmp_path / "x")
    assert [file.name for file in tmp_path.iterdir()] == [young.name]
