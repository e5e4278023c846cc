"""How LoRAs are applied: beside the weights or into them, by place, cut, cached, or refused."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.comfy_host.loading import bypass
from lora2_pack.lora2_core.comfy_host.loading.fitting import (
    _base_hashes,
    layer_names,
    remember_base_hash,
)
from lora2_pack.lora2_core.config.checks import ConfigError
from lora2_pack.lora2_core.config.load import Strengths
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.lora2_core.lora_file import LoRAFile
from lora2_pack.tests.host import demo
from lora2_pack.tests.host.demo import weights
from torch import Tensor


def _lora(model: Any, seed: int = 5, selection: str = "attention+ff+conv") -> dict[str, Tensor]:
    """A LoRA of random weights and mixed ranks."""
    generator = torch.Generator().manual_seed(seed)
    unet = model.model.diffusion_model
    modules = dict(unet.named_modules())
    components = []
    for index, target in enumerate(find_targets(unet, selection)):
        rank, weight = 1 + index % 3, modules[target.name].weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / 10
        up = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator)
        components.append(Component(target.name, down, up / 10, torch.ones(rank), 0.1))
    return lora_file.to_state(components)


def _predicted(patcher: Any) -> Tensor:
    """What the patched model computes, as a sampler would load it."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    try:
        return demo.sample(patcher.model)
    finally:
        comfy.model_management.unload_all_models()


def _apply(model: Any, state: dict[str, Tensor], **options: Any) -> Any:
    strength = options.pop("strength", 1.0)
    file = LoRAFile(state, {})
    return comfy_host.apply_lora(model, None, file, strength, 1.0, "x", **options).model


def _off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# --- beside the weights -----------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["attention", "attention+ff+conv"])
def test_bypass_computes_what_merging_computes(model: Any, selection: str):
    state = _lora(model, selection=selection)
    base = _predicted(model)
    merged = _predicted(_apply(model, state, way="merge", strength=0.8))
    beside = _predicted(_apply(model, state, way="bypass", strength=0.8))
    assert _off(merged, base) > 0.01, "too weak to prove anything"
    assert _off(beside, merged) < 1e-5
    assert torch.equal(_predicted(model), base), "hooks were left behind"


def test_bypass_in_a_chain_adds_up_and_clones_do_not_meet(model: Any):
    first, second = _lora(model, 1), _lora(model, 2)
    both = _predicted(_apply(_apply(model, first), second, strength=0.5))
    a = _apply(model, first, way="bypass")
    b = _apply(a, second, way="bypass", strength=0.5)
    alone = _predicted(_apply(model, first))
    assert _off(_predicted(b), both) < 1e-5
    assert _off(_predicted(a), alone) < 1e-5
    mixed = _apply(_apply(model, first, way="merge"), second, way="bypass", strength=0.5)
    assert _off(_predicted(mixed), both) < 1e-5
    comfy.model_management.load_models_gpu([a], force_full_load=True)
    comfy.model_management.load_models_gpu([b], force_full_load=True)  # without an unload between
    assert _off(demo.sample(b.model), both) < 1e-5
    comfy.model_management.unload_all_models()
    hooks = [m for m in model.model.modules() if m._forward_hooks]
    assert hooks == []


def _in_fp8(model: Any) -> Any:
    """A patcher of the same model whose attention weights are fp8, as ComfyUI would cast them."""
    private = comfy_host.private_copy(model)
    for module in private.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
            module.comfy_cast_weights = True
    private.diffusion_model.dtype = torch.float8_e4m3fn
    private.manual_cast_dtype = torch.float32
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(private, load_device=cpu, offload_device=cpu)


def test_fp8_weights_are_left_alone(model: Any):
    rounded, state = _in_fp8(model), _lora(model, selection="attention")
    assert bypass.is_coarse(rounded.model_dtype()) and not bypass.is_coarse(model.model_dtype())
    auto = _apply(rounded, state)
    assert auto.injections and not auto.patches
    wide = comfy_host.private_copy(model)  # the same fp8 numbers, in fp32: what merging should give
    values = dict(rounded.model.diffusion_model.named_parameters())
    for name, parameter in wide.diffusion_model.named_parameters():
        parameter.data = values[name].data.float()
    cpu = torch.device("cpu")
    exact = comfy.model_patcher.ModelPatcher(wide, load_device=cpu, offload_device=cpu)
    wanted = _predicted(_apply(exact, state))
    assert _off(_predicted(auto), wanted) < 1e-5
    assert _off(_predicted(_apply(rounded, state, way="merge")), wanted) > 1e-3


def test_what_cannot_go_beside_is_merged(model: Any):
    state = _lora(model, selection="attention")
    key = next(iter(state)).split(".")[0]
    state[f"{key}.dora_scale"] = torch.ones(state[f"{key}.lora_up.weight"].shape[0], 1)
    patched = _apply(model, state, way="bypass")
    assert len(patched.patches) == 1 and patched.injections
    assert _off(_predicted(patched), _predicted(_apply(model, state, way="merge"))) < 1e-5


# --- by place ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["merge", "bypass"])
@pytest.mark.parametrize(
    ("strengths", "inside"),
    [
        ({"down": 0}, lambda key: "input_blocks" not in key),
        ({"mid": 0}, lambda key: "middle_block" not in key),
        ({"up": 0}, lambda key: "output_blocks" not in key),
        ({"self_attention": 0}, lambda key: ".attn1." not in key),
        ({"cross_attention": 0}, lambda key: ".attn2." not in key),
        ({"blocks": "style"}, lambda key: ".output_blocks.1.1." in key),
        ({"blocks": "content"}, lambda key: ".output_blocks.0.1." in key),
    ],
)
def test_strengths_by_place(model: Any, strengths: dict, inside: Any, way: str):
    state = _lora(model)
    patched = _apply(model, state, strengths=Strengths(**strengths), way=way)
    names = layer_names(model, None)
    wanted = {key for name, key in names.items() if f"{name}.alpha" in state and inside(key)}
    touched = {*patched.patches, *bypass.branches_of(patched)}
    assert touched == wanted and wanted


