"""From trained components to the bytes of a LoRA file, and how many bytes that will be.

Pure functions: nothing here touches a disk. What the file looks like stands in
:mod:`..lora_file`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .component import Component, within_bounds
from .header import (
    LARGEST_HEADER,
    Entry,
    LoRAFileError,
    TensorShape,
    encode_header,
    in_file_order,
    tensor_bytes,
    tensor_entries,
)
from .keys import ALPHA, DOWN, UP

PREFIXES = {"unet": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_", "file": ""}
# The same in every component, whatever its rank; loaders scale by alpha / rank, which the factors
# make up for. diffusers loses alphas that differ, and then scales most layers wrongly.
STORED_ALPHA = 1.0
# A component whose fp16 ΔW would be off by more than this is kept in fp32.
_HALF_ERROR = 5e-4
_LARGEST = torch.finfo(torch.float32).max
KOHYA_WINDOW = 0x100000, 0x110000  # of a file's bytes, which kohya's short hash is of
# As a header names them.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def kohya_key(name: str, root: str = "unet") -> str:
    """``input_blocks.4.1…attn1.to_q`` → ``lora_unet_input_blocks_4_1_…_attn1_to_q``."""
    return name if root == "file" else PREFIXES[root] + name.replace(".", "_")


def fold(component: Component) -> tuple[Tensor, Tensor]:
    """(down, up) with ΔW = up · down · STORED_ALPHA / rank, columns of both sides at equal norm.

    √Λ goes into each side (eq. 10), and the root of what loaders will scale by; the norms are then
    balanced column by column, because an early B near 1e-6 beside an A near 1 would lose its
    digits in fp16.
    """
    root = (component.importance * (component.rank / STORED_ALPHA)).sqrt()  # (rank,)
    down = component.lora_down.flatten(1) * root[:, None]  # (rank, in)
    up = component.lora_up.flatten(1) * root  # (out, rank)
    down_norm, up_norm = down.norm(dim=1), up.norm(dim=0)
    usable = (down_norm > 0) & (up_norm > 0)
    balance = torch.where(usable, (up_norm / down_norm.clamp(min=1e-38)).sqrt(), 1.0)
    balance = balance.clamp(1e-18, 1e18)
    down, up = down * balance[:, None], up / balance
    return down.view_as(component.lora_down), up.view_as(component.lora_up)


def norms_and_half_errors(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Norm of up · down, and relative error of its fp16 version, of the first 1, 2, … columns.

    ``down``: (rank, in, …), ``up``: (out, rank, …), as :func:`fold` gives them. Returns fp64
    (rank,) twice; an error is not a number where fp16 overflows. Through the inner products of the
    columns: ‖U D‖² = Σ_ij (UᵀU)_ij (D Dᵀ)_ij, so that ΔW itself (out × in) is never formed.
    """
    d, u = down.flatten(1).double(), up.flatten(1).double().t()  # (rank, in), (rank, out)
    half_d, half_u = (side.half().double() for side in (down.flatten(1), up.flatten(1).t()))
    exact = (u @ u.t()) * (d @ d.t())  # (rank, rank)
    mixed = (half_u @ u.t()) * (half_d @ d.t())
    half = (half_u @ half_u.t()) * (half_d @ half_d.t())
    squares = _leading_sums(exact).clamp(min=0)
    off = _leading_sums(half - mixed - mixed.t() + exact).clamp(min=0)
    return squares.sqrt(), (off / squares).sqrt()


def fits_half(errors: Tensor) -> Tensor:
    """Where fp16 will do, for relative errors of any shape."""
    return errors <= _HALF_ERROR  # false where the error is not a number


def _leading_sums(square: Tensor) -> Tensor:
    """Sum of the leading n × n entries for n = 1, 2, …; (rank, rank) → (rank,)."""
    return square.cumsum(0).cumsum(1).diagonal()


