"""Components that no trainer writes: changed as the stock loader does, or refused with a sentence.

ComfyUI writes an error where a patch does not fit its weight, and samples without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.lora_file import LoRAFile
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.recent import LoRACache
from lora2_pack.tests.core.tries import in_memory, in_time
from lora2_pack.tests.host import demo
from safetensors.torch import save_file
from torch import Tensor

LINEAR = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"  # 64 → 64
SQUARE = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_k"
OTHER = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_v"
CONV = "diffusion_model.input_blocks.4.0.in_layers.2"
BIAS = "diffusion_model.time_embed.0.bias"
NORM = "diffusion_model.input_blocks.1.0.in_layers.0"

State = dict[str, Tensor]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 20


def _pair(name: str, out: int, *inside: int) -> State:
    ones = (1 for _ in inside[1:])
    return {
        f"{name}.lora_up.weight": _random(out, 2, *ones),
        f"{name}.lora_down.weight": _random(2, *inside),
    }


def _glora(name: str, a1: tuple, a2: tuple, b1: tuple, b2: tuple) -> State:
    ends = zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2), strict=True)
    return {f"{name}.{end}.weight": _random(*shape) for end, shape in ends}


def _oft(name: str, out: int, **more: Tensor) -> State:
    blocks = {f"{name}.oft_blocks": _random(4, out // 4, out // 4)}
    return blocks | {f"{name}.{end}": tensor for end, tensor in more.items()}


def _reshaped(side: int) -> State:
    sizes = {f"{LINEAR}.reshape_weight": torch.tensor([side, side])}
    return sizes | {
        f"{LINEAR}.lora_up.weight": torch.zeros(side, 1).half(),
        f"{LINEAR}.lora_down.weight": torch.zeros(1, side).half(),
    }


REFUSED: dict[str, Callable[[Any], State]] = {
    "GLoRA for other inputs": lambda s: _glora(
        LINEAR, (s.inside + 5, 2), (2, s.inside + 5), (s.out, 2), (2, s.inside)
    ),
    "GLoRA, ragged": lambda s: _glora(
        LINEAR, (s.inside, 2), (2, s.inside + 1), (s.out, 2), (2, s.inside)
    ),
    "an old GLoRA for other inputs": lambda s: _glora(
        LINEAR, (2, s.inside + 5), (s.inside + 5, 2), (2, s.inside), (s.out, 2)
    ),
    "GLoRA of a bias": lambda s: _glora(BIAS, (1, 2), (2, 1), (s.bias, 2), (2, 1)),
    "GLoRA of a norm": lambda s: _glora(NORM, (1, 2), (2, 1), (s.norm, 2), (2, 1)),
    "DoRA of a bias": lambda s: (
        _pair(BIAS, s.bias, 1) | {f"{BIAS}.dora_scale": torch.ones(s.bias, 1)}
    ),
    "DoRA of a bias, one": lambda s: _pair(BIAS, s.bias, 1) | {f"{BIAS}.dora_scale": torch.ones(1)},
    "DoRA of a norm": lambda s: (
        _pair(NORM, s.norm, 1) | {f"{NORM}.dora_scale": torch.ones(s.norm, 1)}
    ),
    "OFT with odd magnitudes": lambda s: _oft(LINEAR, s.out, dora_scale=torch.ones(3, 3)),
    "BOFT with odd magnitudes": lambda s: {
        f"{LINEAR}.oft_blocks": _random(2, 4, s.out // 4, s.out // 4),
        f"{LINEAR}.alpha": torch.tensor(1.0),
        f"{LINEAR}.dora_scale": torch.ones(7, 7),
    },
    "a layer made enormous": lambda _: _reshaped(20_000),
    "a layer made more than there is memory": lambda _: _reshaped(1_000_000),
}
TAKEN: dict[str, Callable[[Any], State]] = {
    "alpha of two numbers, of nothing": lambda _: {f"{OTHER}.alpha": torch.ones(2)},
    "alpha of no number, of nothing": lambda _: {f"{OTHER}.alpha": torch.ones(0)},
    "the bias of a bias": lambda s: {f"{BIAS}.diff_b": _random(s.bias)},
    "a norm of a bias": lambda s: {
        f"{BIAS}.w_norm": _random(s.bias), f"{BIAS}.b_norm": _random(s.bias)
    },
    "the bias of a layer without": lambda s: {f"{LINEAR}.diff_b": _random(s.out)},
    "a pair for a bias": lambda s: _pair(BIAS, s.bias, 1),
    "GLoRA": lambda s: _glora(LINEAR, (s.inside, 2), (2, s.inside), (s.out, 2), (2, s.inside)),
    "an old GLoRA": lambda s: _glora(
        LINEAR, (2, s.inside), (s.inside, 2), (2, s.inside), (s.out, 2)
    ),
    "an old GLoRA of a convolution": lambda s: _glora(
        CONV, (2, 9 * s.channels), (9 * s.channels, 2), (2, 9 * s.channels), (s.filters, 2)
    ),
    "GLoRA of a convolution": lambda s: _glora(
        CONV, (s.channels, 2), (2, s.channels), (s.filters, 2), (2, 9 * s.channels)
    ),
    "OFT with magnitudes": lambda s: _oft(
        LINEAR, s.out, dora_scale=torch.ones(s.out, 1), alpha=torch.tensor(1.0)
    ),
    "a convolution's factors in a row": lambda s: _pair(CONV, s.filters, 9 * s.channels),
    "its kernel in a row": lambda s: _pair(CONV, s.filters, s.channels, 1, 9),
    "its kernel as channels": lambda s: _pair(CONV, s.filters, 9 * s.channels, 1, 1),
    "its kernel first": lambda s: _pair(CONV, s.filters, 3, 3, s.channels),
    "one dimension more": lambda s: _pair(CONV, s.filters, s.channels, 3, 3, 1),
    "a layer made larger": lambda s: _reshaped(s.out + 8),
}  # fmt: skip


class _Sizes:
    def __init__(self, model: Any):
        of = model.model.state_dict()
        self.out, self.inside = of[f"{LINEAR}.weight"].shape
        self.filters, self.channels = of[f"{CONV}.weight"].shape[:2]
        (self.bias,), (self.norm,) = of[BIAS].shape, of[f"{NORM}.weight"].shape


def _plain(model: Any) -> State:
    """What is sound in the same file."""
    return _pair(SQUARE, *model.model.state_dict()[f"{SQUARE}.weight"].shape)


def _apply(model: Any, state: State, way: str = "merge") -> Any:
    return comfy_host.apply_lora(model, None, LoRAFile(state, {}), 1.0, 1.0, "x", way=way)


def _seen(model: Any, state: State, way: str) -> Tensor:
    applied = _apply(model, state, way).model
    demo.weights(applied)
    return demo.sample(applied.model)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_patched(model: Any, caplog: Any, case: str):
    state = REFUSED[case](_Sizes(model)) | _plain(model)
    before = dict(model.patches)
    with in_memory(), in_time(), caplog.at_level(logging.ERROR):
        for way in ("merge", "bypass", "auto"):
            with pytest.raises(comfy_host.HostError, match=r"^x .*\(diffusion_model\.") as caught:
                _apply(model, state, way)
            assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert model.patches == before and not caplog.records


@pytest.mark.parametrize("case", TAKEN)
def test_taken_as_the_stock_loader_takes_it(model: Any, caplog: Any, case: str):
    plain = _plain(model)
    state = TAKEN[case](_Sizes(model)) | plain
    with caplog.at_level(logging.ERROR):
        got = demo.weights(_apply(model, state).model)
        if f"{LINEAR}.reshape_weight" not in state:  # those after it would have to grow, too
            assert torch.allclose(
                *(_seen(model, state, way) for way in ("merge", "bypass")), atol=1e-4
            )
    assert not caplog.records, caplog.text
    read = plain if "of nothing" in case else state  # which the stock loader cannot read
    stock, _ = comfy.sd.load_lora_for_models(model, None, read, 1.0, 0)
    wanted = demo.weights(stock)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in got)


@pytest.mark.parametrize("magnitudes", [False, True])
def test_a_lokr_with_a_core(model: Any, caplog: Any, magnitudes: bool):
    """LyCORIS' use_tucker on a convolution, which ComfyUI cannot multiply: W + w1 ⊗ w2 · α/rank."""
    before = model.model.state_dict()[f"{CONV}.weight"].clone()
    out, inside = before.shape[:2]
    w1, a, b, core = (
        _random(2, 2),
        _random(3, out // 2),
        _random(3, inside // 2),
        _random(3, 3, 3, 3),
    )
    state = {f"{CONV}.lokr_w1": w1, f"{CONV}.lokr_w2_a": a, f"{CONV}.lokr_w2_b": b}
    state |= {f"{CONV}.lokr_t2": core, f"{CONV}.alpha": torch.tensor(1.5)}
    w2 = torch.stack([a.t() @ core[:, :, y, x] @ b for y in range(3) for x in range(3)], -1)
    blocks = [torch.cat([w1[i, j] * w2 for j in (0, 1)], 1) for i in (0, 1)]
    wanted = before + torch.cat(blocks).view_as(before) * 0.5
    if magnitudes:  # each filter gets its former length times 1.25
        length, new = (w.flatten(1).norm(dim=1)[:, None, None, None] for w in (before, wanted))
        state[f"{CONV}.dora_scale"] = 1.25 * length
        wanted = wanted * 1.25 * length / new
    with caplog.at_level(logging.ERROR):
        got = demo.weights(_apply(model, state).model)[f"{CONV}.weight"]
    assert not caplog.records, caplog.text
    torch.testing.assert_close(got, wanted)


def test_names_that_comfyui_changes(model: Any):
    """Those of Wan Fun, which it renames in the dictionary that it is given."""
    name = "input_blocks_4_1_transformer_blocks_0_attn1_to_k"
    plain = {key.replace(SQUARE, f"lora_unet__{name}"): t for key, t in _plain(model).items()}
    state = _pair("lora_unet__blocks_0_cross_attn_k", 4, 4) | plain
    file, keys = LoRAFile(dict(state), {}), list(state)
    for _ in range(2):
        applied = comfy_host.apply_lora(model, None, file, 1.0, 1.0, "x")
        assert set(applied.model.patches) == {f"{SQUARE}.weight"}
        assert list(file.state) == keys


def test_a_lora_that_is_finite_once_and_not_twice(model: Any, caplog: Any):
    out, inside = model.model.state_dict()[f"{LINEAR}.weight"].shape
    state = {
        f"{LINEAR}.lora_up.weight": torch.full((out, 1), 1e15),
        f"{LINEAR}.lora_down.weight": torch.full((1, inside), 1e15),
        f"{LINEAR}.alpha": torch.tensor(2.5e8),
    }
    once = _apply(model, state).model
    assert all(weight.isfinite().all() for weight in demo.weights(once).values())
    with pytest.raises(comfy_host.HostError, match="into what is no number at strength 1"):
        _apply(once, state)


@pytest.mark.parametrize("rank", [15_000, 60_000])
@pytest.mark.parametrize("order", ["svd", "learnt"])
def test_more_columns_than_a_layer_can_use(model: Any, tmp_path: Path, rank: int, order: str):
    out, inside = model.model.state_dict()[f"{LINEAR}.weight"].shape
    generator = torch.Generator().manual_seed(1)
    state = {
        f"{LINEAR}.lora_up.weight": torch.randn(out, rank, generator=generator).half(),
        f"{LINEAR}.lora_down.weight": torch.randn(rank, inside, generator=generator).half(),
    }
    save_file(state, tmp_path / "x.safetensors")
    del state
    started = time.monotonic()
    with in_memory():
        inspector.inspect(tmp_path / "x.safetensors", True).text()
        cut = LoRACache().open(tmp_path / "x.safetensors", Limits(max_rank=1, order=order))
    assert {tensor.shape[0] for key, tensor in cut.state.items() if "down" in key} == {1}
    assert time.monotonic() - started < 10
