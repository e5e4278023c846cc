"""Our files elsewhere: ComfyUI's own loader, diffusers, PEFT and a reader in A1111's manner find
the same ΔW in every layer, whatever its rank."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.adapters.targets import PRESETS, find_targets
from lora2_pack.lora2_core.files import encode as lora_format
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.lora2_core.files.kohya_names import sgm_name
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
    state = comfy.utils.load_torch_file(str(path), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(model, None, state, 100.0, 0)
    before, after = weights(model), weights(patched)
    for component in components:
        key = f"diffusion_model.{component.name}.weight"
        _check((after[key].double() - before[key].double()) / 100, component, precision)
    assert len(patched.patches) == len(components)


def _of_clip(clip: Any) -> list[Component]:
    """Of every linear layer of both text encoders."""
    return [
        _component(name, module.weight.shape, 3 + index, root)
        for root, encoder in (("te1", "clip_l"), ("te2", "clip_g"))
        for index, (name, module) in enumerate(_transformer(clip, encoder).named_modules())
        if re.search(r"self_attn\.([qkv]|out)_proj$|mlp\.fc[12]$", name)
    ]


def _transformer(clip: Any, encoder: str) -> Any:
    return getattr(clip.cond_stage_model, encoder).transformer


def test_comfyui_s_own_loader_and_text_encoders(comfys: tuple[Any, Any], tmp_path: Path, precision):
    model, clip = comfys
    in_unet, in_clip = _of_comfy(model, "b-lora"), _of_clip(clip)
    path = _write(tmp_path / "x.safetensors", [*in_unet, *in_clip], precision)
    state = safetensors.torch.load_file(path)
    patched, new_clip = comfy.sd.load_lora_for_models(model, clip, state, 1.0, 100.0)
    assert len(patched.patches) == len(in_unet)
    assert len(new_clip.patcher.patches) == len(in_clip) > 20
    before, after = weights(clip.patcher), weights(new_clip.patcher)
    for component in in_clip:
        encoder = {"te1": "clip_l", "te2": "clip_g"}[component.root]
        key = f"{encoder}.transformer.{component.name}.weight"
        _check((after[key].double() - before[key].double()) / 100, component, precision)


# --- A1111 ------------------------------------------------------------------------------------


def _a1111(path: Path, model: Any, clip: Any) -> dict[str, Tensor]:
    """ΔW by the name of the layer, as the web UI's built-in LoRA extension describes its reader.

    A key up to its first dot names the network's layer: ``lora_unet_…`` is the layer of the
    diffusion model whose path reads the same with underscores for dots, ``lora_te1_…`` and
    ``lora_te2_…`` those of the first and the second text encoder. The rest names the tensor.
    ΔW = up · down · alpha / rank of the layer's own ``lora_down``; 1 where there is no alpha.
    """
    roots = {
        "lora_unet_": model.model.diffusion_model,
        "lora_te1_": _transformer(clip, "clip_l"),
        "lora_te2_": _transformer(clip, "clip_g"),
    }
    layers = {
        prefix + name.replace(".", "_")
        for prefix, root in roots.items()
        for name, module in root.named_modules()
        if hasattr(module, "weight")
    }
    networks: dict[str, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        layer, _, part = key.partition(".")
        assert layer in layers
        networks.setdefault(layer, {})[part] = tensor.float()
    found: dict[str, Tensor] = {}
    for layer, parts in networks.items():
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
        found[layer] = up.flatten(1) @ down.flatten(1) * scale
    return found


def test_a_reader_in_the_manner_of_a1111(comfys: tuple[Any, Any], tmp_path: Path, precision: str):
    components = [*_of_comfy(comfys[0]), *_of_clip(comfys[1])]
    path = _write(tmp_path / "x.safetensors", components, precision)
    found = _a1111(path, *comfys)
    assert len(found) == len(components)
    for component in components:
        _check(found[lora_format.kohya_key(component.name, component.root)], component, precision)


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


# What ComfyUI's own table of diffusers' names needs to know of such a model.
DEPTHS = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}


def _of_diffusers(unet: Any, selection: str = "attention") -> dict[str, Component]:
    """A component of ours, named as ComfyUI names its layer, by diffusers' name of it."""
    names = comfy.utils.unet_to_diffusers(DEPTHS)
    found: dict[str, Component] = {}
    for name, module in unet.named_modules():
        ours = names.get(f"{name}.weight", "").removesuffix(".weight")
        if ours and re.search(PRESETS[selection], ours):
            key = sgm_name("lora_unet_" + name.replace(".", "_"))
            assert key == lora_format.kohya_key(ours)
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


