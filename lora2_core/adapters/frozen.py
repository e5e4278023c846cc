"""Frozen layers that take less memory than PyTorch's own while others learn.

A weight may be kept in eight bits, half of bf16's memory: float8_e4m3fn with one scale. Its layer
casts it to the type of its input when it is used, and casts it again in the backward pass: nothing
of a cast weight outlives its layer, and gradients are those of the cast weight, exactly. And a
convolution need not keep its input, which is for the gradient of a weight that has none. Names and
classes of layers stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LARGEST = 448.0  # of float8_e4m3fn
# What the largest size can be in eight bits, but for a power of two.
_TOPS = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
_NEAR = 0.008  # relative: what bf16 rounds, twice; an eighth of what eight bits do
_LOOK = 4096  # numbers by which a weight that is not in eight bits yet is told
_FEWEST = 4096  # numbers of a weight that is worth it

Kinds = tuple[type[nn.Module], ...]
_NONE, _OF_INPUT = [0, 0], [True, False, False]  # lists, which PyTorch reads fastest


class EightBits(NamedTuple):
    """A weight as ``numbers``, float8_e4m3fn, times ``scale``, which is an fp32 number."""

    numbers: Tensor
    scale: float

    def cast(self, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, rounded once."""
        # Eight bits fit into every type; a scale that is no tensor is not rounded to ``dtype``.
        if self.numbers.device.type != "cpu":
            return self.numbers.to(dtype).mul_(self.scale)
        # From a table: PyTorch's own cast takes five times as long on a CPU.
        places = self.numbers.view(torch.uint8).flatten().int()
        return (_table(dtype) * self.scale).index_select(0, places).view(self.numbers.shape)


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """All that eight bits can say, (256,)."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)


def hold_a_little(device: torch.device, dtype: torch.dtype) -> None:
    """Keep 8 × 8 numbers on ``device`` in eight bits and cast them to ``dtype``.

    Raises what PyTorch does where it cannot, and RuntimeError where it has no such type.
    """
    if not hasattr(torch, "float8_e4m3fn"):
        raise RuntimeError(f"PyTorch {torch.__version__} has no float8_e4m3fn")
    kept = torch.ones(8, 8).to(torch.float8_e4m3fn).to(device)
    float(EightBits(kept, 0.5).cast(dtype).sum())


@torch.no_grad()
def in_eight_bits(model: nn.Module, kinds: Kinds = (nn.Linear, nn.Conv2d)) -> None:
    """Keep the frozen weights of every Linear and Conv2d of ``model`` in eight bits, one by one.

    ``kinds``: subclasses of these two to look at, whose ``forward`` is theirs. Biases stay as they
    are, and so do weights of fewer than 4096 numbers, that are learnt, that are not finite, or
    whose layer computes by a ``forward`` that somebody has put there.
    """
    made: dict[int, tuple[nn.Parameter, float]] = {}  # of weights that several layers share
    for layer in model.modules():
        if not isinstance(layer, kinds) or "forward" in vars(layer):
            continue
        weight: Any = layer.weight
        if not _is_worth_it(weight):
            continue
        if id(weight) not in made:
            found = eight_bits(weight.detach())
            if found is None:
                continue
            made[id(weight)] = nn.Parameter(found.numbers, requires_grad=False), found.scale
        numbers, scale = made[id(weight)]
        kind = _Convolution if isinstance(layer, nn.Conv2d) else _Product
        layer.forward = kind(layer, scale, weight.dtype)  # type: ignore[method-assign]
        layer.weight = numbers


def keep_no_inputs(model: nn.Module, kinds: Kinds = (nn.Conv2d,)) -> None:
    """Let the frozen Conv2d of ``model`` keep nothing of their input for the backward pass; after
    :func:`in_eight_bits`, whose own keep nothing either.

    ``kinds``: as there. PyTorch keeps it whether the weight learns or not.
    """
    for layer in model.modules():
        if isinstance(layer, kinds) and "forward" not in vars(layer):
            weight: Any = layer.weight
            if type(weight) in (Tensor, nn.Parameter) and not weight.requires_grad:
                layer.forward = _Forgetting(layer)  # type: ignore[method-assign]


def is_in_eight_bits(layer: nn.Module) -> bool:
    """Whether the weight of ``layer`` is kept in eight bits by :func:`in_eight_bits`."""
    return isinstance(layer.forward, _Casting)


def computes_in(layer: nn.Module) -> torch.dtype | None:
    """The type in which ``layer`` had its weight before: that of its model. None for a layer
    without a weight."""
    if isinstance(layer.forward, _Casting):
        return layer.forward.dtype
    weight = getattr(layer, "weight", None)
    return weight.dtype if torch.is_tensor(weight) else None


def largest_cast(model: nn.Module) -> int:
    """Bytes of the largest weight that is there in the type of its input for a moment."""
    return max((found.bytes_of_cast for found in _castings(model)), default=0)


def eight_bits(weight: Tensor) -> EightBits | None:
    """``weight`` in eight bits; None where it is not finite.

    The scale is the largest size / 448, and 1 for zeros. Numbers that come from eight bits, as
    those of a file in fp8, with a scale or without, are taken back to just these.
    """
    if weight.is_meta:  # counted, never computed
        return EightBits(weight.to(torch.float8_e4m3fn), 1.0)
    wide = weight.float()
    largest = float(wide.abs().max())
    if not largest < float("inf"):
        return None
    if found := _taken_back(wide, largest):
        return found
    scale = _in_fp32(largest / _LARGEST) or 1.0
    return EightBits(_rounded(wide, scale), scale)


def _taken_back(wide: Tensor, largest: float) -> EightBits | None:
    """A weight that has been in eight bits before, whatever its scale was then, bit by bit."""
    look = wide.flatten()[:_LOOK]
    for top in _TOPS:
        scale = _in_fp32(largest / top)
        if not scale or not _near(look, _rounded(look, scale), scale):
            continue
        numbers = _rounded(wide, scale)
        if not _near(wide, numbers, scale):
            continue
        # Their mean: the type they were kept in has rounded every one, the largest too.
        sizes = (part.double().abs().sum() for part in (wide, numbers))
        return EightBits(numbers, _in_fp32(float(torch.div(*sizes))))
    return None


def _near(wide: Tensor, numbers: Tensor, scale: float) -> bool:
    back = EightBits(numbers, scale).cast(wide.dtype)
    return bool(((back - wide).abs() <= _NEAR * wide.abs()).all())


def _rounded(wide: Tensor, scale: float) -> Tensor:
    # Beyond its largest float8_e4m3fn has only NaN.
    return (wide / scale).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def _in_fp32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


def _is_worth_it(weight: Any) -> bool:
    frozen = type(weight) in (Tensor, nn.Parameter) and not weight.requires_grad
    return frozen and weight.numel() >= _FEWEST and weight.dtype.itemsize > 1


def _castings(model: nn.Module) -> Iterator[_Casting]:
    for module in model.modules():
        if isinstance(module.forward, _Casting):
            yield module.forward


class _Casting:
    """Takes the place of a layer's ``forward``. ``dtype``: what the weight was kept in before."""

    def __init__(self, layer: Any, scale: float, dtype: torch.dtype):
        self.layer, self.scale, self.dtype = layer, scale, dtype

    @property
    def weight(self) -> EightBits:
        return EightBits(self.layer.weight, self.scale)

    @property
    def bytes_of_cast(self) -> int:
        return self.layer.weight.numel() * self.dtype.itemsize


