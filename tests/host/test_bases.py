"""Trainings on bases in fewer bits: the copy has their numbers, and the LoRA's picture is right."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.sample
import comfy.supported_models
import pytest
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.adapters.frozen import is_in_eight_bits
from lora2_pack.lora2_core.comfy_host.models import copy_in_ram, keep_in_eight_bits
from lora2_pack.lora2_core.tiny_sdxl.model import UNET_CONFIG
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.host import demo
from torch import Tensor

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
PLAIN = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": FP8}
# By ComfyUI's names of the newer kinds, which a version may not have.
NEWER = {"int8": "int8_tensorwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
KINDS = [*PLAIN, "scaled fp8", *NEWER]
OLD = hasattr(comfy.ops, "scaled_fp8_ops")  # its own kind of layer, until 0.4.0


@pytest.fixture(scope="module")
def trained(comfyui: Any) -> tuple[Any, Any, Any]:
    return demo.build(None)


@torch.inference_mode()  # as nodes are run
def _model(config: Any, state: dict[str, Tensor]) -> Any:
    base = config.get_model({}, "", CPU)
    found = base.diffusion_model.load_state_dict(state, strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def _base(kind: str, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A MODEL in ``kind``, as ComfyUI's loaders build it, and its numbers in fp32."""
    config = comfy.supported_models.SDXL(dict(UNET_CONFIG))
    config.set_inference_dtype(PLAIN.get(kind, torch.float32), torch.float32)
    if kind in PLAIN:
        state = {name: value.to(PLAIN[kind]) for name, value in weights.items()}
        return _model(config, state), {name: value.float() for name, value in state.items()}
    if OLD:
        config.scaled_fp8 = FP8
    else:
        config.quant_config = {"mixed_ops": True}
    fill = _scaled_fp8 if kind == "scaled fp8" else partial(_newer, NEWER[kind])
    state, numbers = fill(weights)
    return _model(config, state), numbers


def _linear(weights: dict[str, Tensor]) -> list[str]:
    return [name for name, value in weights.items() if name.endswith("weight") and value.ndim == 2]


