"""One adapter around one frozen layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lora2_pack.lora2_core.adapters.layers import AdaptiveLoRA, wrap
from lora2_pack.tests.core import toy
from lora2_pack.tests.core.adapters.test_network import conv
from lora2_pack.tests.core.stacked import alone, held
from torch import Tensor, nn


def delta_weight(adapter: AdaptiveLoRA) -> Tensor:
    """ΔW = B Λ A of eq. 10, (out, in)."""
    return (adapter.lora_up * adapter.importance).detach() @ adapter.lora_down.detach()


def test_linear_delta_is_that_of_its_weight() -> None:
    adapter = alone(nn.Linear(6, 9), 4)
    x = toy.noise(2, 5, 6)
    group, place = adapter.group
    delta = adapter.delta(x, *group.folded(place, x.dtype))
    torch.testing.assert_close(delta, F.linear(x, delta_weight(adapter)))
    torch.testing.assert_close(adapter(x), adapter.base(x) + delta)


@pytest.mark.parametrize(
    "base",
    [
        conv(1),
        conv(3, padding=1),
        conv(3, stride=2, padding=1),
        conv((3, 5), stride=(2, 1), padding=(0, 2)),
        conv(3, padding="same"),
        conv(2, dilation=2, bias=False),
        pytest.param(
            conv(3, padding=1, padding_mode="circular"),
        ),
    ],
    ids=str,
)
def test_convolution_delta_is_that_of_its_weight(base: nn.Conv2d) -> None:
    adapter = alone(base, 3)
    merged = copy.deepcopy(base)
    with torch.no_grad():
        merged.weight += delta_weight(adapter).view_as(base.weight)
    x = toy.noise(2, 6, 9, 10)
    torch.testing.assert_close(adapter(x), merged(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_answers_in_the_dtype_of_the_frozen_layer(dtype: torch.dtype) -> None:
    adapter = alone(nn.Linear(6, 9, dtype=dtype), 4)
    assert adapter.lora_down.dtype == adapter.lora_up.dtype == torch.float32
    assert adapter(toy.noise(2, 6).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("base", "rank", "error", "text"),
    [
        (nn.Linear(6, 9), 7, ValueError, "rank is 7; a layer of 9×6 takes 1 to 6"),
        (nn.Linear(6, 9), 0, ValueError, "rank is 0"),
        (nn.Conv2d(4, 4, 3, groups=2), 2, ValueError, "2 groups"),
        (nn.LayerNorm(4), 1, TypeError, "LayerNorm cannot carry a LoRA"),
    ],
)
def test_what_cannot_be_adapted_is_named(base, rank, error, text) -> None:
    with pytest.raises(error, match=text):
        held([wrap(base)], [rank])


def test_a_and_b_are_views_of_the_stack_and_no_parameters() -> None:
    adapter = alone(nn.Linear(6, 9), 4)
    stack, _ = adapter._held
    assert [name for name, _ in adapter.named_parameters()] == ["base.weight", "base.bias"]
    with torch.no_grad():
        adapter.lora_down.fill_(2.0)
        adapter.lora_up.fill_(3.0)
    assert (stack.down == 2).all() and (stack.up == 3).all()
    assert (adapter.lora_down.shape, adapter.lora_up.shape) == ((4, 6), (9, 4))
    for name in ("lora_down", "lora_up", "importance", "rank"):
        with pytest.raises(AttributeError):
            setattr(adapter, name, getattr(adapter, name))
