"""Our files elsewhere: ComfyUI's own loader, diffusers, PEFT and a reader in A1111's manner find
the same ΔW in every layer, whatever its rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import lora_file, lora_format, lora_names
from lora2_pack.lora2_core.network import Component
from lora2_pack.lora2_core.targets import find_targets
from lora2_pack.tests.core import toy
from lora2_pack.tests.host import demo
from lora2_pack.tests.host.demo import weights
from torch import Tensor

LARGEST_ERROR = {"fp16": 1e-3, "fp32": 1e-5}


@pytest.fixture(params=sorted(LARGEST_ERROR))
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files of half and of full precision; ours are of the second where the first would show."""
    if request.param == "fp32":
        monkeypatch.setattr(
            lora_format, "fits_half", lambda errors: torch.zeros_like(errors).bool()
        )
    return request.param


def _component(name: str, shape: torch.Size, index: int, root: str = "unet") -> Component:
    """A learnt component of a weight (out, in, …): ranks from 1 to 9, importances that fall."""
    rank = min(1 + index * 7 % 9, shape[0], shape[1:].numel())
    generator = torch.Generator().manual_seed(index)
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
    importance = torch.exp(-0.3 * torch.arange(rank))
    return Component(name, down, up, importance, 0.3, root)


def _write(path: Path, components: list[Component], precision: str) -> Path:
    lora_file.save(path, components, {"lora2.mode": "balanced"})
    types = {t.dtype for key, t in lora_file.load(path).state.items() if "alpha" not in key}
    assert types == {torch.float16 if precision == "fp16" else torch.float32}
    ranks = {info.rank for info in lora_file.inspect(path)[0]}
    assert len(ranks) > 3, "ranks that are all alike prove nothing"
    return path


def _check(got: Tensor, component: Component, precision: str) -> None:
    wanted = toy.exact_delta(component)
    error = (got.detach().double().flatten(1) - wanted).norm() / wanted.norm()
    assert error < LARGEST_ERROR[precision], (component.name, float(error))


# --- ComfyUI ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comfys(comfyui: Any) -> tuple[Any, Any]:
    """MODEL and CLIP of the demo."""
    return demo.build()[:2]


def _of_comfy(model: Any, selection: str = "attention+ff+conv") -> list[Component]:
    unet = model.model.diffusion_model
    modules = dict(unet.named_modules())
    return [
        _component(target.name, modules[target.name].weight.shape, index)
        for index, target in enumerate(find_targets(unet, selection))
    ]


