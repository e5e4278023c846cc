"""What was opened and cut lately: read once, its keys parsed once, and forgotten in time."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors.torch
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.comfy_host.loading.fitting import layer_names
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files.keys import parse_keys
from lora2_pack.lora2_core.resizing import recent
from lora2_pack.lora2_core.resizing.recent import LoRACache
from lora2_pack.lora2_core.resizing.resize import resize_file
from lora2_pack.tests.host.test_loading_ways import _apply, _lora
from torch import Tensor

# --- cut, and cached --------------------------------------------------------------------------


def test_another_strength_reads_no_disk(model: Any, tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(_lora(model), path)
    cache, limits = LoRACache(), Limits(energy=0.9)
    first = cache.open(path, limits)
    whole = cache.open(path, Limits())
    assert sum(t.numel() for t in first.state.values()) < sum(
        t.numel() for t in whole.state.values()
    )

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("read or computed again")

    with monkeypatch.context() as patch:
        patch.setattr(recent, "load", refuse)
        patch.setattr(recent, "shrink", refuse)
        patch.setattr("builtins.open", refuse)
        patch.setattr(Path, "open", refuse)
        assert cache.open(path, limits) is first and cache.open(path, Limits()) is whole
        _apply(model, dict(cache.open(path, limits).state), strength=0.3)
    other = tmp_path / "y.safetensors"
    safetensors.torch.save_file(_lora(model, 9), other)
    os.replace(other, path)
    assert cache.open(path, Limits()) is not whole
    path.unlink()
    with pytest.raises(lora_file.LoRAFileError, match="does not exist"):
        cache.open(path, limits)


@contextmanager
def _parsings() -> Iterator[list[frozenset[str]]]:
    """The keys that are parsed meanwhile, whoever asks for it."""
    asked: list[frozenset[str]] = []

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code is parse_keys.__code__:
            asked.append(frozenset(frame.f_locals["keys"]))

    sys.setprofile(watch)
    try:
        yield asked
    finally:
        sys.setprofile(None)


def _of_peft(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A DoRA under PEFT's names, none of which ComfyUI knows."""
    dotted = {
        name.replace("diffusion_model.", "lora_unet_", 1).replace(".", "_"): name
        for name in layer_names(model, None)
        if name.startswith("diffusion_model.")
    }
    new: dict[str, Tensor] = {}
    for key in sorted({key.split(".")[0] for key in state}):
        name = f"base_model.model.{dotted[key]}"
        new[f"{name}.lora_A.weight"] = state[f"{key}.lora_down.weight"]
        new[f"{name}.lora_B.weight"] = up = state[f"{key}.lora_up.weight"]
        new[f"{name}.lora_magnitude_vector.weight"] = torch.ones(up.shape[0])
    return new


@pytest.mark.parametrize(
    ("peft", "limits", "sets"),
    [
        (False, Limits(max_rank=1), 1),
        (True, Limits(), 2),  # ComfyUI wants other names
        (True, Limits(max_rank=1), 3),  # and what is cut gets an alpha
    ],
)
def test_keys_are_parsed_once_between_the_disk_and_the_patches(
    model: Any, tmp_path: Path, peft: bool, limits: Limits, sets: int
):
    """And once more only where they become others."""
    state, path, cache = _lora(model, selection="attention"), tmp_path / "x", LoRACache()
    safetensors.torch.save_file(_of_peft(model, state) if peft else state, path)
    with _parsings() as asked:
        applied = comfy_host.apply_lora(model, None, cache.open(path, limits), 1.0, 1.0, "x")
    assert len(asked) == len(set(asked)) == sets
    assert len(applied.model.patches) == len(state) // 3 and not applied.note
    with _parsings() as asked:
        cache.open(path, limits)
        resize_file(path, tmp_path / "y", limits)
        lora_file.inspect(path)
    assert len(asked) == 2, "once each time that the file itself is opened"


def test_the_cache_forgets(model: Any, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(_lora(model, selection="attention"), path)
    cache = LoRACache()
    first = cache.open(path, Limits(max_rank=1))
    for rank in range(2, 12):
        cache.open(path, Limits(max_rank=rank))
    assert len(cache._kept) <= 8 and cache.open(path, Limits(max_rank=1)) is not first


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn]
)
def test_weights_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype):
    if dtype == torch.float8_e4m3fn and value == value:
        pytest.skip("this type has no infinity")
    state = {"a.lora_down.weight": torch.ones(2, 3), "a.lora_up.weight": torch.ones(3, 2)}
    state["a.lora_up.weight"][1, 1] = value
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: t.to(dtype) for key, t in state.items()}, path)
    with pytest.raises(lora_file.LoRAFileError, match=r"x\.safetensors is damaged: a\.lora_up"):
        LoRACache().open(path, Limits())


def test_a_copy_of_a_file_is_read_by_itself(model: Any, tmp_path: Path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    safetensors.torch.save_file(_lora(model), a)
    shutil.copy(a, b)
    cache = LoRACache()
    assert cache.open(a, Limits()) is not cache.open(b, Limits())
    b.unlink()
    with pytest.raises(lora_file.LoRAFileError, match=r"b\.safetensors does not exist"):
        cache.open(b, Limits())
