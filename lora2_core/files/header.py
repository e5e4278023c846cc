"""The header of a safetensors file: read strictly, without its tensors, and written.

Files come from strangers. What the library that maps the tensors would take on trust is checked
here first, and every way in which a file can be wrong has its own sentence. Needs no torch, reads
the header alone, and holds no more than a few times :data:`LARGEST_HEADER` in memory.

What this pack writes (LoRAs, checkpoints, cached tensors) has its header from
:func:`encode_header`: first the places of the tensors are laid out, then they are described.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from .keys import ParsedKeys, parse_keys
from .raw.regular import NotAFile, Stamp, open_regular, stamp_of

LARGEST_HEADER = 10_000_000  # bytes; that of 560 components with all metadata takes 0.3 MB
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
ENDINGS = (".safetensors", ".sft")  # of the files that ComfyUI lists and reads as safetensors
# Of no LoRA; some have no whole number of bytes.
_UNREAD = ("F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4", "C64")
_LARGEST_NUMBER = 1 << 62
_SNIFFED = 200  # bytes at the start of what is no safetensors file
# What archives begin with, and pickles of all protocols.
_PACKED = {"gzip": b"\x1f\x8b", "7z": b"7z\xbc\xaf\x27\x1c", "RAR": b"Rar!\x1a\x07",
           "xz": b"\xfd7zXZ\0", "bzip2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}  # fmt: skip
_PICKLES = (*(bytes((0x80, protocol)) for protocol in range(1, 6)), b"(dp", b"(lp", b"ccollections")
_MOST_DIMENSIONS = 16
_MOST_PARTS = 300_000  # brackets and commas, or quotes; 30,000 tensors have as many
_FIELDS = {"dtype", "shape", "data_offsets"}

TensorShape = tuple[str, tuple[int, ...]]  # type and shape of a tensor, as a header names them
Entry = dict[str, object]  # of one tensor in the header: type, shape, place


class LoRAFileError(ValueError):
    """A file cannot be read or written; the message names the file, the cause and the fix.

    It is one line of what can be printed, whatever a file or a folder is called.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class _Flaw(ValueError):
    """What is wrong in a header, without the file's name."""


