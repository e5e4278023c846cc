"""LoRAs beside the weights while a model is loaded, cloned, forgotten, copied or trained on."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import pytest
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.comfy_host.loading import bypass
from lora2_pack.lora2_core.comfy_host.loading.fitting import _base_hashes, known_base_hash
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.tests.host import demo
from torch import Tensor

LAYER = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"


def _lora(model: Any, seed: int, merged: bool = False) -> dict[str, Tensor]:
    """Random weights; ``merged``: one component is whole, and cannot go beside its layer."""
    generator = torch.Generator().manual_seed(seed)
    components = [
        Component(
            target.name,
            torch.randn(2, target.in_features, generator=generator) / 10,
            torch.randn(target.out_features, 2, generator=generator) / 10,
            torch.ones(2),
            0.1,
        )
        for target in find_targets(model.model.diffusion_model)
    ]
    state = lora_file.to_state(components)
    if merged:
        key = next(iter(state)).split(".")[0]
        del state[f"{key}.alpha"]
        up, down = state.pop(f"{key}.lora_up.weight"), state.pop(f"{key}.lora_down.weight")
        state[f"{key}.diff"] = up.float() @ down.float() / 5
    return state


def _apply(model: Any, state: dict[str, Tensor], way: str) -> Any:
    file = lora_file.LoRAFile(state, {})
    return comfy_host.apply_lora(model, None, file, 1.0, 1.0, "x", way=way).model


def _load(patcher: Any) -> None:
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)


def _seen(patcher: Any) -> Tensor:
    _load(patcher)
    return demo.sample(patcher.model)


def _hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.model.modules())


def _same(got: Tensor, wanted: Tensor) -> bool:
    return float((got - wanted).norm() / wanted.norm()) < 1e-5


@pytest.fixture(autouse=True)
def _nothing_stays(model: Any) -> Iterator[None]:
    yield
    comfy.model_management.unload_all_models()
    assert _hooks(model) == 0, "hooks were left behind"


@pytest.mark.parametrize("merged", [False, True], ids=["all beside", "one merged"])
@pytest.mark.parametrize("way", ["bypass", "merge"])
def test_a_second_one_on_a_model_that_is_loaded(model: Any, way: str, merged: bool):
    first, second = _lora(model, 1), _lora(model, 2, merged)
    wanted = _apply(model, first, "merge")
    base, alone, both = _seen(model), _seen(wanted), _seen(_apply(wanted, second, "merge"))
    a = _apply(model, first, "bypass")
    _load(a)
    b = _apply(a, second, way)  # a cloned while its hooks are in
    assert _same(_seen(a), alone)
    assert _same(_seen(b), both)
    other = b.clone()
    assert _same(_seen(other), both)
    assert _same(_seen(b), both)
    assert _same(_seen(other.clone()), both)
    del b, other
    gc.collect()
    assert _same(_seen(a), alone)
    assert torch.equal(_seen(model), base)


def test_a_clone_that_dies_in_use(model: Any):
    """As when a strength changes: ComfyUI forgets the old clone while its weights are loaded."""
    base = _seen(model)
    alone = _seen(_apply(model, _lora(model, 1), "merge"))
    a = _apply(model, _lora(model, 1), "bypass")
    clone = a.clone()
    _load(clone)
    del clone
    gc.collect()
    assert _same(_seen(a), alone)
    b = _apply(model, _lora(model, 2), "bypass")
    wanted = _seen(b)
    del a
    gc.collect()
    assert torch.equal(_seen(b), wanted)
    del b
    gc.collect()
    assert _hooks(model) == 0
    assert torch.equal(_seen(model), base)


def test_a_deep_copy_works_by_itself(model: Any):
    a = _apply(model, _lora(model, 1), "bypass")
    wanted = _seen(a)
    b = model.clone()
    b.injections = copy.deepcopy(a.injections)
    assert torch.equal(_seen(b), wanted)
    mine, theirs = bypass.branches_of(b), bypass.branches_of(a)
    assert mine.keys() == theirs.keys() and mine[f"{LAYER}.weight"] is not theirs[f"{LAYER}.weight"]


def test_types_and_devices_are_the_input_s(model: Any):
    branch = bypass.Branch(torch.randn(2, 4).half(), torch.randn(3, 2).half(), 0.5)
    layer = torch.nn.Linear(4, 3)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 4, dtype=dtype)
        first, wanted = branch(layer, x), x.double() @ branch.delta().double().t()
        assert first.dtype == dtype and _off(first, wanted) < 4 * torch.finfo(dtype).eps
        held = branch._there
        assert torch.equal(branch(layer, x), first) and branch._there is held, "cast again"
    branch.leave()
    assert branch._there is None


def _off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("merged", [False, True], ids=["all beside", "one merged"])
def test_a_training_builds_on_it(model: Any, merged: bool):
    state = _lora(model, 1, merged)
    beside, into = _apply(model, state, "bypass"), _apply(model, state, "merge")
    wanted = comfy_host.private_copy(into, "fp32").state_dict()
    private = comfy_host.private_copy(beside, "fp32")
    assert all(not module._forward_hooks for module in private.modules())
    for key, found in private.state_dict().items():
        torch.testing.assert_close(found, wanted[key], rtol=1e-5, atol=1e-6)
    _load(beside)
    before = _hooks(model)
    comfy_host.private_copy(beside, "fp32")
    assert _hooks(model) == before > 0, "the user's model lost its LoRA"


def test_the_base_is_not_taken_for_another(model: Any, parts: Any):
    patched = _apply(model, _lora(model, 1), "bypass")
    _base_hashes.clear()
    comfy_host.prepare_training(patched, *parts[1:], demo.photos(1), demo.settings())
    assert known_base_hash(model, "auto") == ""
    comfy_host.prepare_training(model, *parts[1:], demo.photos(1), demo.settings())
    assert known_base_hash(model, "auto") != ""
    _base_hashes.clear()


def test_scaled_fp8_weights_are_left_alone(model: Any):
    """A layer in fp8 with a scale beside it, in a model that computes in another type."""
    private = comfy_host.private_copy(model, "fp32")
    layer = demo.in_scaled_fp8(comfy.utils.get_attr(private, LAYER))
    comfy.utils.set_attr(private, LAYER, layer)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(private, load_device=cpu, offload_device=cpu)
    assert patcher.model_dtype() == torch.float32
    numbers = lambda: getattr(layer.weight, "_qdata", layer.weight).view(torch.uint8)  # noqa: E731
    before = numbers().clone()
    patched = _apply(patcher, _lora(model, 1), "auto")
    assert set(bypass.branches_of(patched)) == {f"{LAYER}.weight"}, (
        "what is exact is merged, what is not"
    )
    assert f"{LAYER}.weight" not in patched.patches and len(patched.patches) > 100
    _load(patched)
    assert torch.equal(numbers(), before)
