"""Every kind of LoRA: told as it is where it fits, refused in one sentence where it does not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import peft
import pytest
import safetensors.torch
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.comfy_host.loading import fitting, misfits
from lora2_pack.lora2_core.comfy_host.loading.fitting import layer_names
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.lora_file import LoRAFile
from lora2_pack.lora2_core.resizing.recent import LoRACache
from lora2_pack.tests.host.demo import weights
from torch import Tensor, nn

LINEAR = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
CONV = "input_blocks.4.0.in_layers.2"
NAME = f"diffusion_model.{LINEAR}"
KOHYA = "lora_unet_" + LINEAR.replace(".", "_")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 10


def _kind(name: str, kind: str, out: int, inside: int, kernel: tuple[int, ...] = ()) -> dict:
    """One component for a layer of out × inside."""
    one = tuple(1 for _ in kernel)
    pair = {
        ".lora_up.weight": _random(out, 2, *one),
        ".lora_down.weight": _random(2, inside, *kernel),
    }
    made: dict[str, Tensor] = {
        "lora": pair,
        "mid": {
            ".lora_up.weight": _random(out, 2, *one),
            ".lora_down.weight": _random(2, inside, *one),
            ".lora_mid.weight": _random(2, 2, *kernel),
        },
        "dora": {**pair, ".dora_scale": _random(out, 1, *one) + 1},
        "dora by input": {**pair, ".dora_scale": _random(1, inside, *one) + 1},
        "loha": {
            ".hada_w1_a": _random(out, 2),
            ".hada_w1_b": _random(2, inside * max(1, torch.Size(kernel).numel())),
            ".hada_w2_a": _random(out, 2, seed=1),
            ".hada_w2_b": _random(2, inside * max(1, torch.Size(kernel).numel()), seed=1),
        },
        "loha with a core": {
            f".hada_{key}": _random(*shape)
            for part in ("1", "2")
            for key, shape in (
                (f"w{part}_a", (2, out)),
                (f"w{part}_b", (2, inside)),
                (f"t{part}", (2, 2, *kernel)),
            )
        },
        "lokr": {
            ".lokr_w1": _random(4, 4),
            ".lokr_w2_a": _random(out // 4, 2),
            ".lokr_w2_b": _random(2, inside // 4 * max(1, torch.Size(kernel).numel())),
        },
        "lokr whole": {
            ".lokr_w1_a": _random(4, 2),
            ".lokr_w1_b": _random(2, 4),
            ".lokr_w2": _random(out // 4, inside // 4, *kernel),
        },
        "difference": {".diff": _random(out, inside, *kernel)},
    }[kind]
    return {name + end: tensor for end, tensor in made.items()}


def _shape(model: Any, layer: str) -> tuple[int, int, tuple[int, ...]]:
    out, inside, *kernel = model.model.diffusion_model.get_submodule(layer).weight.shape
    return out, inside, tuple(kernel)


def _apply(model: Any, state: dict[str, Tensor]) -> Any:
    return comfy_host.apply_lora(model, None, LoRAFile(state, {}), 1.0, 1.0, "x")


CASES = [
    *((LINEAR, k) for k in ("lora", "dora", "dora by input", "loha", "lokr", "lokr whole")),
    *((CONV, k) for k in ("lora", "mid", "dora", "loha", "loha with a core", "lokr whole")),
    (LINEAR, "difference"),
    (CONV, "difference"),
]


# Magnitudes of rows ComfyUI reads in another way than their writers: see test_any_file.py.
AS_STOCK = [(layer, kind) for layer, kind in CASES if kind != "dora"]


@pytest.mark.parametrize(("layer", "kind"), AS_STOCK)
def test_what_fits_is_the_stock_loader_s_patch(model: Any, caplog: Any, layer: str, kind: str):
    name = "lora_unet_" + layer.replace(".", "_")
    state = _kind(name, kind, *_shape(model, layer))
    ours = _apply(model, state)
    assert ours.note == ""
    with caplog.at_level(logging.WARNING):
        got = weights(ours.model)[f"diffusion_model.{layer}.weight"]
        stock, _ = comfy.sd.load_lora_for_models(model, None, dict(state), 1.0, 0)
        wanted = weights(stock)[f"diffusion_model.{layer}.weight"]
    before = weights(model)[f"diffusion_model.{layer}.weight"]
    assert torch.equal(got, wanted) and not torch.equal(got, before)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR], caplog.text


@pytest.mark.parametrize(("layer", "kind"), CASES)
def test_what_does_not_fit_is_refused_before_anything_is_patched(model: Any, layer: str, kind: str):
    out, inside, kernel = _shape(model, layer)
    name, before = "lora_unet_" + layer.replace(".", "_"), dict(model.patches)
    for wrong in ((out * 2, inside), (out, inside * 2)):
        state = _kind(name, kind, *wrong, kernel)
        with pytest.raises(comfy_host.HostError, match=r"^x .*×") as caught:
            _apply(model, state)
        assert "\n" not in str(caught.value) and model.patches == before


def test_halves_that_do_not_fit_together(model: Any):
    for kind, key in (
        ("loha", ".hada_w1_b"),
        ("loha", ".hada_w2_a"),
        ("lokr", ".lokr_w2_b"),
        ("dora", ".lora_down.weight"),
    ):
        state = _kind(KOHYA, kind, *_shape(model, LINEAR))
        state[KOHYA + key] = _random(3, 5)
        with pytest.raises(comfy_host.HostError, match="halves that do not fit together"):
            _apply(model, state)


def test_magnitudes_of_another_size(model: Any):
    for scale in (torch.ones(5, 1), torch.ones(()), torch.ones(_shape(model, LINEAR)[0])):
        state = _kind(KOHYA, "dora", *_shape(model, LINEAR))
        state[KOHYA + ".dora_scale"] = scale
        with pytest.raises(comfy_host.HostError, match="has magnitudes"):
            _apply(model, state)


def test_a_loha_says_what_it_was_made_for(model: Any):
    name = KOHYA.replace("attn1_to_q", "attn2_to_k")
    state = _kind(name, "loha", _shape(model, LINEAR)[0], 768)
    with pytest.raises(comfy_host.HostError, match=r"was made for SD 1\.5 \(context 768\)"):
        _apply(model, state)


# --- what others leave in a file --------------------------------------------------------------


def test_components_of_rank_0_change_nothing(model: Any):
    state = _kind(KOHYA, "lora", *_shape(model, LINEAR))
    other = KOHYA.replace("to_q", "to_k")
    more = _kind(other, "lora", *_shape(model, LINEAR)) | {f"{other}.alpha": torch.tensor(1.0)}
    more[f"{other}.lora_up.weight"] = more[f"{other}.lora_up.weight"][:, :0]
    more[f"{other}.lora_down.weight"] = more[f"{other}.lora_down.weight"][:0]
    applied = _apply(model, state | more)
    assert applied.note == "" and set(applied.model.patches) == {f"{NAME}.weight"}
    file = LoRAFile(state | more, {})
    beside = comfy_host.apply_lora(model, None, file, 1, 1, "x", way="bypass")
    assert applied.model.patches and not beside.model.patches


def test_tensors_of_unknown_kind_are_told(model: Any):
    state = _kind(KOHYA, "lora", *_shape(model, LINEAR))
    assert _apply(model, state | {"bundle_emb.cat": torch.ones(2)}).note == (
        "x: 1 embedding (cat) left out; copy the file to models/embeddings and write embedding:x "
        "in the prompt."
    )
    assert _apply(model, state | {"strange.cat": torch.ones(2)}).note == (
        "x: 1 tensor of unknown kind left out: strange.cat."
    )
    more = {f"{KOHYA}.new_kind_{number}": torch.ones(2) for number in range(4)}
    assert "x: 4 tensors of unknown kind left out: " in _apply(model, state | more).note


@pytest.mark.parametrize("limits", [Limits(), Limits(max_rank=1)])
def test_an_alpha_of_several_numbers(tmp_path: Path, limits: Limits):
    state = _kind(KOHYA, "lora", 4, 4) | {f"{KOHYA}.alpha": torch.ones(3)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(lora_file.LoRAFileError, match="alpha holds 3 numbers where one belongs"):
        LoRACache().open(tmp_path / "x.safetensors", limits)


def test_a_layer_whose_weight_is_kept_elsewhere(model: Any):
    """As newer versions of ComfyUI do until the layer is used."""
    root = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Conv2d(6, 8, 3, groups=2)})
    wanted = {f"{name}.weight": (layer.weight.shape, None) for name, layer in root.items()}
    for layer in root.values():
        del layer._parameters["weight"]
        layer.weight = None
    assert {key: misfits.weight_of(root, key) for key in wanted} == wanted
    root["a"].bias = None
    assert misfits.weight_of(root, "a.bias") == (None, None)


# --- PEFT itself ------------------------------------------------------------------------------


class _Wrapped(nn.Module):
    """Two layers under the names of the model, for PEFT to write a file of."""

    def __init__(self, model: Any):
        super().__init__()
        for layer in (LINEAR, CONV):
            parent = self
            *path, last = f"diffusion_model.{layer}".split(".")
            for name in path:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = getattr(parent, name)
            old = model.model.diffusion_model.get_submodule(layer)
            new = (
                nn.Linear(old.in_features, old.out_features)
                if isinstance(old, nn.Linear)
                else nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size)
            )
            new.weight.data.copy_(old.weight)
            parent.add_module(last, new)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
def test_a_file_that_peft_wrote(model: Any, tmp_path: Path, kind: str):
    torch.manual_seed(0)
    targets = [f"diffusion_model.{layer}" for layer in (LINEAR, CONV)]
    if kind == "loha":
        config: Any = peft.LoHaConfig(r=2, alpha=2, target_modules=targets[:1], init_weights=False)
    else:
        config = peft.LoraConfig(
            r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False,
            use_dora=kind == "dora",
        )  # fmt: skip
    wrapped = peft.get_peft_model(_Wrapped(model), config)
    wrapped.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in state)
    assert any("magnitude" in key for key in state) == (kind == "dora")
    applied = _apply(model, state)
    assert applied.note == "" and len(applied.model.patches) == len(config.target_modules)
    found = weights(applied.model)
    wanted = dict(wrapped.merge_and_unload().named_parameters())
    for name in config.target_modules:
        got, merged = found[f"{name}.weight"], wanted[f"{name}.weight"].detach()
        torch.testing.assert_close(got, merged, rtol=1e-4, atol=1e-5)


def test_peft_on_a_part_of_a_model(model: Any):
    """Whose names lack what ComfyUI puts before them."""
    state = _kind(f"base_model.model.{LINEAR}", "lora", *_shape(model, LINEAR))
    names = layer_names(model, None)
    assert set(fitting.in_known_names(LoRAFile(state, {}), names).state) == {
        f"{KOHYA}{end}" for end in (".lora_up.weight", ".lora_down.weight")
    }
    assert set(_apply(model, state).model.patches) == {f"{NAME}.weight"}
