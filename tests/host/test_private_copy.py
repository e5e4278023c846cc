"""The model to train on is a copy of what the user would sample, and shares no tensor with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.tests.host import demo
from lora2_pack.tests.host.demo import weights


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _storages(module: torch.nn.Module) -> dict[int, str]:
    """The name of a tensor by the address of its memory."""
    return {t.untyped_storage().data_ptr(): name for name, t in _tensors(module).items()}


def _lora(model: Any, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A LoRA of random weights for the attention of a MODEL."""
    generator = torch.Generator().manual_seed(5)
    components = [
        Component(
            target.name,
            torch.randn(2, target.in_features, generator=generator) * scale,
            torch.randn(target.out_features, 2, generator=generator),
            torch.ones(2),
            0.1,
        )
        for target in find_targets(model.model.diffusion_model)
    ]
    return lora_file.to_state(components)


def test_it_computes_the_same_and_shares_no_memory(model: Any):
    private = comfy_host.private_copy(model)
    assert private is not model.model
    shared = _storages(private).keys() & _storages(model.model).keys()
    names = {_storages(private)[pointer].split(".")[0] for pointer in shared}
    assert names <= {"noise_augmentor"}, names  # constants that no pass of SDXL reads
    assert private.current_patcher is None
    torch.testing.assert_close(demo.sample(private), demo.sample(model.model), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in private.parameters())
    trained_on = _tensors(private.diffusion_model) | _tensors(private.model_sampling)
    assert not any(tensor.is_inference() for tensor in trained_on.values())


def test_what_a_node_has_hung_on_a_layer_works_in_the_copy(model: Any):
    plain = demo.sample(model.model)
    layer = model.model.diffusion_model.get_submodule("middle_block.1")
    handles = [
        layer.register_forward_hook(lambda _layer, _args, output: 0.5 * output),
        layer.register_forward_pre_hook(lambda _layer, args: (0.9 * args[0], *args[1:])),
    ]
    try:
        wanted = demo.sample(model.model)
        private = comfy_host.private_copy(model)
    finally:
        for handle in handles:
            handle.remove()
    assert not torch.equal(wanted, plain)
    torch.testing.assert_close(demo.sample(private), wanted, rtol=0, atol=0)


def test_the_user_s_model_notices_nothing(model: Any):
    patcher = (dict(model.patches), dict(model.object_patches), dict(model.model_options))
    attributes = dict(model.model.__dict__)
    before = demo.sample(model.model)
    private = comfy_host.private_copy(model)
    for parameter in private.parameters():
        parameter.data.fill_(0.5)
    private.model_sampling.sigmas.fill_(1.0)
    assert torch.equal(demo.sample(model.model), before)
    assert model.model.__dict__ == attributes
    assert (model.patches, model.object_patches, model.model_options) == patcher


def test_comfyui_cannot_move_or_patch_it(model: Any):
    private = comfy_host.private_copy(model)
    before = demo.sample(private)
    loaded = comfy.model_management.current_loaded_models
    assert not any(entry.model.model is private for entry in loaded)
    patched, _ = comfy_host.apply_state(model, None, _lora(model), 1.0, 1.0, "x")
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    comfy.model_management.unload_all_models()
    assert torch.equal(demo.sample(private), before)


def test_patches_of_the_user_are_copied_with_it(model: Any):
    plain = comfy_host.private_copy(model)
    patched, _ = comfy_host.apply_state(model, None, _lora(model), 0.7, 1.0, "x")
    wanted = weights(patched)
    private = comfy_host.private_copy(patched).state_dict()
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(private[name], plain.state_dict()[name])
    assert all(torch.equal(private[key], wanted[key]) for key in private if key in wanted)


def test_a_patched_clone_in_memory_is_not_copied(model: Any):
    before = weights(model)
    patched, _ = comfy_host.apply_state(model, None, _lora(model), 1.0, 1.0, "x")
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    private = comfy_host.private_copy(model).state_dict()
    assert all(torch.equal(private[key], before[key]) for key in before)


def test_the_sampling_that_a_node_has_set_is_copied(model: Any):
    clone = model.clone()
    other = type(model.model.model_sampling)(model.model.model_config)
    other.set_sigmas(model.model.model_sampling.sigmas * 0.5)
    clone.add_object_patch("model_sampling", other)
    private = comfy_host.private_copy(clone)
    assert torch.equal(private.model_sampling.sigmas, other.sigmas)
    plain = comfy_host.private_copy(model).model_sampling
    assert not torch.equal(plain.sigmas, other.sigmas)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_precision_is_that_of_the_copy_alone(model: Any, precision: str, dtype: torch.dtype):
    private = comfy_host.private_copy(model, precision)
    assert {parameter.dtype for parameter in private.diffusion_model.parameters()} == {dtype}
    assert private.get_dtype() == dtype
    wanted = demo.sample(model.model)
    error = (demo.sample(private).float() - wanted).norm() / wanted.norm()
    assert error < {torch.float32: 1e-7, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]


def test_a_lora_of_another_architecture_is_named(model: Any, tmp_path: Path):
    state = _lora(model)
    key = next(iter(state)).split(".")[0]
    wrong = {**state, f"{key}.lora_down.weight": torch.ones(2, 7)}
    with pytest.raises(comfy_host.HostError, match=r"cat\.safetensors.*another architecture"):
        comfy_host.apply_state(model, None, wrong, 1.0, 1.0, "cat.safetensors")
    with pytest.raises(comfy_host.HostError, match="no layer"):
        comfy_host.apply_state(model, None, {"x.y": torch.ones(1)}, 1.0, 1.0, "cat.safetensors")
