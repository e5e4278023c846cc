"""Differences beside factors, as ComfyUI's TrainLoraNode, LoraSave and LyCORIS write them, resized
and added: what the stock loader makes of the new files is what it makes of the old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.tests.host.demo import weights
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = "diffusion_model.input_blocks.4"  # 64 channels
State = dict[str, Tensor]


def _random(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) / 20


def _trained_by_core(model: Any, seed: int) -> State:
    """As ComfyUI's TrainLoraNode names it: factors of matrices, differences of all that is flat."""
    state: State = {}
    for number, (name, module) in enumerate(model.model.named_modules()):
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not name.startswith(BLOCK) or weight is None:
            continue
        if weight.dim() > 1:
            flat = weight.flatten(1)
            state[f"{name}.lora_up.weight"] = _random((flat.shape[0], 4), seed + number)
            state[f"{name}.lora_down.weight"] = _random((4, flat.shape[1]), seed - number)
            state[f"{name}.alpha"] = torch.tensor(1.0)
        else:
            state[f"{name}.diff"] = _random(weight.shape, seed + number)
        if bias is not None:
            state[f"{name}.diff_b"] = _random(bias.shape, seed + 2 * number)
    return state


def _trained_by_lycoris(model: Any, seed: int) -> State:
    """Kohya's keys, factors of attention and norms (``train_norm``)."""
    state: State = {}
    for key, tensor in _trained_by_core(model, seed).items():
        name, *_ = key.removeprefix("diffusion_model.").partition(
            next(e for e in (".lora_", ".alpha", ".diff") if e in key)
        )
        kohya = "lora_unet_" + name.replace(".", "_")
        if tensor.dim() == 1:
            if "norm" in name:
                state[kohya + (".b_norm" if key.endswith("_b") else ".w_norm")] = tensor
        elif ".attn" in name:
            state[kohya + key[key.rindex(".lora" if "lora" in key else ".alpha") :]] = tensor
    return state


def _weights(model: Any, *files: tuple[Path, float]) -> State:
    """Of the model with these files on it, one after the other, by the stock loader."""
    for path, strength in files:
        model, _ = comfy.sd.load_lora_for_models(model, None, load_file(path), strength, 0)
    return weights(model)


def _off(got: State, wanted: State, plain: State) -> float:
    """Of all that is changed."""
    changes = [(got[key] - wanted[key], wanted[key] - plain[key]) for key in wanted]
    off, all_ = (
        sum(float(t.double().square().sum()) for t in ts) for ts in zip(*changes, strict=True)
    )
    assert all_ > 0
    return (off / all_) ** 0.5


@pytest.fixture
def files(model: Any, tmp_path: Path) -> dict[str, Path]:
    found = {}
    for name, made, seed in (
        ("core", _trained_by_core, 100), ("other", _trained_by_core, 500),
        ("lycoris", _trained_by_lycoris, 900),
    ):  # fmt: skip
        found[name] = tmp_path / f"{name}.safetensors"
        state = made(model, seed)
        assert any("norm" in key for key in state) and any("lora_up" in key for key in state)
        save_file(state, found[name])
    return found


def test_a_smaller_file_changes_what_was_changed(
    model: Any, files: dict[str, Path], tmp_path: Path
):
    plain = weights(model)
    for name, path in files.items():
        whole = resize_file(path, tmp_path / f"{name}_whole.safetensors", Limits()).path
        wanted = _weights(model, (path, 1.0))
        assert _off(_weights(model, (whole, 1.0)), wanted, plain) < 5e-4
        small = resize_file(path, tmp_path / f"{name}_small.safetensors", Limits(max_rank=2)).path
        cut = _weights(model, (small, 1.0))
        assert small.stat().st_size < path.stat().st_size
        flat = [key for key in wanted if wanted[key].dim() == 1]
        assert any(not torch.equal(cut[key], plain[key]) for key in flat)
        assert all(torch.equal(cut[key], wanted[key]) for key in flat)
        for key in (key for key in wanted if wanted[key].dim() > 1):
            change = (wanted[key] - plain[key]).flatten(1).double()
            kept = (cut[key] - plain[key]).flatten(1).double()
            values = torch.linalg.svdvals(change)
            best = float(values[2:].norm())
            assert float((change - kept).norm()) <= best + 1e-3 * float(values.norm())


@pytest.mark.parametrize("pair", [("core", "other"), ("core", "lycoris"), ("lycoris", "other")])
def test_a_sum_changes_what_both_change(
    model: Any, files: dict[str, Path], tmp_path: Path, pair: tuple[str, str]
):
    parts = [(files[pair[0]], 0.7), (files[pair[1]], -1.3)]
    found = merge_files(parts, tmp_path / "sum.safetensors", Limits())
    wanted = _weights(model, *parts)
    assert _off(_weights(model, (found.path, 1.0)), wanted, weights(model)) < 1e-5
    again = resize_file(found.path, tmp_path / "again.safetensors", Limits(energy=0.9999))
    assert _off(_weights(model, (again.path, 1.0)), wanted, weights(model)) < 0.02
