"""The tensors of a safetensors file, read into memory one at a time.

Never mapped: where a mapped file is cut while its tensors are used, the system kills the process
(SIGBUS), and one that is written over changes the weights under a run. A file that others have
changed since its header was read is refused.
"""

from __future__ import annotations

import shutil
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from ..encode import DTYPE_NAMES
from ..header import Header, LoRAFileError, TensorShape, shown_key
from .memory import free_ram
from .regular import open_regular, stamp_of

_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {
    name: getattr(torch, attribute)
    for name, attribute in (
        ("U16", "uint16"), ("U32", "uint32"), ("U64", "uint64"), ("F8_E8M0", "float8_e8m0fnu"),
    )
    if hasattr(torch, attribute)
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def shape_in_file(tensor: Tensor) -> TensorShape:
    """Type and shape of a tensor of a file, whatever its type, as a header names them."""
    return _NAMES[tensor.dtype], tuple(tensor.shape)


class TensorFile:
    """The tensors that ``header`` tells of, for a ``with`` block.

    Every method raises LoRAFileError, naming the file, once it cannot be read or has changed.
    """

    def __init__(self, header: Header):
        self.header = header
        self._file: BinaryIO | None = None

    def __enter__(self) -> TensorFile:
        try:
            self._file = open_regular(self.header.path)
        except OSError as error:
            raise LoRAFileError(
                f"{self.header.path} cannot be read any more ({error.strerror or error}). Check "
                "whether it was moved."
            ) from error
        try:
            self.check_unchanged()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def tensor(self, key: str) -> Tensor:
        """A tensor of the file, in memory of its own; ``key`` must be in the header."""
        entry = self.header[key]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise LoRAFileError(
                f"{self.header.path} cannot be read: {shown_key(key)} is of type {entry.dtype}, "
                f"which PyTorch {torch.__version__} does not know. Update PyTorch."
            )
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        if entry.nbytes:
            self._fill(data.numpy().data, self.header.data_start + entry.start)
        self.check_unchanged()  # before anybody calls the numbers of two files one damaged file
        return data.view(dtype).reshape(entry.shape)

    def all(self) -> dict[str, Tensor]:
        """Every tensor by its key, in the order of the header; the file was the same throughout."""
        needed, free = self.header.file_bytes, free_ram()
        if free is not None and needed > free:
            raise LoRAFileError(
                f"{self.header.path} needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB "
                "are free; close other programs, or resize the file first."
            )
        return {key: self.tensor(key) for key in self.header.entries}

    def copy_to(self, target: BinaryIO) -> None:
        """Write the whole file to ``target``, whatever stands under its name by now."""
        self._opened.seek(0)
        shutil.copyfileobj(self._opened, target)
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raises LoRAFileError if the file is no longer what its header was read from."""
        if stamp_of(self._opened) != self.header.stamp:
            raise self._changed()

    def _fill(self, buffer: memoryview, start: int) -> None:
        file, done = self._opened, 0
        try:
            file.seek(start)
            while done < len(buffer):
                count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
                if not count:
                    raise self._changed()
                done += count
        except OSError as error:
            raise LoRAFileError(
                f"{self.header.path} cannot be read: {error.strerror or error}. Copy it again."
            ) from error

    @property
    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise RuntimeError("A TensorFile is read in a with block.")
        return self._file

    def _changed(self) -> LoRAFileError:
        return LoRAFileError(
            f"{self.header.path} was changed while it was read; wait until whoever writes it is "
            "done, and run again."
        )

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
