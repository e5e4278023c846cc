"""The other layout of LoRA² files: what its trainer computed is what we load, resize and merge."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files.keys import NU
from lora2_pack.lora2_core.lora_file import LoRAFileError
from lora2_pack.lora2_core.resizing.recent import LoRACache
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.tests.core import toy
from lora2_pack.tests.core.resizing.test_resize import deltas, relative
from torch import Tensor

CONFIGURED, OF_CONVOLUTIONS, QUANTILE = 16, 8, 0.9
NUS = (0.2, 0.5, 1.3)


def made(
    path: Path,
    alpha: float,
    nus: tuple[float, ...] = NUS,
    kernel: tuple[int, ...] = (),
    configured: int = CONFIGURED,
    dtype: torch.dtype = torch.float32,
    **metadata: str,
) -> dict[str, Tensor]:
    """A file as that trainer writes it, and the ΔW that it had computed."""
    state: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    for index, nu in enumerate(nus):
        name = f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn{1 + index % 2}_to_q_{index}"
        rank = configured if nu <= 0 else min(configured, math.ceil(-math.log(1 - QUANTILE) / nu))
        generator = torch.Generator().manual_seed(index)
        down = torch.randn(rank, 24, *kernel, generator=generator).to(dtype)
        up = torch.randn(32, rank, *(1 for _ in kernel), generator=generator).to(dtype)
        stored = torch.tensor(nu).to(dtype)
        state |= {
            f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
            f"{name}.lora2_nu": stored, f"{name}.alpha": torch.tensor(alpha).to(dtype),
        }  # fmt: skip
        x = torch.arange(1, rank + 1, dtype=torch.float64)
        importance = torch.exp(-float(stored) * x) - torch.exp(-float(stored) * (x + 1))
        scaled = up.double().flatten(1) * importance * (alpha / configured)
        wanted[name] = scaled @ down.double().flatten(1)
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
    assert all(pair.nu for pair in lora_file.load(path).parsed.pairs)
    opened = LoRACache().open(path, Limits())
    assert not [key for key in opened.state if key.endswith(NU)]
    found = {key: toy.stored_delta(dict(opened.state), key) for key in wanted}
    assert relative(found, wanted) < 5e-4
    assert relative(deltas(path), wanted) < 1e-6
    ours = resize_file(path, tmp_path / "ours.safetensors", Limits())
    assert relative(deltas(ours.path), wanted) < 5e-4
    nus = sorted(info.nu for info in lora_file.inspect(ours.path)[0])
    assert nus == pytest.approx(NUS)
    twice = merge_files([(path, 1.0), (path, 0.5)], tmp_path / "sum.safetensors", Limits())
    assert relative(deltas(twice.path), {key: 1.5 * w for key, w in wanted.items()}) < 1e-5


ARGUMENTS = {"ss_network_args": '{"algo": "lora2", "conv_dim": "8", "conv_alpha": "4"}'}


@pytest.mark.parametrize(
    ("kernel", "configured", "metadata"),
    [
        ((3, 3), OF_CONVOLUTIONS, {"ss_network_dim": "16", **ARGUMENTS}),
        ((3, 3), OF_CONVOLUTIONS, ARGUMENTS),
        ((3, 3), CONFIGURED, {"ss_network_dim": "16", "ss_network_args": '{"algo": "lora2"}'}),
        ((3, 3), CONFIGURED, {"ss_network_dim": "16", "ss_network_args": "[" * 100_000}),
        ((3, 3), CONFIGURED, {"ss_network_dim": "16", "ss_network_args": '{"conv_dim": null}'}),
        ((1, 1), CONFIGURED, {"ss_network_dim": "16", **ARGUMENTS}),
    ],
)
def test_convolutions_have_a_rank_of_their_own(tmp_path: Path, kernel, configured, metadata):
    """Where the kernel is larger than 1; the other convolutions count as linear layers."""
    wanted = made(tmp_path / "a", 4.0, kernel=kernel, configured=configured, **metadata)
    assert relative(deltas(tmp_path / "a"), wanted) < 1e-6


def test_an_importance_that_training_took_below_zero(tmp_path: Path):
    """Nothing holds ν above 0 there; what was trained counts."""
    path = tmp_path / "a.safetensors"
    wanted = made(path, 16.0, (0.2, -0.05, 0.0), ss_network_dim="16")
    assert relative(deltas(path), wanted) < 1e-6
    *_, nothing = wanted
    opened = LoRACache().open(path, Limits())
    assert not [key for key in opened.state if key.startswith(nothing)]
    ours = resize_file(path, tmp_path / "ours.safetensors", Limits())
    assert relative(deltas(ours.path), wanted) < 5e-4
    infos, _ = lora_file.inspect(ours.path)
    assert {i.rank: i.nu for i in infos} == {12: pytest.approx(0.2), 16: None, 0: None}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_precision(tmp_path: Path, dtype: torch.dtype):
    wanted = made(tmp_path / "a", 16.0, dtype=dtype)
    assert relative(deltas(tmp_path / "a"), wanted) < 1e-6


def test_a_stock_reader_gets_them_wrong(tmp_path: Path):
    """Or nothing of this would be needed."""
    wanted = made(tmp_path / "a", 16.0)
    state = safetensors.torch.load_file(tmp_path / "a")
    assert relative({key: toy.stored_delta(state, key) for key in wanted}, wanted) > 0.5


@pytest.mark.parametrize("nu", [torch.tensor(-1e3), torch.ones(3), torch.ones(0)])
def test_importances_that_are_none(tmp_path: Path, nu: Tensor):
    path = tmp_path / "a.safetensors"
    made(path, 16.0)
    state = safetensors.torch.load_file(path)
    key = next(key for key in state if key.endswith("lora2_nu"))
    safetensors.torch.save_file({**state, key: nu}, path)
    for use in (lambda: LoRACache().open(path, Limits()), lambda: deltas(path)):
        with pytest.raises(LoRAFileError, match=r"is damaged: .* has a lora2_nu that is no usable"):
            use()
