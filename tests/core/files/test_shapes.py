"""Shapes of one component: what they multiply to, and what does not fit together."""

from __future__ import annotations

import pytest
import torch
from lora2_pack.lora2_core.files.shapes import Mismatch, Product, product_of_kind, product_of_pair
from torch import Tensor

Shape = tuple[int, ...]


@pytest.mark.parametrize(
    ("down", "up", "mid", "product"),
    [
        ((4, 16), (24, 4), None, (4, 16, 24)),
        ((0, 16), (24, 0), None, (0, 16, 24)),
        ((4, 6, 3, 3), (8, 4, 1, 1), None, (4, 54, 8)),
        ((4, 6, 3), (8, 4, 1), None, (4, 18, 8)),
        ((4, 6, 1, 1), (8, 4), None, (4, 6, 8)),
        ((4, 6, 1, 1), (8, 4, 1, 1), (4, 4, 3, 3), (4, 54, 8)),
    ],
)
def test_two_factors(down: Shape, up: Shape, mid: Shape | None, product: Shape):
    assert product_of_pair(down, up, mid) == Product(*product)


@pytest.mark.parametrize(
    ("down", "up", "mid"),
    [
        ((4, 16), (24, 5), None), ((4,), (24, 4), None), ((4, 16), (24,), None), ((), (), None),
        ((4, 16), (24, 4, 2), None), ((4, 16), (24, 2, 2), None), ((4, 16), (4, 24), None),
        ((4, 6, 1, 1), (8, 4, 1, 1), (4, 3, 3, 3)), ((4, 6, 1, 1), (8, 4, 1, 1), (4, 4, 3)),
        ((4, 6, 3, 3), (8, 4, 1, 1), (4, 4, 3, 3)), ((4, 6), (8, 4), (4, 4)),
        ((2, 64, 1, 1), (64, 2, 1, 1), (2, 2, 3000, 3000)),
    ],
)  # fmt: skip
def test_two_factors_that_do_not_fit(down: Shape, up: Shape, mid: Shape | None):
    with pytest.raises(Mismatch, match=r"^[0-9a-z× ]+ and [0-9a-z× ]+$"):
        product_of_pair(down, up, mid)


LOHA = {".hada_w1_a": (24, 3), ".hada_w1_b": (3, 16), ".hada_w2_a": (24, 2), ".hada_w2_b": (2, 16)}
CORES = {
    ".hada_w1_a": (3, 8), ".hada_w1_b": (3, 6), ".hada_t1": (3, 3, 3, 3),
    ".hada_w2_a": (2, 8), ".hada_w2_b": (2, 6), ".hada_t2": (2, 2, 3, 3),
}  # fmt: skip
WHOLE = {".lokr_w1": (4, 2), ".lokr_w2": (6, 8)}
PRODUCTS = {
    ".lokr_w1_a": (4, 3), ".lokr_w1_b": (3, 2), ".lokr_w2_a": (6, 5), ".lokr_w2_b": (5, 8),
}  # fmt: skip
CORE = {".lokr_w1": (4, 2), ".lokr_w2_a": (5, 6), ".lokr_w2_b": (5, 4), ".lokr_t2": (5, 5, 3, 3)}
GLORA = {".a1.weight": (16, 4), ".a2.weight": (4, 16), ".b1.weight": (24, 4), ".b2.weight": (4, 16)}
OLD_GLORA = {
    ".a1.weight": (4, 16), ".a2.weight": (16, 4), ".b1.weight": (4, 16), ".b2.weight": (24, 4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "shapes", "product"),
    [
        ("loha", LOHA, (3, 16, 24)), ("loha", CORES, (3, 54, 8)), ("lokr", WHOLE, (0, 16, 24)),
        ("lokr", PRODUCTS, (5, 16, 24)), ("lokr", CORE, (5, 72, 24)),
        ("lokr", {**WHOLE, ".lokr_w2": (6, 4, 3, 3)}, (0, 72, 24)),
        ("lokr", {".lokr_w1_a": (4, 3), ".lokr_w1_b": (3, 2), ".lokr_w2": (6, 8)}, (3, 16, 24)),
        ("glora", GLORA, (4, 16, 24)), ("glora", OLD_GLORA, (4, 16, 24)),
        ("oft", {".oft_blocks": (4, 6, 6), ".rescale": (24, 1)}, (0, 0, 24)),
        ("oft", {".oft_blocks": (3, 4, 6, 6)}, (0, 0, 24)), ("oft", {".oft_diag": (9,)}, (0, 0, 0)),
        ("difference", {".diff": (24, 16)}, (0, 16, 24)),
        ("difference", {".diff_b": (24,), ".diff": (24, 4, 3, 3)}, (0, 36, 24)),
        ("difference", {".diff_b": (24,)}, (0, 0, 24)), ("difference", {".diff": ()}, (0, 0, 0)),
        ("difference", {".set_weight": (24,)}, (0, 0, 24)),
        ("norm", {".w_norm": (24,), ".b_norm": (24,)}, (0, 0, 24)),
    ],
)  # fmt: skip
def test_other_kinds(kind: str, shapes: dict[str, Shape], product: Shape):
    assert product_of_kind(kind, shapes) == Product(*product)