def _scaled_fp8(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state, numbers = dict(weights), dict(weights)
    for name in _linear(weights):
        layer, scale = name.removesuffix(".weight"), weights[name].abs().max() / 448
        state[name] = (weights[name] / scale).to(FP8)
        numbers[name] = state[name].float() * scale
        if OLD:  # which keeps the bias in fp8 too, unscaled
            state[f"{layer}.scale_weight"] = scale
            if f"{layer}.bias" in weights:
                numbers[f"{layer}.bias"] = weights[f"{layer}.bias"].to(FP8).float()
        else:
            state[f"{layer}.weight_scale"] = scale
            told = json.dumps({"format": "float8_e4m3fn"}).encode()
            state[f"{layer}.comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
    return state, numbers


def _newer(format: str, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Quantised by ComfyUI itself, which says what the numbers are; they are near the weights."""
    algorithms = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
    if format not in algorithms:
        pytest.skip(f"this ComfyUI has no {format}")
    told = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
    state, numbers = dict(weights), dict(weights)
    for name in _linear(weights):
        layout = algorithms[format]["comfy_tensor_layout"]
        found = comfy.quant_ops.QuantizedTensor.from_float(weights[name], layout)
        state |= found.state_dict(name)
        state[name.removesuffix("weight") + "comfy_quant"] = told
        numbers[name] = found.dequantize().float()
        # Of four bits, two of 1, 1.5, 2, 3, 4 and 6 are at most a sixth of the largest apart.
        error = (numbers[name] - weights[name]).abs().max()
        assert 0 < error < weights[name].abs().max() / 5
    return state, numbers


@pytest.fixture(scope="module", params=KINDS)
def base(request: Any, trained: tuple[Any, Any, Any]) -> tuple[str, Any, dict[str, Tensor]]:
    weights = trained[0].model.diffusion_model.state_dict()
    return request.param, *_base(request.param, {n: v.clone() for n, v in weights.items()})


def _bytes(model: Any) -> dict[str, bytes]:
    """Every weight as it lies in memory."""
    found = {}
    for name, value in model.model.state_dict().items():
        plain = getattr(value, "_qdata", value).detach().contiguous()
        found[name] = plain.view(torch.uint8).numpy().tobytes() if plain.dim() else str(plain)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_copy_has_the_base_s_numbers(base: Any, precision: str, caplog: Any):
    kind, model, numbers = base
    before = _bytes(model)
    with caplog.at_level(logging.INFO):
        private = comfy_host.private_copy(model, precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    got = private.diffusion_model.state_dict()
    assert got.keys() == numbers.keys()
    for name, value in numbers.items():
        assert got[name].dtype == dtype and torch.equal(got[name], value.to(dtype)), name
    assert ("model is quantised" in caplog.text) == (kind not in PLAIN)
    assert NEWER.get(kind, "") in caplog.text
    assert _bytes(model) == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copy_in_fp8_has_the_numbers_of_a_base_in_fp8(base: Any, precision: str):
    """Of others it has what eight bits can say."""
    kind, model, numbers = base
    private = copy_in_ram(model, precision)
    keep_in_eight_bits(private)
    layers = private.diffusion_model.named_modules()
    kept = {name: layer for name, layer in layers if is_in_eight_bits(layer)}
    assert len(kept) > 200
    # The mean of the scale's rounding, and the scale itself is an fp32 number.
    rounding = {"fp32": 2.0**-22, "bf16": 2.0**-8}[precision]
    for name, layer in kept.items():
        wanted = numbers[f"{name}.weight"]
        back = layer.forward.weight.cast(torch.float32)
        exact = kind == "fp8" or (kind == "scaled fp8" and isinstance(layer, torch.nn.Linear))
        share = rounding if exact else 1 / 16 + rounding
        bound = share * wanted.abs() + (0 if exact else 2.0**-9 * layer.forward.scale)
        assert ((back - wanted).abs() <= bound).all(), name


def test_patches_are_in_the_copy(base: Any):
    _, model, numbers = base
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    clone = model.clone()
    wanted = numbers[name.removeprefix("diffusion_model.")]
    clone.add_patches({name: ("diff", (torch.full_like(wanted, 0.5),))}, 0.5)
    got = comfy_host.private_copy(clone, "fp32").state_dict()[name]
    kept = model.model.get_submodule(name.rpartition(".")[0]).weight.dtype
    error = (got - wanted - 0.25).abs().max()
    # As ComfyUI merges it: rounded to what the base is kept in, where that has no scale.
    assert error <= 0.5 * torch.finfo(kept).eps


def test_a_lora_paints_on_it_as_on_the_numbers(base: Any, trained: tuple[Any, Any, Any]):
    """Within a level of 255 of the same base and LoRA in fp32."""
    kind, model, numbers = base
    clip, vae = trained[1:]
    before = _bytes(model)
    config = demo.settings(steps=4, precision="fp32")
    setup = comfy_host.prepare_training(model, clip, vae, demo.photos(), config)
    list(Trainer(setup.network, setup.task, setup.config, setup.entropy).run())
    state = lora_file.to_state(setup.network.components())
    assert max(float(value.abs().max()) for key, value in state.items() if "lora_up" in key) > 0
    exact = comfy.supported_models.SDXL(dict(UNET_CONFIG))
    exact.set_inference_dtype(torch.float32, None)
    pictures = [
        _painted(comfy_host.apply_state(one, None, dict(state), 1.0, 1.0, "x")[0], clip, vae)
        for one in (model, _model(exact, numbers))  # "auto": beside what merging would round
    ]
    bare = _painted(model, clip, vae)
    assert (pictures[0] - bare).abs().max() > 4 / 255, "the LoRA does nothing"
    # ComfyUI rounds what goes into int8 layers, too: there the bare pictures are as far apart.
    apart = (bare - _painted(_model(exact, numbers), clip, vae)).abs().max()
    assert (apart > 1 / 255) == (kind == "int8")
    assert (pictures[0] - pictures[1]).abs().max() <= max(1 / 255, 2 * float(apart))
    comfy.model_management.unload_all_models()
    assert _bytes(model) == before


@torch.inference_mode()
def _painted(model: Any, clip: Any, vae: Any) -> Tensor:
    """By ComfyUI's own sampler, 64 px."""
    texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("sks cat", "")]
    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 1)
    found = comfy.sample.sample(
        model, noise, 4, 3.0, "euler", "normal", *texts, latent, disable_pbar=True, seed=1
    )
    return vae.decode(found)