class _Product(_Casting):
    def __call__(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, *self.weight, self.layer.bias)  # type: ignore[return-value]


class _Convolution(_Casting):
    def __call__(self, x: Tensor) -> Tensor:
        return _convolved(self.layer, x, *self.weight)


class _Forgetting:
    """Takes the place of the ``forward`` of a convolution whose weight stays as it is."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return _convolved(self.layer, x, self.layer.weight, None)


def _convolved(layer: Any, x: Tensor, weight: Tensor, scale: float | None) -> Tensor:
    padding = layer.padding
    if x.dim() == 3:
        return _convolved(layer, x[None], weight, scale)[0]
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode), (0, 0)
    where = layer.stride, padding, layer.dilation, layer.groups
    return _Convolve.apply(x, weight, scale, layer.bias, where)  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, numbers: Tensor, scale: float, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(numbers)
        ctx.scale = scale
        return F.linear(x, EightBits(numbers, scale).cast(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (numbers,) = ctx.saved_tensors
        weight = EightBits(numbers, ctx.scale).cast(grad.dtype)
        return grad @ weight, None, None, None


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        x: Tensor,
        weight: Tensor,
        scale: float | None,
        bias: Tensor | None,
        where: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.scale, ctx.where, ctx.shape = scale, where, x.shape
        return F.conv2d(x, _cast(weight, scale, x.dtype), bias, *where)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        weight = _cast(kept, ctx.scale, grad.dtype)
        *where, groups = ctx.where
        # Only the shape of the input matters to the gradient for it.
        blank = grad.as_strided(ctx.shape, (0,) * len(ctx.shape))
        grad_x, _, _ = torch.ops.aten.convolution_backward.default(
            grad, blank, weight, None, *where, False, _NONE, groups, _OF_INPUT
        )
        return grad_x, None, None, None, None


def _cast(weight: Tensor, scale: float | None, dtype: torch.dtype) -> Tensor:
    return weight if scale is None else EightBits(weight, scale).cast(dtype)