def to_state(components: Sequence[Component]) -> dict[str, Tensor]:
    """The tensors of a file: fp16 (fp32 where fp16 would show), zero components left out.

    No rank is above min(in, out): such a component is decomposed, which is exact. Raises
    LoRAFileError if a weight is not finite.
    """
    state: dict[str, Tensor] = {}
    for one in components:
        component = within_bounds(one)
        if not component.rank:
            continue
        down, up = fold(component)
        norms, errors = norms_and_half_errors(down, up)
        if not norms[-1] <= _LARGEST:  # nor where it is not a number
            raise LoRAFileError(
                f"{component.name} holds values that are not finite, so nothing was written; "
                "train again with a lower learning_rate."
            )
        if not norms[-1]:
            continue
        if fits_half(errors[-1]):
            down, up = down.half(), up.half()
        key = kohya_key(component.name, component.root)
        state[key + DOWN], state[key + UP] = down.contiguous(), up.contiguous()
        state[key + ALPHA] = torch.tensor(STORED_ALPHA)
    return state


def stored_ranks(state: Mapping[str, Tensor], components: Iterable[Component]) -> list[int]:
    """The rank that each component has in ``state``, which is of them; 0 where it was left out."""
    keys = (kohya_key(component.name, component.root) + DOWN for component in components)
    return [state[key].shape[0] if key in state else 0 for key in keys]


def encode(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, its metadata in sorted order and with its hashes.

    So equal runs give equal files: the library would write metadata in the random order of its
    hash map. ``sshs_model_hash`` is the SHA-256 of what follows the header. ``sshs_legacy_hash``
    is, as kohya takes it, the first 8 digits of the SHA-256 of 64 KiB from byte 1,048,576 of the
    library's own file with the ``ss_*`` metadata alone.
    """
    shapes = in_file_order(shapes_of(state))
    data = b"".join(bytes_of(state[key]) for key in shapes)
    before = library_header_bytes(shapes, metadata)
    start, end = (max(edge - before, 0) for edge in KOHYA_WINDOW)
    digest = hashlib.sha256(data).hexdigest()
    legacy = hashlib.sha256(data[start:end]).hexdigest()[:8]
    return hashed_header(tensor_entries(shapes), metadata, digest, legacy) + data


def encoded_bytes(shapes: Mapping[str, TensorShape], metadata: Mapping[str, str]) -> int:
    """The length of what :func:`encode` returns for tensors of these shapes; hashes nothing."""
    entries = tensor_entries(in_file_order(shapes))
    data = sum(map(tensor_bytes, shapes.values()))
    return len(hashed_header(entries, metadata, "0" * 64, "0" * 8)) + data


def hashed_header(
    entries: Mapping[str, Entry], metadata: Mapping[str, str], digest: str, legacy: str
) -> bytes:
    """The header of a LoRA file with its two hashes, as :func:`encode` explains them."""
    full = {
        **metadata,
        "sshs_model_hash": digest,
        "modelspec.hash_sha256": "0x" + digest,
        "sshs_legacy_hash": legacy,
    }
    header = encode_header(entries, dict(sorted(full.items())))
    if len(header) > LARGEST_HEADER:  # our own readers, too, would refuse the file
        raise LoRAFileError(
            f"Nothing was written: the metadata would take {len(header) / 1e6:.1f} MB, and "
            f"{LARGEST_HEADER / 1e6:.0f} MB is the most. Choose LoRAs with less of it."
        )
    return header


def library_header_bytes(shapes: Mapping[str, TensorShape], metadata: Mapping[str, str]) -> int:
    """Where the data would start in the library's own file with the ``ss_*`` metadata alone."""
    kohya = {name: text for name, text in metadata.items() if name.startswith("ss_")}
    return len(encode_header(tensor_entries(in_file_order(shapes)), kohya, compact=True))


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, TensorShape]:
    """Types and shapes of the tensors of a state, for :func:`encoded_bytes`."""
    return {key: (DTYPE_NAMES[one.dtype], tuple(one.shape)) for key, one in state.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """The values as they lie in memory; a copy only of what is on a GPU or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def component_shapes(
    key: str, rank: int, kernel: tuple[int, ...], out_features: int, half: bool = True
) -> dict[str, TensorShape]:
    """What one component adds to a file; nothing at rank 0.

    ``kernel``: (in,) of a linear layer, (in, height, width) of a convolution.
    """
    if not rank:
        return {}
    name = "F16" if half else "F32"
    up = (out_features, rank, *(1 for _ in kernel[1:]))
    return {key + DOWN: (name, (rank, *kernel)), key + UP: (name, up), key + ALPHA: ("F32", ())}
