"""The text encoders in training say what the user's CLIP says, and learn what a file can carry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.targets import Target, find_targets
from lora2_pack.lora2_core.comfy_host.copies.text_encoders import TextEncoders
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import TextConfig
from lora2_pack.lora2_core.tiny_sdxl.model import (
    UNET_CONFIG,
    fill_trained,
    fill_untrained,
    text_configs,
)
from lora2_pack.tests.core import toy
from torch import Tensor

LONG = "a red robot on a green hill, " * 24  # three windows of 77 tokens
TEXTS = [
    "",
    "a photo of sks cat",
    "a (red:1.3) robot, [blue], (a (green:0.4) hill:1.1)",
    LONG + "(at night:1.7)",
]


@pytest.fixture(scope="module")
def demo_clip(comfyui: Any) -> Any:
    """The demo's CLIP as people get it, made under inference mode."""
    with torch.inference_mode():
        fill = fill_trained
        return comfy_host.build_sdxl(UNET_CONFIG, text_configs(), fill)[1]


@pytest.fixture
def clip(demo_clip: Any) -> Iterator[Any]:
    """It; a test that leaves it changed fails here."""
    before = _state(demo_clip)
    yield demo_clip
    after = _state(demo_clip)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = demo_clip.cond_stage_model
    assert not any("forward" in vars(module) for module in model.modules())
    assert (model.clip_l.layer_idx, model.clip_g.layer_idx) == (-2, -2)
    assert len(model.clip_l.transformer.text_model.encoder.layers) == 3


def _state(clip: Any) -> dict[str, Tensor]:
    """Every weight as it would be used now, cloned."""
    comfy.model_management.load_models_gpu([clip.patcher], force_full_load=True)
    return {name: value.clone() for name, value in clip.cond_stage_model.state_dict().items()}


def _of_comfyui(clip: Any, text: str) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


