"""The other layout of LoRA² files: what its trainer computed is what we load, resize and merge."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lora2_pack.lora2_core import foreign_lora2, lora_file, resize
from lora2_pack.lora2_core.lora_cache import LoRACache
from lora2_pack.lora2_core.lora_file import LoRAFileError
from lora2_pack.lora2_core.shrink import Limits
from lora2_pack.tests.core import toy
from lora2_pack.tests.core.test_resize import deltas, relative
from torch import Tensor

CONFIGURED, QUANTILE = 16, 0.9


def made(path: Path, alpha: float, **metadata: str) -> dict[str, Tensor]:
    """A file as that trainer writes it, and the ΔW that it had computed."""
    state: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    for index, nu in enumerate((0.2, 0.5, 1.3)):
        name = f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn{1 + index % 2}_to_q_{index}"
        rank = min(CONFIGURED, math.ceil(-math.log(1 - QUANTILE) / nu))
        generator = torch.Generator().manual_seed(index)
        down = torch.randn(rank, 24, generator=generator)
        up = torch.randn(32, rank, generator=generator)
        state |= {
            f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
            f"{name}.lora2_nu": torch.tensor(nu), f"{name}.alpha": torch.tensor(alpha),
        }  # fmt: skip
        x = torch.arange(1, rank + 1, dtype=torch.float64)
        importance = torch.exp(-nu * x) - torch.exp(-nu * (x + 1))
        wanted[name] = (up.double() * importance) @ down.double() * (alpha / CONFIGURED)
    safetensors.torch.save_file(state, path, metadata)
    return wanted


@pytest.mark.parametrize(
    ("alpha", "metadata"),
    [
        (16.0, {}),  # configured alike, as the files in the wild
        (16.0, {"ss_network_dim": "Dynamic"}),
        (4.0, {"ss_network_dim": "16"}),
        (16.0, {"ss_network_dim": "16"}),
    ],
)
def test_its_weights_come_out_right(tmp_path: Path, alpha: float, metadata: dict):
    path = tmp_path / "a.safetensors"
    wanted = made(path, alpha, **metadata)
    assert foreign_lora2.is_foreign(lora_file.load(path).state)
    opened = LoRACache().open(path, Limits())
    assert not foreign_lora2.is_foreign(opened.state)
    found = {key: toy.stored_delta(dict(opened.state), key) for key in wanted}
    assert relative(found, wanted) < 5e-4
    assert relative(deltas(path), wanted) < 1e-6
    ours = resize.resize(path, tmp_path / "ours.safetensors", Limits())
    assert relative(deltas(ours.path), wanted) < 5e-4
    nus = sorted(info.nu for info in lora_file.inspect(ours.path)[0])
    assert nus == pytest.approx([0.2, 0.5, 1.3])
    twice = resize.merge([(path, 1.0), (path, 0.5)], tmp_path / "sum.safetensors", Limits())
    assert relative(deltas(twice.path), {key: 1.5 * w for key, w in wanted.items()}) < 1e-5


def test_a_stock_reader_gets_them_wrong(tmp_path: Path):
    """Or nothing of this would be needed."""
    wanted = made(tmp_path / "a", 16.0)
    state = safetensors.torch.load_file(tmp_path / "a")
    assert relative({key: toy.stored_delta(state, key) for key in wanted}, wanted) > 0.5


@pytest.mark.parametrize(
    "nu", [torch.tensor(0.0), torch.tensor(-1.0), torch.ones(3), torch.ones(0)]
)
def test_importances_that_are_none(tmp_path: Path, nu: Tensor):
    path = tmp_path / "a.safetensors"
    made(path, 16.0)
    state = safetensors.torch.load_file(path)
    key = next(key for key in state if key.endswith("lora2_nu"))
    safetensors.torch.save_file({**state, key: nu}, path)
    for use in (lambda: LoRACache().open(path, Limits()), lambda: deltas(path)):
        with pytest.raises(LoRAFileError, match=r"is damaged: .* has a lora2_nu that is no number"):
            use()
