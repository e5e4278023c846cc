"""Headers of strangers' files: every way in which one can be wrong has a sentence of its own."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.files.header import (
    ITEM_BYTES,
    LARGEST_HEADER,
    LoRAFileError,
    TensorEntry,
    encode_header,
    in_file_order,
    one_line,
    read_header,
    shown_key,
    tensor_bytes,
    tensor_entries,
)
from lora2_pack.tests.core.toy import GOOD, PAIR, entry, raw_file

torch.set_num_threads(1)

TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def _refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(LoRAFileError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(str(path)) and len(message) < 600
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


# --- what is sound ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_it_is_what_the_library_wrote(path: Path, dtype: torch.dtype):
    shapes = {"b": (3, 2), "a.ü ²": (), "none": (0, 5), "c": (1, 1, 4, 2)}
    state = {key: torch.zeros(shape, dtype=dtype) for key, shape in shapes.items()}
    safetensors.torch.save_file(state, path, {"ν": "\u2028 \U0001f40d", "": ""})
    header = read_header(path)
    assert header.metadata == {"ν": "\u2028 \U0001f40d", "": ""}
    assert {key: one.shape for key, one in header.entries.items()} == shapes
    assert header.file_bytes == path.stat().st_size
    for key, one in header.entries.items():
        assert one.nbytes == state[key].nbytes and ITEM_BYTES[one.dtype] == state[key].itemsize
        assert header[key] is one and key in header
    assert "missing" not in header
    assert max(one.end for one in header.entries.values()) + header.data_start == header.file_bytes


def test_places_are_those_of_the_numbers(path: Path):
    state = {"a": torch.arange(6.0), "b": torch.arange(3)}
    safetensors.torch.save_file(state, path)
    header, data = read_header(path), path.read_bytes()
    start = header.data_start + header["a"].start
    assert struct.unpack("<6f", data[start : start + 24]) == tuple(range(6))


@pytest.mark.parametrize("metadata", [{}, {"__metadata__": {}}, {"__metadata__": None}])
def test_no_metadata_is_fine(path: Path, metadata: dict):
    path.write_bytes(raw_file({**metadata, **PAIR}, bytes(28)))
    assert read_header(path).metadata == {} and len(read_header(path).entries) == 2


def test_no_tensors_and_trailing_spaces_are_fine(path: Path):
    path.write_bytes(raw_file(b"{}    "))
    assert read_header(path).entries == {}


def test_keys_keep_the_order_of_the_file(path: Path):
    path.write_bytes(raw_file({"b": entry([2], 4), "a": entry([2], 0)}, bytes(8)))
    assert list(read_header(path).entries) == ["b", "a"]


def test_letters_beyond_the_first_plane_may_be_escaped(path: Path):
    path.write_bytes(raw_file(b'{"__metadata__":{"\\ud83d\\udc0d":"\\u00e9"}}'))
    assert read_header(path).metadata == {"\U0001f40d": "é"}


def test_the_tensors_are_not_read(path: Path):
    path.write_bytes(raw_file({"a": entry([1 << 32], 0)}))
    os.truncate(path, path.stat().st_size + (1 << 33))  # 8 GB of hole
    assert read_header(path).entries == {"a": TensorEntry((1 << 32,), "F16", 0, 1 << 33)}


SHAPES = st.dictionaries(
    st.text(max_size=5),
    st.tuples(
        st.sampled_from(list(ITEM_BYTES)), st.lists(st.integers(0, 3), max_size=3).map(tuple)
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=100)
@given(shapes=SHAPES, metadata=st.dictionaries(st.text(max_size=5), st.text(), max_size=3))
def test_what_is_written_is_read(tmp_path_factory, shapes, metadata):
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    written = encode_header(tensor_entries(in_file_order(shapes)), metadata)
    path.write_bytes(written + bytes(sum(map(tensor_bytes, shapes.values()))))
    header = read_header(path)
    assert header.metadata == metadata
    assert {key: (one.dtype, one.shape) for key, one in header.entries.items()} == shapes
    assert header.data_start == len(written) and len(written) % 8 == 0
    assert all(one.start % ITEM_BYTES[one.dtype] == 0 for one in header.entries.values())


def test_a_compact_header_is_the_library_s():
    shapes = {
        "b": ("F32", (2, 3)),
        'ä"\n\x01': ("F16", (4,)),
        "a": ("F32", ()),
        "c": ("F16", (0, 2)),
    }
    state = {
        key: torch.zeros(shape, dtype=torch.float16 if dtype == "F16" else torch.float32)
        for key, (dtype, shape) in shapes.items()
    }
    for metadata in ({}, {"ss_ü": '\u2028\x7f\x00"\\/'}):
        library = safetensors.torch.save(state, metadata)
        compact = encode_header(tensor_entries(in_file_order(shapes)), metadata, compact=True)
        assert library[: len(compact)] == compact


# --- what is not ------------------------------------------------------------------------------


def _with(**changes: Any) -> dict:
    return {**PAIR, "k.lora_up.weight": {**entry([4, 2], 12), **changes}}


HEADERS = {
    "no JSON": (b"{'a': 1}", "its header is no JSON"),
    "no UTF-8": (b'{"\xff": 1}', "its header is no JSON"),
    "not closed": (b'{"a": {', "its header is no JSON"),
    "more behind": (b"{} {}", "its header is no JSON"),
    "NaN": (b'{"a": NaN}', "its header holds NaN"),
    "nested": (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "its header is no JSON"),
    "a long number": (b'{"a": ' + b"9" * 9000 + b"}", "its header is no JSON"),
    "half a character": (b'{"a\\ud800": 1}', r"a\? in its header is no text"),
    "half a character in metadata": (b'{"__metadata__": {"a": "\\udc00"}}', "no text"),
    "twice": (b'{"a": 1, "a": 2}', "a stands in its header twice"),
    "twice inside": (b'{"a": {"shape": [1], "shape": [2]}}', "shape stands in its header twice"),
    "metadata twice": (b'{"__metadata__": {}, "__metadata__": {}}', "stands in its header twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "metadata is not all text"),
    "metadata in a list": ({"__metadata__": ["a"]}, "metadata is not all text"),
    "a number": ({"a": 3}, "entry of a is not that of a tensor"),
    "a field too many": (_with(extra=1), "entry of k.lora_up.weight is not that of a tensor"),
    "an unknown type": (_with(dtype="Q4"), "k.lora_up.weight is of the unknown type Q4"),
    "a type of another kind": (_with(dtype=["F16"]), "of the unknown type list"),
    "a shape of text": (_with(shape="42"), "are not whole numbers from 0 up"),
    "a shape with a sign": (_with(shape=[-4, -2]), "are not whole numbers from 0 up"),
    "a broken shape": (_with(shape=[4.0, 2]), "are not whole numbers from 0 up"),
    "a shape of truths": (_with(shape=[True, 8]), "are not whole numbers from 0 up"),
    "three places": (_with(data_offsets=[12, 20, 28]), "are not whole numbers from 0 up"),
    "one place": (_with(data_offsets=[12]), "are not whole numbers from 0 up"),
    "a huge side": (_with(shape=[1 << 63]), "are not whole numbers from 0 up"),
    "a huge product": (_with(shape=[1 << 40] * 4), "beyond all measure"),
    "too many sides": (_with(shape=[1] * 17), "beyond all measure"),
    "backwards": (_with(data_offsets=[28, 12]), "of another size than its shape and type"),
    "another size": (_with(shape=[4, 1]), "of another size than its shape and type"),
    "another type": (_with(dtype="F32"), "of another size than its shape and type"),
    "an overlap": (_with(data_offsets=[10, 26]), "overlaps another tensor"),
    "a gap": (
        {"a": entry([2], 0), "b": entry([2], 8), "c": entry([8], 12)}, "b lies behind a gap"
    ),
    "the same place": ({"a": entry([14], 0), "b": entry([14], 0)}, "b overlaps another tensor"),
    "bytes behind": ({"a": entry([2], 0)}, "24 bytes behind its last tensor belong to none"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_each_flaw_has_its_own_sentence(path: Path, case: str):
    header, words = HEADERS[case]
    message = _refused(path, raw_file(header, bytes(28)))
    assert "is not a safetensors file (" in message and "only .safetensors LoRAs" in message
    assert re.search(words, message), message


def test_empty_tensors_may_lie_at_one_place(path: Path):
    path.write_bytes(
        raw_file({"a": entry([0], 0), "b": entry([2], 0), "c": entry([0], 4)}, b"1234")
    )
    assert len(read_header(path).entries) == 3


def test_a_file_that_is_cut_short_says_where(path: Path):
    assert "truncated after" in _refused(path, GOOD[:-1])
    assert "Download or copy it again" in _refused(path, GOOD[:-1])
    assert f"it ends after 50 bytes, within its header of {len(GOOD) - 28}" in _refused(
        path, GOOD[:50]
    )
    large = {"a": entry([1_400_000_000], 0)}
    assert "truncated after 0.0 of 2.8 GB" in _refused(path, raw_file(large, bytes(9)))
    for length in range(9):
        assert "is not a safetensors file" in _refused(path, GOOD[:length])


def test_a_header_is_no_longer_than_ten_million_bytes(path: Path):
    longest = LARGEST_HEADER
    text = json.dumps({"__metadata__": {"a": ""}, **PAIR}).encode()
    full = text.replace(b'""', b'"' + b"x" * (longest - len(text)) + b'"')
    assert len(full) == longest
    path.write_bytes(raw_file(full, bytes(28)))
    assert len(read_header(path).metadata["a"]) > 9_999_000
    message = _refused(path, raw_file(full + b" ", bytes(28)))
    assert "its header would take 10 MB, and 10 MB is the most" in message
    message = _refused(path, struct.pack("<Q", 1 << 63) + b"{}")
    assert "would take 9.223e+09 GB" in message


def test_how_many_parts_there_may_be(path: Path):
    """Quotes and brackets within a text are no parts."""
    text = json.dumps({"ss_tag_frequency": '{"[,' * 90_000 + "\\" * 999 + '"'})
    path.write_bytes(raw_file({"__metadata__": {"a": text * 10}, **PAIR}, bytes(28)))
    assert read_header(path).metadata == {"a": text * 10}
    empty = {
        f"{n}": {"dtype": "U8", "shape": [], "data_offsets": [n, n + 1]} for n in range(29_000)
    }
    path.write_bytes(raw_file(empty, bytes(29_000)))
    assert len(read_header(path).entries) == 29_000
    assert "more parts than any LoRA's" in _refused(path, raw_file(b'{"a":[' + b"1," * 299_999))
    names = b",".join(b'"%x":""' % n for n in range(150_000))
    assert "more parts" in _refused(path, raw_file(b'{"__metadata__":{' + names + b"}}"))


# --- the file itself --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a\u202eb", "ü ²", os.fsdecode(b"\xff\xfe")])
def test_whatever_a_file_is_called_the_message_is_one_line(tmp_path: Path, name: str):
    path = tmp_path / f"{name}.safetensors"
    try:
        path.write_bytes(b"")
    except (OSError, UnicodeError):
        pytest.skip("no such name here")
    with pytest.raises(LoRAFileError, match="it is empty") as caught:
        read_header(path)
    assert str(caught.value).isprintable()
    if name.isprintable():
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["missing", "a\0b", "\ud800", "x" * 300])
def test_no_such_file(tmp_path: Path, name: str):
    with pytest.raises(LoRAFileError, match=r"does not exist|cannot be read") as caught:
        read_header(tmp_path / name)
    assert str(caught.value).isprintable()


def test_what_a_message_shows_of_a_key():
    assert shown_key("a\n\x1b[31mü") == "a??[31mü"
    assert shown_key("x" * 80) == "x" * 80
    assert shown_key("a" * 45 + "b" * 45) == "a" * 39 + "…" + "b" * 40
    assert one_line("x\u202ey" * 99) == "x?y" * 99


# --- anything at all --------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BYTES, "X"]) | VALUES,
        "shape": st.lists(st.integers(-1, 5), max_size=4) | VALUES,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | VALUES,
    }
)


@st.composite
def _nearly_sound(draw: st.DrawFn) -> tuple[Any, bytes]:
    """Tensors one behind the other, some of whose numbers may be off by one."""
    header: dict[str, Any] = {"__metadata__": draw(st.dictionaries(st.text(), st.text()))}
    end = 0
    for key in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(list(ITEM_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        off = draw(st.sampled_from([0] * 9 + [1, -1]))
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start + off, end]}
    return header, bytes(max(0, end + draw(st.sampled_from([0] * 9 + [1, -1]))))


@settings(deadline=None, max_examples=400)
@given(
    file=_nearly_sound()
    | st.tuples(
        st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | VALUES) | VALUES,
        st.binary(max_size=40),
    )
)
def test_any_json_is_read_or_refused_as_the_library_does(tmp_path_factory, file):
    """What is taken here, the library takes too, and finds the same in it."""
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(raw_file(*file))
    try:
        found = read_header(path)
    except LoRAFileError as error:
        assert str(error).isprintable()
        return
    with safetensors.safe_open(path, "pt") as library:
        shapes = {key: tuple(library.get_tensor(key).shape) for key in library.keys()}  # noqa: SIM118
        assert (library.metadata() or {}) == found.metadata
    assert shapes == {key: one.shape for key, one in found.entries.items()}
