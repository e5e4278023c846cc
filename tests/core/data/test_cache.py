"""The cache on disk: what it keeps, and that no trouble with the disk stops a run."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.lora2_core.data.cache import TensorCache, content_key
from lora2_pack.tests.core import toy

torch.set_num_threads(1)

KEY = content_key("latent", 1)


def tensors() -> dict[str, torch.Tensor]:
    nan = toy.noise(3, 2)
    nan[0, 0] = float("nan")
    whole = toy.noise(4, 6)
    return {
        "latent": toy.noise(4, 8, 8),
        "half": toy.noise(5).half(),
        "brain": toy.noise(2, 3).bfloat16(),
        "count": torch.tensor(7),
        "nothing": torch.zeros(0, 4),
        "nan": nan,
        "turned": whole.T,  # neither contiguous nor alone in its memory
        "shared": whole[1:3],
    }


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(ours, theirs)


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("made although it is in the cache")


# --- what is kept -----------------------------------------------------------------------------


def test_what_was_made_is_read_bit_for_bit(tmp_path: Path) -> None:
    made, first, second = (
        tensors(),
        TensorCache(tmp_path / "a" / "b"),
        TensorCache(tmp_path / "a" / "b"),
    )
    check_same(first.get_or_make(KEY, lambda: made), made)
    check_same(second.get_or_make(KEY, never), made)
    assert (first.hits, first.misses) == (0, 1)
    assert (second.hits, second.misses) == (1, 0)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [f"{KEY}.safetensors"]


def test_keys_are_kept_apart(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    for number in range(3):
        cache.get_or_make(content_key(number), lambda n=number: {"x": torch.tensor(n)})
    values = [int(cache.get_or_make(content_key(n), never)["x"]) for n in range(3)]
    assert values == [0, 1, 2]
    assert (cache.hits, cache.misses) == (3, 3)


def test_without_a_folder_all_is_made(tmp_path: Path) -> None:
    cache, made = TensorCache(None), tensors()
    for _ in range(2):
        check_same(cache.get_or_make(KEY, lambda: made), made)
    assert (cache.hits, cache.misses) == (0, 2)


def test_what_is_made_in_inference_mode_can_be_trained_on(tmp_path: Path) -> None:
    weight = torch.ones(3, requires_grad=True)
    for folder in (None, tmp_path, tmp_path):
        with torch.inference_mode():
            found = TensorCache(folder).get_or_make(KEY, lambda: {"x": torch.ones(3) * 2})["x"]
        weight.grad = None
        (weight * found).sum().backward()
        assert torch.equal(weight.grad, torch.full((3,), 2.0))


def test_a_failure_to_make_passes_through_and_keeps_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        TensorCache(tmp_path).get_or_make(KEY, fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "../other", "a/b", "a.b", "ä", "a b", "a\n"])
def test_a_key_cannot_leave_the_folder(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"key is .*content_key"):
        TensorCache(tmp_path).get_or_make(key, never)


# --- damage -----------------------------------------------------------------------------------


def foreign(kind: str, good: bytes) -> bytes:
    (length,) = struct.unpack("<Q", good[:8])
    flipped = bytearray(good)
    flipped[-1] ^= 1
    return {
        "empty": b"",
        "text": b"no tensors here, but long enough",
        "cut": good[: len(good) - 7],
        "header": good[: 8 + length // 2],
        "flipped": bytes(flipped),
        "longer": good + b"\0",
        "other": safetensors.torch.save({"x": torch.ones(2)}, {"by": "somebody else"}),
        "bare": safetensors.torch.save({"x": torch.ones(2)}),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "text", "cut", "header", "flipped", "longer", "other", "bare"]
)
def test_a_damaged_or_foreign_file_is_made_anew(kind: str, tmp_path: Path, caplog) -> None:
    path, made = tmp_path / f"{KEY}.safetensors", tensors()
    TensorCache(tmp_path).get_or_make(KEY, lambda: made)
    good = path.read_bytes()
    path.write_bytes(foreign(kind, good))
    cache = TensorCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        check_same(cache.get_or_make(KEY, lambda: made), made)
    assert [
        f"{KEY}.safetensors in the cache is made anew" in r.message for r in caplog.records
    ] == [True]
    assert (cache.hits, cache.misses) == (0, 1)
    check_same(TensorCache(tmp_path).get_or_make(KEY, never), made)


def test_a_file_of_another_key_is_made_anew(tmp_path: Path, caplog) -> None:
    other = content_key("other")
    TensorCache(tmp_path).get_or_make(other, tensors)
    (tmp_path / f"{other}.safetensors").rename(tmp_path / f"{KEY}.safetensors")
    found = TensorCache(tmp_path).get_or_make(KEY, lambda: {"x": torch.ones(2)})
    assert torch.equal(found["x"], torch.ones(2))
    assert "holds something else" in caplog.text


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path, made = tmp_path / f"{KEY}.safetensors", {"x": toy.noise(3), "y": torch.arange(2)}
    TensorCache(tmp_path).get_or_make(KEY, lambda: made)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        check_same(TensorCache(tmp_path).get_or_make(KEY, lambda: made), made)


# --- a disk that refuses ----------------------------------------------------------------------


def check_goes_on_with_one_warning(folder: Path, caplog) -> None:
    cache, made = TensorCache(folder), tensors()
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            check_same(cache.get_or_make(content_key(number), lambda: made), made)
    assert ["switched off" in record.message for record in caplog.records] == [True]
    assert (cache.hits, cache.misses) == (0, 3)


def test_a_folder_that_cannot_be_made_only_warns(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_bytes(b"")
    check_goes_on_with_one_warning(tmp_path / "file" / "cache", caplog)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_file_system_without_files_only_warns(caplog) -> None:
    check_goes_on_with_one_warning(Path("/proc/self/task"), caplog)


def _write_on_a_full_disk(folder: str, answers: multiprocessing.Queue) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # a write beyond fails, as when full
    cache, warnings = TensorCache(Path(folder)), []
    logging.getLogger().addFilter(lambda record: warnings.append(record.getMessage()) or False)
    for number in range(3):
        cache.get_or_make(content_key(number), lambda: {"x": torch.zeros(9000)})
    answers.put((cache.misses, warnings, os.listdir(folder)))


@pytest.mark.skipif(os.name != "posix", reason="limits a process's files")
def test_a_full_disk_only_warns_and_leaves_nothing_behind(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_write_on_a_full_disk, args=(str(tmp_path), answers))
    process.start()
    misses, warnings, left = answers.get(timeout=60)
    process.join(60)
    assert misses == 3
    assert len(warnings) == 1
    assert "could not be written" in warnings[0]
    assert left == []


# --- keys -------------------------------------------------------------------------------------

PART = st.one_of(
    st.text(max_size=4),
    st.binary(max_size=4),
    st.integers(-9, 9),
    st.floats(allow_nan=False, width=16),
)


def identity(part: object) -> tuple[str, str]:
    return type(part).__name__, repr(part)


@given(first=st.lists(PART, max_size=4), second=st.lists(PART, max_size=4))
def test_keys_are_equal_only_for_equal_parts(first: list, second: list) -> None:
    same = [identity(part) for part in first] == [identity(part) for part in second]
    assert (content_key(*first) == content_key(*second)) == same


def test_look_alikes_have_keys_of_their_own() -> None:
    x = torch.arange(4, dtype=torch.float32)
    groups = [
        (),
        ("",),
        (b"",),
        ("", ""),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (b"abc",),
        ("str 3\nabc",),
        (1,),
        (1.0,),
        ("1",),
        (True,),
        (0.0,),
        (-0.0,),
        (x,),
        (x.view(2, 2),),
        (x.view(4, 1),),
        (x.view(torch.int32),),
        (x.double(),),
        (x, x),
        (x.flip(0),),
        (torch.zeros(0),),
        (torch.zeros(0, 2),),
        (torch.tensor(1),),
        (torch.tensor([1]),),
    ]
    keys = [content_key(*parts) for parts in groups]
    for (one, a), (two, b) in itertools.combinations(zip(groups, keys, strict=True), 2):
        assert a != b, (one, two)
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)


def test_a_tensor_counts_by_its_values_not_by_its_memory() -> None:
    x = toy.noise(3, 5)
    assert content_key(x.T) == content_key(x.T.contiguous())
    with torch.inference_mode():
        assert content_key(x + 0) == content_key(x)
    assert content_key(x.clone().requires_grad_()) == content_key(x)


def test_a_known_key_stays_the_same() -> None:
    """Otherwise every cache on disk would be made anew after an update."""
    assert (
        content_key("a", 1, 2.5, b"x", torch.arange(3))
        == "607dfcc8e54d33586ef2f39cda1e2afeb72e2b3c96c50be265b4d19a9aa2a514"
    )


def test_other_kinds_of_parts_are_refused() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        content_key("a", None)  # type: ignore[arg-type]