@contextmanager
def _loaded(pipeline: Any, folder: Path) -> Iterator[None]:
    pipeline.load_lora_weights(folder, weight_name="x.safetensors", adapter_name="ours")
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


def test_diffusers(diffusers_unet: Any, tmp_path: Path, precision: str):
    components = _of_diffusers(diffusers_unet)
    assert len(components) == 560, "all of SDXL's"
    _write(tmp_path / "x.safetensors", list(components.values()), precision)
    with _loaded(_pipeline(diffusers_unet), tmp_path):
        modules = dict(diffusers_unet.named_modules())
        for name, component in components.items():
            assert modules[name].r["ours"] == component.rank
            _check(modules[name].get_delta_weight("ours"), component, precision)


def _some_of_every_kind(unet: Any) -> dict[str, Component]:
    """All that is no attention or feed-forward layer, and a tenth of these."""
    every = _of_diffusers(unet, "attention+ff+conv")
    inner = [name for name in every if ".transformer_blocks." in name]
    return {name: c for name, c in every.items() if name not in inner or name in inner[::11]}


def test_diffusers_reads_convolutions_and_feed_forward_layers(
    diffusers_unet: Any, tmp_path: Path, precision: str
):
    components = _some_of_every_kind(diffusers_unet)
    kinds = {name.rsplit(".", 1)[-1] for name in components}
    assert {"conv", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj", "2"} < kinds
    _write(tmp_path / "x.safetensors", list(components.values()), precision)
    with _loaded(_pipeline(diffusers_unet), tmp_path):
        modules = dict(diffusers_unet.named_modules())
        for name, component in components.items():
            _check(modules[name].get_delta_weight("ours"), component, precision)


def test_diffusers_reads_text_encoders_too(diffusers_unet: Any, tmp_path: Path, precision: str):
    pipeline = _pipeline(diffusers_unet)
    components = list(_of_diffusers(diffusers_unet).values())[:8]
    encoders = {"te1": pipeline.text_encoder, "te2": pipeline.text_encoder_2}
    wanted: dict[tuple[str, str], Component] = {}
    for root, encoder in encoders.items():
        for name, module in encoder.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")):
                inner = name.removeprefix("text_model.")
                wanted[root, name] = _component(
                    f"text_model.{inner}", module.weight.shape, 11 + len(wanted), root
                )
    assert len(wanted) == 2 * 2 * 6
    _write(tmp_path / "x.safetensors", [*components, *wanted.values()], precision)
    with _loaded(pipeline, tmp_path):
        for (root, name), component in wanted.items():
            layer = dict(encoders[root].named_modules())[name]
            _check(layer.get_delta_weight("ours"), component, precision)


def test_peft(diffusers_unet: Any, tmp_path: Path, precision: str):
    import copy

    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    components = _some_of_every_kind(diffusers_unet)
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
    kernel=st.sampled_from([(), (1, 1), (3, 3)]),
    seed=st.integers(0, 9),
)
def test_no_rank_is_above_what_a_layer_can_have(tmp_path_factory, rank, out, width, kernel, seed):
    component = toy.component("x", rank, (out, width, *kernel), seed)
    largest = min(out, component.in_features)
    state = lora_format.to_state([component])
    [key] = lora_file.component_keys(state)
    assert state[f"{key}.lora_down.weight"].shape[0] <= largest
    _check(toy.stored_delta(state, key), component, "fp16")
    path = lora_file.save(tmp_path_factory.mktemp("rank") / "x", [component], {})
    infos, metadata = lora_file.inspect(path)
    assert [info.rank for info in infos] == [min(rank, largest)]
    assert json.loads(metadata["lora2.components"])[key]["rank"] == infos[0].rank
    _check(toy.stored_delta(dict(lora_file.load(path).state), key), component, "fp16")


@pytest.mark.parametrize("rank", [3, 30])  # below and above what the layer can have
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_in_a_sentence(tmp_path: Path, rank: int, value: float):
    component = toy.component("x", rank, (5, 4), 0)
    component.lora_down[0, 1] = value
    with pytest.raises(lora_file.LoRAFileError, match="not finite, so nothing was written"):
        lora_file.save(tmp_path / "x", [component], {})