def test_strengths_multiply(model: Any):
    patched = _apply(
        model, _lora(model), strength=2.0, strengths=Strengths(down=0.5, cross_attention=3)
    )
    found = {key: patch[0][0] for key, patch in patched.patches.items()}
    for key, strength in found.items():
        wanted = 2.0 * (0.5 if "input_blocks" in key else 1) * (3 if ".attn2." in key else 1)
        assert strength == pytest.approx(wanted), key
    with pytest.raises(ConfigError, match="strength of down is inf"):
        Strengths(down=float("inf"))
    with pytest.raises(ConfigError, match="blocks is 'looks'; choose one of all, content, style"):
        Strengths(blocks="looks")


# --- every naming -----------------------------------------------------------------------------


def test_every_trainer_s_names_are_the_same_patch(model: Any):
    state = _lora(model, selection="attention")
    keys = sorted({key.split(".")[0] for key in state})
    names = {name: key for name, key in layer_names(model, None).items()}
    wanted = weights(_apply(model, state))
    of_weight: dict[str, dict[str, str]] = {}
    for name, key in names.items():
        kind = (
            "sgm"
            if name.startswith("diffusion_model.")
            else "unet"
            if name.startswith("unet.")
            else ""
        )
        if kind:
            of_weight.setdefault(key, {})[kind] = name

    def renamed(style: str) -> dict[str, Tensor]:
        new: dict[str, Tensor] = {}
        for key in keys:
            weight = names[key]
            down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
            if style == "diffusers":
                name, ends = of_weight[weight]["unet"], ("_lora.down.weight", "_lora.up.weight")
            else:
                name = of_weight[weight]["sgm"]
                name = f"base_model.model.{name}" if style == "peft" else name
                ends = {
                    "peft": (".lora_A.default.weight", ".lora_B.default.weight"),
                    "diffusers2": (".lora_A.weight", ".lora_B.weight"),
                    "generic": (".lora_down.weight", ".lora_up.weight"),
                }[style]
            new[name + ends[0]], new[name + ends[1]] = down, up
            new[f"{name}.alpha"] = state[f"{key}.alpha"]
        return new

    for style in ("diffusers", "peft", "diffusers2", "generic"):
        got = weights(_apply(model, renamed(style)))
        assert all(torch.equal(got[key], wanted[key]) for key in wanted), style


def test_our_patch_is_the_stock_loader_s(model: Any):
    state = _lora(model)
    stock, _ = comfy.sd.load_lora_for_models(model, None, dict(state), 0.7, 0)
    wanted, got = weights(stock), weights(_apply(model, state, strength=0.7))
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


# --- what does not fit ------------------------------------------------------------------------


def test_unknown_components_are_told_and_the_rest_works(model: Any, caplog: Any):
    state = _lora(model, selection="attention")
    count = len(state) // 3
    for name in ("b", "a"):
        state[f"lora_unet_{name}.lora_down.weight"] = torch.ones(1, 4)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.ones(4, 1)
    state["lora_te1_x.lora_down.weight"] = torch.ones(1, 4)
    state["lora_te1_x.lora_up.weight"] = torch.ones(4, 1)
    applied = comfy_host.apply_lora(model, None, LoRAFile(state, {}), 1.0, 1.0, "cat")
    assert applied.note == (f"cat: 2 of {count + 3} components unknown: lora_unet_a, lora_unet_b.")
    assert applied.note in caplog.text and len(applied.model.patches) == count


def test_another_base_is_told(model: Any):
    state = _lora(model)
    metadata = {"lora2.base_model_hash": "b" * 64, "lora2.config": '{"precision": "fp32"}'}
    file = LoRAFile(state, metadata)
    _base_hashes.clear()  # of trainings before this test
    assert comfy_host.apply_lora(model, None, file, 1, 1, "x").note == ""
    remember_base_hash(model, "fp32", "a" * 64)
    try:
        note = comfy_host.apply_lora(model, None, file, 1, 1, "x").note
        assert "another base model (hash bbbbbbbbbb, this one is aaaaaaaaaa)" in note
        metadata["lora2.base_model_hash"] = "a" * 64
        assert comfy_host.apply_lora(model, None, file, 1, 1, "x").note == ""
        metadata["lora2.config"] = "[" * 9999
        assert comfy_host.apply_lora(model, None, file, 1, 1, "x").note == ""
    finally:
        _base_hashes.clear()


@pytest.mark.parametrize("damage", ["shape", "lonely", "halves"])
def test_a_refusal_patches_nothing(model: Any, damage: str):
    state = _lora(model)
    key = sorted(state)[-1].split(".")[0]
    if damage == "lonely":
        del state[f"{key}.lora_down.weight"]
    else:
        rank = state[f"{key}.lora_down.weight"].shape[0] + (damage == "halves")
        state[f"{key}.lora_down.weight"] = torch.ones(rank, 7)
    before = dict(model.patches)
    with pytest.raises(comfy_host.HostError, match=r"^x ") as caught:
        _apply(model, state)
    assert "\n" not in str(caught.value) and model.patches == before