def _as_comfyui_multiplies(kind: str, state: dict[str, Tensor]) -> Tensor:
    def inner(a: str, b: str, core: str) -> Tensor:
        if core in state:
            return torch.einsum("ijkl,jr,ip->prkl", state[core], state[b], state[a])
        return state[a] @ state[b]

    if kind == "loha":
        one, two = (inner(f".hada_w{n}_a", f".hada_w{n}_b", f".hada_t{n}") for n in (1, 2))
        return one * two
    one, two = (
        state[f".lokr_w{n}"]
        if f".lokr_w{n}" in state
        else inner(f".lokr_w{n}_a", f".lokr_w{n}_b", f".lokr_t{n}")
        for n in (1, 2)
    )
    return torch.kron(one[(...,) + (None,) * (two.dim() - 2)], two.contiguous())


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [("loha", LOHA), ("loha", CORES), ("lokr", WHOLE), ("lokr", PRODUCTS), ("lokr", CORE)],
)
def test_the_product_has_that_shape_and_no_other_fits(kind: str, shapes: dict[str, Shape]):
    delta = _as_comfyui_multiplies(kind, {key: torch.ones(one) for key, one in shapes.items()})
    product = product_of_kind(kind, shapes)
    assert (product.out_features, product.in_features) == (delta.shape[0], delta[0].numel())
    for key, shape in shapes.items():
        for changed in (shape[1:], (*shape, 2), *_one_off(shape)):
            other = {**shapes, key: changed}
            state = {name: torch.ones(one) for name, one in other.items()}
            try:
                delta = _as_comfyui_multiplies(kind, state)
            except (RuntimeError, ValueError):
                with pytest.raises(Mismatch):
                    product_of_kind(kind, other)


def _one_off(shape: Shape) -> list[Shape]:
    return [(*shape[:n], size + 1, *shape[n + 1 :]) for n, size in enumerate(shape)]


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("loha", {**LOHA, ".hada_w2_a": (12, 2)}), ("loha", {**LOHA, ".hada_w1_a": ()}),
        ("lokr", {**WHOLE, ".lokr_w1": ()}), ("lokr", {**WHOLE, ".lokr_w2": (3,)}),
        ("glora", {**GLORA, ".a1.weight": (16, 5)}), ("glora", {**GLORA, ".b2.weight": (4,)}),
        ("oft", {".oft_blocks": (24, 6)}), ("oft", {".oft_blocks": (4, 6, 5)}),
        ("oft", {".oft_blocks": ()}),
    ],
)  # fmt: skip
def test_other_kinds_that_do_not_fit(kind: str, shapes: dict[str, Shape]):
    with pytest.raises(Mismatch, match=" and "):
        product_of_kind(kind, shapes)