def test_comfyui_s_own_loader(comfys: tuple[Any, Any], tmp_path: Path, precision: str):
    model, _ = comfys
    components = _of_comfy(model)
    path = _write(tmp_path / "x.safetensors", components, precision)
    import comfy.utils

    state = comfy.utils.load_torch_file(str(path), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(model, None, state, 100.0, 0)
    before, after = weights(model), weights(patched)
    for component in components:
        key = f"diffusion_model.{component.name}.weight"
        _check((after[key].double() - before[key].double()) / 100, component, precision)
    assert len(patched.patches) == len(components)


def test_comfyui_s_own_loader_and_text_encoders(comfys: tuple[Any, Any], tmp_path: Path, precision):
    model, clip = comfys
    components = _of_comfy(model, "b-lora")
    for root, encoder in (("te1", "clip_l"), ("te2", "clip_g")):
        module = getattr(clip.cond_stage_model, encoder).transformer
        names = [n for n, m in module.named_modules() if re.search(r"self_attn\.[qv]_proj$", n)]
        modules = dict(module.named_modules())
        components += [
            _component(name, modules[name].weight.shape, 3 + index, root)
            for index, name in enumerate(names)
        ]
    path = _write(tmp_path / "x.safetensors", components, precision)
    patched, new_clip = comfy.sd.load_lora_for_models(
        model, clip, safetensors.torch.load_file(path), 1.0, 1.0
    )
    assert len(patched.patches) + len(new_clip.patcher.patches) == len(components)


# --- A1111 ------------------------------------------------------------------------------------


def _a1111(path: Path, model: Any) -> dict[str, Tensor]:
    """ΔW by the name of the layer, as the web UI's built-in LoRA extension describes its reader.

    A key up to its first dot names the network's layer: ``lora_unet_…`` is the layer of the
    diffusion model whose path reads the same with underscores for dots. The rest names the
    tensor. ΔW = up · down · alpha / rank of the layer's own ``lora_down``; 1 where there is no
    alpha.
    """
    layers = {
        "diffusion_model_" + name.replace(".", "_"): name
        for name, module in model.model.diffusion_model.named_modules()
        if hasattr(module, "weight")
    }
    networks: dict[str, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        layer, _, part = key.partition(".")
        networks.setdefault(layer, {})[part] = tensor.float()
    found: dict[str, Tensor] = {}
    for layer, parts in networks.items():
        name = layers[layer.replace("lora_unet_", "diffusion_model_")]
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
        found[name] = up.flatten(1) @ down.flatten(1) * scale
    return found


def test_a_reader_in_the_manner_of_a1111(comfys: tuple[Any, Any], tmp_path: Path, precision: str):
    components = _of_comfy(comfys[0])
    path = _write(tmp_path / "x.safetensors", components, precision)
    found = _a1111(path, comfys[0])
    assert len(found) == len(components)
    for component in components:
        _check(found[component.name], component, precision)


# --- diffusers and PEFT -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers_unet() -> Any:
    """SDXL's blocks and depths, thin."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 48,
        norm_num_groups=16,
    ).requires_grad_(False)


def _of_diffusers(unet: Any) -> dict[str, Component]:
    """A component of ours, named as ComfyUI names its layer, for every attention of diffusers."""
    found: dict[str, Component] = {}
    for name, module in unet.named_modules():
        if re.search(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$", name):
            key = lora_names.sgm_name("lora_unet_" + name.replace(".", "_"))
            ours = key.removeprefix("lora_unet_")
            found[name] = _component(ours, module.weight.shape, len(found))
    return found


def _pipeline(unet: Any) -> Any:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=64,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=16),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=None,  # type: ignore[arg-type]
        tokenizer_2=None,  # type: ignore[arg-type]
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    )


def test_diffusers(diffusers_unet: Any, tmp_path: Path, precision: str):
    components = _of_diffusers(diffusers_unet)
    assert len(components) == 560, "all of SDXL's"
    _write(tmp_path / "x.safetensors", list(components.values()), precision)
    pipeline = _pipeline(diffusers_unet)
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors", adapter_name="ours")
    try:
        modules = dict(diffusers_unet.named_modules())
        for name, component in components.items():
            layer = modules[name]
            assert layer.r["ours"] == component.rank
            _check(layer.get_delta_weight("ours"), component, precision)
    finally:
        pipeline.unload_lora_weights()


def test_diffusers_reads_text_encoders_too(diffusers_unet: Any, tmp_path: Path):
    pipeline = _pipeline(diffusers_unet)
    components = list(_of_diffusers(diffusers_unet).values())[:8]
    encoders = {"te1": pipeline.text_encoder, "te2": pipeline.text_encoder_2}
    wanted: dict[tuple[str, str], Component] = {}
    for root, encoder in encoders.items():
        for name, module in encoder.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj", "out_proj")):
                inner = name.removeprefix("text_model.")
                wanted[root, name] = _component(
                    f"text_model.{inner}", module.weight.shape, 11 + len(wanted), root
                )
    _write(tmp_path / "x.safetensors", [*components, *wanted.values()], "fp16")
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors", adapter_name="ours")
    try:
        for (root, name), component in wanted.items():
            layer = dict(encoders[root].named_modules())[name]
            _check(layer.get_delta_weight("ours"), component, "fp16")
    finally:
        pipeline.unload_lora_weights()


def test_peft(diffusers_unet: Any, tmp_path: Path, precision: str):
    import copy

    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    components = _of_diffusers(diffusers_unet)
    path = _write(tmp_path / "x.safetensors", list(components.values()), precision)
    state = safetensors.torch.load_file(path)
    unet = copy.deepcopy(diffusers_unet)
    ranks, alphas, named = {}, {}, {}
    for name, component in components.items():
        key = lora_format.kohya_key(component.name)
        ranks[name] = state[f"{key}.lora_down.weight"].shape[0]
        alphas[name] = float(state[f"{key}.alpha"])
        named[f"{name}.lora_A.weight"] = state[f"{key}.lora_down.weight"].float()
        named[f"{name}.lora_B.weight"] = state[f"{key}.lora_up.weight"].float()
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=list(components), rank_pattern=ranks, alpha_pattern=alphas
    )
    inject_adapter_in_model(config, unet, adapter_name="ours")
    loaded = set_peft_model_state_dict(unet, named, adapter_name="ours")
    assert not loaded.unexpected_keys
    modules = dict(unet.named_modules())
    for name, component in components.items():
        _check(modules[name].get_delta_weight("ours"), component, precision)


# --- what old readers refused -----------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    rank=st.integers(1, 40),
    out=st.integers(1, 12),
    width=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_no_rank_is_above_what_a_layer_can_have(tmp_path_factory, rank, out, width, seed):
    component = toy.component("x", rank, (out, width), seed)
    path = lora_file.save(tmp_path_factory.mktemp("rank") / "x", [component], {})
    [info] = lora_file.inspect(path)[0]
    assert info.rank <= min(out, width)
    _check(toy.stored_delta(dict(lora_file.load(path).state), info.key), component, "fp16")