def check_reads_as(encoders: TextEncoders, clip: Any, text: str, tolerance: float = 1e-5) -> None:
    context, pooled = encoders.read([text])
    wanted = _of_comfyui(clip, text)
    torch.testing.assert_close(context, wanted[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pooled, wanted[1], rtol=tolerance, atol=tolerance)


def _adapted(encoders: TextEncoders) -> AdaptiveRankNetwork:
    """Adapters as a training puts them there, with a B that does something."""
    pattern = TextConfig().targets
    targets = [t for root, m in encoders.roots.items() for t in find_targets(m, pattern, root)]
    config = RankConfig.balanced(target_rank=2.0, max_rank=4)
    network = AdaptiveRankNetwork(encoders.roots, targets, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in network.layers:
            layer.lora_up.copy_(0.2 * torch.randn(layer.lora_up.shape, generator=generator))
    network.refresh()
    return network


def _lora(clip: Any, folder: Path) -> Any:
    """Adapters on ``clip``, a file of them, and what the stock loader makes of that."""
    encoders = TextEncoders(clip)
    network = _adapted(encoders)
    path = lora_file.save(folder / "text.safetensors", network.components(), {})
    file = comfy.utils.load_torch_file(str(path), safe_load=True)
    return encoders, comfy.sd.load_lora_for_models(None, clip, file, 1.0, 1.0)[1]


# --- the same embeddings ----------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_reads_a_text_as_comfyui_does(clip: Any, text: str, checkpointing: bool):
    check_reads_as(TextEncoders(clip, checkpointing=checkpointing), clip, text)


@pytest.mark.parametrize("text", TEXTS[1:])
def test_adapters_whose_b_is_zero_change_nothing(clip: Any, text: str):
    encoders = TextEncoders(clip)
    network = _adapted(encoders)
    with pytest.raises(AssertionError):
        check_reads_as(encoders, clip, text)
    toy.silence(network)
    network.refresh()
    check_reads_as(encoders, clip, text)


def test_texts_of_several_lengths_are_repeated_to_fit(clip: Any):
    contexts, pooled = TextEncoders(clip).read([TEXTS[1], LONG, LONG[: len(LONG) // 2]])
    assert contexts.shape == (3, 6 * 77, 192) and pooled.shape == (3, 128)
    for context, pool, text in zip(contexts, pooled, [TEXTS[1], LONG], strict=False):
        alone, alone_pooled = _of_comfyui(clip, text)
        times = len(context) // alone.shape[1]
        torch.testing.assert_close(context, alone[0].repeat(times, 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pool, alone_pooled[0], rtol=1e-5, atol=1e-5)


def test_no_text_is_an_error(clip: Any):
    with pytest.raises(ValueError, match="at least one"):
        TextEncoders(clip).read([])


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_the_user_s_choice_of_layer_is_kept(clip: Any, layer: int):
    other = clip.clone()
    other.clip_layer(layer)
    encoders = TextEncoders(other)
    check_reads_as(encoders, other, TEXTS[2])
    layers = {root: len(m.text_model.encoder.layers) for root, m in encoders.roots.items()}
    assert layers == {"te1": 4 + layer, "te2": 3}
    _of_comfyui(clip, "")  # the layer of a clone stays set in the model that both share


def test_another_clone_s_choice_of_layer_is_not(clip: Any):
    other = clip.clone()
    other.clip_layer(-1)
    _of_comfyui(other, "a cat")
    check_reads_as(TextEncoders(clip), clip, "a cat")


def test_half_precision_weights_compute_in_fp32(comfyui: Any):
    clip = comfy_host.build_sdxl(UNET_CONFIG, text_configs(), fill_untrained)[1]
    for tower in (clip.cond_stage_model.clip_l, clip.cond_stage_model.clip_g):
        tower.transformer.to(torch.float16)
        tower.transformer.dtype = torch.float16
    for checkpointing, dtype in ((False, torch.float32), (True, torch.float16)):
        encoders = TextEncoders(clip, checkpointing=checkpointing)
        roots = encoders.roots.values()
        assert {p.dtype for root in roots for p in root.parameters()} == {dtype}
        check_reads_as(encoders, clip, TEXTS[2])
        gradients = _gradients(encoders, _adapted(encoders))
        assert all(bool(gradient.any()) for gradient in gradients)


# --- the user's CLIP --------------------------------------------------------------------------


def test_it_shares_no_weight_with_the_user_s(clip: Any):
    def storages(modules: Any) -> set[int]:
        return {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}

    encoders = TextEncoders(clip)
    own = list(encoders.roots.values())
    assert not storages(own) & storages([clip.cond_stage_model])
    assert not any(p.requires_grad or p.is_inference() for m in own for p in m.parameters())
    loaded = comfy.model_management.current_loaded_models
    assert not any(entry.model.model in own for entry in loaded)
    before = _of_comfyui(clip, TEXTS[2])
    for module in own:
        for parameter in module.parameters():
            parameter.data.fill_(0.5)
    assert all(map(torch.equal, _of_comfyui(clip, TEXTS[2]), before))


def test_patches_of_the_user_are_copied(clip: Any, tmp_path: Path):
    _, patched = _lora(clip, tmp_path)
    check_reads_as(TextEncoders(patched), patched, TEXTS[1])
    with pytest.raises(AssertionError):
        check_reads_as(TextEncoders(patched), clip, TEXTS[1])


def test_a_patched_clone_in_memory_is_not_copied(clip: Any, tmp_path: Path):
    _, patched = _lora(clip, tmp_path)
    comfy.model_management.load_models_gpu([patched.patcher], force_full_load=True)
    check_reads_as(TextEncoders(clip), clip, TEXTS[1])


def test_it_may_be_made_under_inference_mode(clip: Any):
    with torch.inference_mode():  # as nodes are
        encoders = TextEncoders(clip)
    assert all(bool(gradient.any()) for gradient in _gradients(encoders, _adapted(encoders)))


def test_another_kind_of_clip_is_named():
    class Other:
        cond_stage_model = torch.nn.Linear(1, 1)

    with pytest.raises(comfy_host.HostError, match=r"clip is a Linear.*SDXL"):
        TextEncoders(Other())


# --- what is learnt ---------------------------------------------------------------------------


def _loss(encoders: TextEncoders, texts: list[str]) -> Tensor:
    context, pooled = encoders.read(texts)
    place = torch.linspace(0, 9, context.numel()).sin().view_as(context)
    return (context * place).mean() + pooled.square().mean()


def _gradients(encoders: TextEncoders, network: AdaptiveRankNetwork) -> list[Tensor]:
    network.refresh()
    parameters = [*network.weights(), network.log_nu]
    return list(torch.autograd.grad(_loss(encoders, TEXTS[1:]), parameters))


def test_gradients_reach_every_adapter_of_both_towers(clip: Any):
    encoders = TextEncoders(clip)
    network = _adapted(encoders)
    assert [t.root for t in network.targets] == ["te1"] * 8 + ["te2"] * 12
    gradients = _gradients(encoders, network)
    assert all(bool(gradient.any()) for gradient in gradients)
    assert bool((gradients[-1] != 0).all()), "a ν without gradient"


def test_gradients_are_those_of_finite_differences(clip: Any):
    encoders = TextEncoders(clip)
    for module in encoders.roots.values():
        module.double()
    network = _adapted(encoders)
    weights = network.weights()
    gradients = _gradients(encoders, network)
    for number in range(0, len(weights), 7):
        weight, gradient = weights[number], gradients[number]
        step = 1e-2 * weight.detach().norm() * gradient / gradient.norm()
        with torch.no_grad():
            weight += step
            higher = _loss(encoders, TEXTS[1:])
            weight -= 2 * step
            lower = _loss(encoders, TEXTS[1:])
            weight += step
        slope = float((higher - lower) / (2 * step.norm()))
        assert slope == pytest.approx(float(gradient.norm()), rel=0.05), number


def test_checkpointing_changes_no_gradient(clip: Any):
    found = []
    for checkpointing in (False, True):
        encoders = TextEncoders(clip, checkpointing=checkpointing)
        found.append(_gradients(encoders, _adapted(encoders)))
    assert all(map(torch.equal, *found))


def test_checkpointing_keeps_less(clip: Any):
    kept = []
    for checkpointing in (False, True):
        encoders = TextEncoders(clip, checkpointing=checkpointing)
        _adapted(encoders)
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = _loss(encoders, TEXTS[1:])
        kept.append(sum(sizes.values()))
        del loss
    assert kept[1] < kept[0] / 2, kept


# --- the file ---------------------------------------------------------------------------------


def test_names_are_those_of_comfyui_s_loader(clip: Any):
    encoders = TextEncoders(clip)
    known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    towers = {"te1": "clip_l", "te2": "clip_g"}
    targets: list[Target] = [
        target for root, m in encoders.roots.items() for target in find_targets(m, "q_proj", root)
    ]
    for target in targets:
        key = lora_file.kohya_key(target.name, target.root)
        assert known[key] == f"{towers[target.root]}.transformer.{target.name}.weight"
    first = lora_file.kohya_key(targets[0].name, targets[0].root)
    assert first == "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.mark.parametrize("text", TEXTS)
def test_the_stock_loader_says_what_training_said(clip: Any, tmp_path: Path, text: str):
    encoders, patched = _lora(clip, tmp_path)
    plain, _ = _of_comfyui(clip, text)
    assert (_of_comfyui(patched, text)[0] - plain).abs().max() > 0.05, "the LoRA does nothing"
    check_reads_as(encoders, patched, text, tolerance=1e-3)
