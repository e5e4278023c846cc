"""What the tensors of one component multiply to, told by their shapes alone.

Of every kind that ComfyUI applies, multiplied as it does. It would only find out while it samples
that two tensors do not fit together. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

_MOST_NUMBERS = 2**26  # of a core's product; the largest of SDXL have 2**21


class Mismatch(ValueError):
    """Two shapes that do not fit together; the message shows both."""

    def __init__(self, first: Shape, second: Shape):
        super().__init__(f"{_shown(first)} and {_shown(second)}")


class Empty(Mismatch):
    """A tensor without numbers, where a layer has inputs and outputs."""

    def __init__(self, shape: Shape):
        super().__init__(shape, ())
        self.shape = _shown(shape)


@dataclass(frozen=True)
class Product:
    """The change of one weight; 0 for what the shapes do not tell."""

    rank: int = 0
    in_features: int = 0  # times the area of a kernel
    out_features: int = 0


def product_of_pair(down: Shape, up: Shape, mid: Shape | None = None) -> Product:
    """Of two factors: (rank, in, …) and (out, rank, 1, …); a third is (rank, rank, height, width).

    Raises Mismatch.
    """
    if min(len(down), len(up)) < 2 or up[1] != down[0] or math.prod(up[2:]) != 1:
        raise Mismatch(down, up)
    inputs = math.prod(down[1:])
    if mid is not None:
        if len(mid) != 4 or mid[:2] != (down[0], down[0]) or inputs != down[1]:
            raise Mismatch(down, mid)
        inputs *= math.prod(mid[2:])
        if down[0] * inputs > _MOST_NUMBERS:
            raise Mismatch(down, mid)
    if not inputs or not up[0]:
        raise Empty(up if inputs else down)
    return Product(down[0], inputs, up[0])


def product_of_kind(kind: str, shapes: Mapping[str, Shape]) -> Product:
    """Of a kind of :data:`.keys.OTHER_ENDINGS`; ``shapes`` by the ending of the key.

    Raises Mismatch, and Empty for a layer without inputs or outputs.
    """
    product = _product_of_kind(kind, shapes)
    if kind in ("loha", "lokr", "glora"):
        empty = not product.in_features or not product.out_features  # a rank may be 0
    else:
        empty = any(0 in shape for shape in shapes.values())
    if empty:
        raise Empty(next((shape for shape in shapes.values() if 0 in shape), ()))
    return product


def precise_kind(kind: str, shapes: Mapping[str, Shape]) -> str:
    """Of a kind of :data:`.keys.OTHER_ENDINGS` what its tensors make of it: a BOFT's steps, and a
    weight that is set, are told by no ending alone. ``shapes`` by the ending of the key."""
    if kind == "oft" and any(len(shape) == 4 for shape in shapes.values()):
        return "boft"
    if kind == "difference" and ".set_weight" in shapes and not {".diff", ".diff_b"} & {*shapes}:
        return "set weight"
    return kind


def _product_of_kind(kind: str, shapes: Mapping[str, Shape]) -> Product:
    match kind:
        case "loha":
            return _loha(shapes)
        case "lokr":
            return _lokr(shapes)
        case "glora":
            return _glora(shapes)
        case "oft":
            return _oft(shapes)
        case _:
            return _difference(shapes)


def _loha(shapes: Mapping[str, Shape]) -> Product:
    """The product, number by number, of two products."""
    first, second = (
        _multiplied(shapes[f".hada_w{n}_a"], shapes[f".hada_w{n}_b"], shapes.get(f".hada_t{n}"))
        for n in (1, 2)
    )
    if first != second:
        raise Mismatch(first, second)
    return Product(shapes[".hada_w1_b"][0], math.prod(first[1:]), first[0])


def _lokr(shapes: Mapping[str, Shape]) -> Product:
    """A Kronecker product of two matrices, each whole or a product itself."""
    first, second = (
        shapes[f".lokr_w{n}"]
        if f".lokr_w{n}" in shapes
        else _multiplied(
            shapes[f".lokr_w{n}_a"], shapes[f".lokr_w{n}_b"], shapes.get(f".lokr_t{n}")
        )
        for n in (1, 2)
    )
    if len(first) != 2 or len(second) < 2:
        raise Mismatch(first, second)
    ranks = [shapes[f".lokr_w{n}_b"][0] for n in (2, 1) if f".lokr_w{n}" not in shapes]
    inputs = first[1] * math.prod(second[1:])
    return Product(ranks[0] if ranks else 0, inputs, first[0] * second[0])


def _glora(shapes: Mapping[str, Shape]) -> Product:
    """W · a1 · a2 + b1 · b2; files of old versions hold each of the four transposed."""
    a1, a2, b1, b2 = (shapes[f".{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    if min(map(len, (a1, a2, b1, b2))) < 2:
        raise Mismatch(a1, b1)
    new, old = b2[0] == b1[1] == a1[1] == a2[0], b2[1] == b1[0] == a1[0] == a2[1]
    if new and old:  # of a square layer, which is larger than its rank
        new = a2[0] < a1[0]
    if new:
        return Product(a2[0], math.prod(b2[1:]), b1[0])
    if old:
        return Product(a1[0], math.prod(b1[1:]), b2[0])
    raise Mismatch(a1, b1)


def _oft(shapes: Mapping[str, Shape]) -> Product:
    """Rotations of blocks of the output: (count, size, size); BOFT has several steps of them."""
    blocks = shapes.get(".oft_blocks")
    if blocks is None:
        return Product()
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
        raise Mismatch(blocks, (blocks[-1], blocks[-1]) if blocks else ())
    return Product(0, 0, blocks[-3] * blocks[-2])


def _difference(shapes: Mapping[str, Shape]) -> Product:
    """What is added to a weight as it is, or to a bias alone."""
    one = next((shapes[end] for end in (".diff", ".set_weight", ".w_norm") if end in shapes), None)
    one = one or next(iter(shapes.values()), ())
    return Product(0, math.prod(one[1:]) if len(one) > 1 else 0, one[0] if one else 0)


def _multiplied(a: Shape, b: Shape, core: Shape | None) -> Shape:
    """(out, in, …) of (out, rank) and (rank, in); around a core the first is (rank, out)."""
    if len(a) != 2 or len(b) != 2:
        raise Mismatch(a, b)
    if core is None:
        if a[1] != b[0]:
            raise Mismatch(a, b)
        return a[0], b[1]
    if len(core) != 4 or core[:2] != (a[0], b[0]):
        raise Mismatch(core, a if core[:1] != a[:1] else b)
    return a[1], b[1], *core[2:]


def _shown(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "a single number"