class _Unread(ValueError):
    """What the format knows and this pack does not read."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its bytes are ``start`` to ``end`` of what follows the header."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it, "F16"
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    path: Path
    entries: dict[str, TensorEntry]  # by key, in the order of the file's header
    metadata: dict[str, str]
    data_start: int  # bytes from the beginning of the file
    file_bytes: int
    stamp: Stamp  # of the file as it was when this was read

    @cached_property
    def parsed(self) -> ParsedKeys:
        """What the keys are; parsed when this is first asked for."""
        return parse_keys(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> TensorEntry:
        return self.entries[key]


def read_header(path: str | os.PathLike[str], largest: int = LARGEST_HEADER) -> Header:
    """The checked header of a safetensors file; no tensor is read.

    ``largest``: bytes that it may take. Raises LoRAFileError, in one sentence, when the file is
    missing, may not be read, is cut short or no sound safetensors file.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            return _read(path, file, stamp_of(file), largest)
    except NotAFile:
        raise LoRAFileError(
            f"{path} does not exist; choose a file from the loras folder."
        ) from None
    except OSError as error:
        raise LoRAFileError(
            f"{path} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error


def parse_header(path: Path, data: bytes) -> Header:
    """The header of what was, or is to be, written to ``path``. Raises as :func:`read_header`."""
    return _read(path, io.BytesIO(data), (0, len(data), 0, 0), LARGEST_HEADER)


def in_file_order(shapes: Mapping[str, TensorShape]) -> dict[str, TensorShape]:
    """``shapes`` in the library's order: larger items first, then by name.

    So each tensor starts at a multiple of its own item.
    """
    return dict(sorted(shapes.items(), key=lambda item: (-ITEM_BYTES[item[1][0]], item[0])))


def tensor_bytes(shape: TensorShape) -> int:
    """What a tensor takes."""
    return ITEM_BYTES[shape[0]] * math.prod(shape[1])


def tensor_entries(shapes: Mapping[str, TensorShape]) -> dict[str, Entry]:
    """The entries of a header for tensors that lie one behind the other, in this order."""
    entries: dict[str, Entry] = {}
    end = 0
    for key, (dtype, shape) in shapes.items():
        start, end = end, end + tensor_bytes((dtype, shape))
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return entries


def encode_header(
    entries: Mapping[str, Entry], metadata: Mapping[str, str], compact: bool = False
) -> bytes:
    """All that comes before the tensors: the header's length, its JSON, and what fills it up.

    ``compact``: with neither spaces nor escapes, as the library itself writes.
    """
    full = {"__metadata__": metadata, **entries}
    spaces = (",", ":") if compact else (", ", ": ")
    text = json.dumps(full, separators=spaces, ensure_ascii=not compact).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def shown_key(text: str) -> str:
    """A stranger's words in a message: one line, and not too long; of a key the end tells most."""
    return one_line(text if len(text) <= 80 else f"{text[:39]}…{text[-40:]}")


def shown_keys(names: Sequence[str], most: int = 3) -> str:
    """The first of them, as :func:`shown_key` has each: ``a, b, c, …``."""
    return ", ".join(map(shown_key, names[:most])) + (", …" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind where that is nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(text: str) -> str:
    """``text`` with a question mark for all that cannot be printed, or moves a cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _read(path: Path, file: BinaryIO, stamp: Stamp, largest: int) -> Header:
    size = stamp[1]
    start = file.read(9)
    if len(start) < 9 or start[8:] != b"{":
        raise _something_else(path, start + file.read(_SNIFFED))
    (length,) = struct.unpack("<Q", start[:8])
    if length > largest:
        raise _no_safetensors(
            path, f"its header would take {_size(length)}, and {_size(largest)} is the most"
        )
    if length > size - 8:
        raise LoRAFileError(
            f"{path} is cut short: it ends after {size} bytes, within its header of "
            f"{length + 8}. Download or copy it again."
        )
    file.seek(8)
    try:
        entries, metadata = _parse(file.read(length))
    except _Flaw as flaw:
        raise _no_safetensors(path, str(flaw)) from None
    except _Unread as unread:
        raise LoRAFileError(
            f"{path} is a safetensors file, but {unread}; save it in F16, BF16 or F32."
        ) from None
    there, announced = size - 8 - length, max((e.end for e in entries.values()), default=0)
    if there < announced:
        raise LoRAFileError(
            f"{path} is cut short: truncated after {_of_total(size, announced + 8 + length)}. "
            "Download or copy it again."
        )
    try:
        _check_places(entries, there)
    except _Flaw as flaw:
        raise _no_safetensors(path, str(flaw)) from None
    return Header(path, entries, metadata, 8 + length, size, stamp)


def _parse(text: bytes) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    _check_number_of_parts(text)
    try:
        # bytes.decode is strict, and a number that is too long for int() raises ValueError
        header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_constant)
    except (_Flaw, _Unread):
        raise
    except (ValueError, RecursionError):
        raise _Flaw("its header is no JSON") from None
    if not isinstance(header, dict):
        raise _Flaw("its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise _Flaw("its metadata is not all text")
    if rb"\u" in text:  # the only way to half a character, which can be neither shown nor written
        _check_characters(header, metadata)
    return {key: _entry(key, value) for key, value in header.items()}, metadata


def _check_number_of_parts(text: bytes) -> None:
    """Ten million bytes of empty lists would take twenty-five times as much memory."""
    bare = text.replace(rb"\\", b"").replace(rb"\"", b"")
    few = bare.count(b'"') <= _MOST_PARTS
    if few:
        outside = b"".join(bare.split(b'"')[::2])  # of all texts
        few = sum(map(outside.count, (b",", b"[", b"{"))) <= _MOST_PARTS
    if not few:
        raise _Flaw("its header has more parts than any LoRA's")


def _check_characters(header: dict[str, Any], metadata: dict[str, str]) -> None:
    for word in (*header, *metadata, *metadata.values()):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise _Flaw(f"{shown_key(word)} in its header is no text") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise _Flaw(f"{shown_key(twice)} stands in its header twice")
    return unique


def _constant(name: str) -> Any:
    raise _Flaw(f"its header holds {name}")


def _entry(key: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise _Flaw(f"the header's entry of {shown_key(key)} is not that of a tensor")
    dtype, shape, places = value["dtype"], value["shape"], value["data_offsets"]
    item = ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if item is None:
        if dtype in _UNREAD:
            raise _Unread(f"{shown_key(key)} is of the type {dtype}, which is not read here")
        name = dtype if isinstance(dtype, str) else type(dtype).__name__
        raise _Flaw(f"{shown_key(key)} is of the unknown type {shown_key(name)}")
    if not _whole(shape) or not _whole(places) or len(places) != 2:
        raise _Flaw(f"shape or place of {shown_key(key)} are not whole numbers from 0 up")
    if len(shape) > _MOST_DIMENSIONS or (count := math.prod(shape)) > _LARGEST_NUMBER:
        raise _Flaw(f"the shape of {shown_key(key)} is beyond all measure")
    start, end = places
    if end - start != count * item:
        raise _Flaw(f"the place of {shown_key(key)} is of another size than its shape and type")
    return TensorEntry(tuple(shape), dtype, start, end)


def _whole(numbers: Any) -> bool:
    if not isinstance(numbers, list) or not {*map(type, numbers)} <= {int}:  # True is no number
        return False
    return not numbers or (min(numbers) >= 0 and max(numbers) <= _LARGEST_NUMBER)


def _check_places(entries: dict[str, TensorEntry], there: int) -> None:
    """Tensors lie one behind the other, with no gap, no overlap and nothing behind them."""
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            what = "overlaps another tensor" if entry.start < end else "lies behind a gap"
            raise _Flaw(f"{shown_key(key)} {what}")
        end = entry.end
    if end != there:
        raise _Flaw(f"{there - end} bytes behind its last tensor belong to none")


def _something_else(path: Path, start: bytes) -> LoRAFileError:
    """What a file is that begins with ``start``: mostly what came in place of a download."""
    plain = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    text = plain.lower()
    if not start:
        return _no_safetensors(path, "it is empty")
    if text.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer in place of the file; use git lfs pull, or download the file"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script")):
        what = "a web page, mostly one that asks for a log-in; log in and download the file again"
    elif start.startswith((b"PK\x03\x04", b"PK\x05\x06")) and b".pkl" not in start:
        what = "a zip archive; unpack it, and choose the .safetensors file that is in it"
    elif packed := next((n for n, mark in _PACKED.items() if start.startswith(mark)), None):
        what = f"a {packed} archive; unpack it, and choose the .safetensors file that is in it"
    elif start.startswith((b"PK\x03\x04", *_PICKLES)):
        return _no_safetensors(path, "it is pickled")
    elif text.startswith((b"{", b"[")):
        words = shown_key(plain.decode(errors="replace"))
        what = f"text ({words}), mostly an error in place of a download; download it again"
    elif _is_text(start):  # a link may lead to anybody's: not a word of it is shown
        what = "plain text; download it again, or choose another"
    elif start.startswith(b"GGUF"):
        what = "a GGUF model; load it with the nodes of its pack"
    else:
        return _no_safetensors(path, "it has no header")
    return LoRAFileError(f"{path} is not a safetensors file but {what}.")


def _is_text(start: bytes) -> bool:
    """Whether it is nothing but readable characters; its last may be cut in two."""
    try:
        words = start.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:
            return False
        words = start[: error.start].decode("utf-8-sig")
    return words.strip() != "" and all(c.isprintable() or c in "\r\n\t" for c in words)


def _no_safetensors(path: Path, reason: str) -> LoRAFileError:
    return LoRAFileError(
        f"{path} is not a safetensors file ({reason}); only .safetensors LoRAs are read (pickled "
        ".pt and .ckpt files can run code)."
    )


def _of_total(size: int, total: int) -> str:
    """``1.2 of 2.8 GB``; bytes where the two would look the same."""
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    there, whole = f"{size / unit:.1f}", f"{total / unit:.1f}"
    return f"{size} of {total} bytes" if there == whole else f"{there} of {whole} {name}"


def _size(nbytes: int) -> str:
    unit, name = (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
    return f"{nbytes / unit:.4g} {name}"
