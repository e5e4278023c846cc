"""Tensors that no training leaves: of rank 0, without numbers, of one number, zero everywhere, with
an alpha that is no number. Each ends in a result or in one sentence, whatever is done with it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files.header import LoRAFileError
from lora2_pack.lora2_core.reports import comparison, inspector
from lora2_pack.lora2_core.resizing.recent import LoRACache
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.tests.host.demo import weights
from safetensors.torch import load_file, save_file
from torch import Tensor

KEY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"  # 64 → 64
NORM = "lora_unet_input_blocks_4_1_norm"  # 64
OTHER = KEY.replace("to_q", "to_k")
State = dict[str, Tensor]


def _pair(
    rank: int, key: str = KEY, fill: Callable[..., Tensor] = torch.zeros, alpha: Any = None
) -> State:
    state = {f"{key}.lora_down.weight": fill(rank, 64), f"{key}.lora_up.weight": fill(64, rank)}
    return state if alpha is None else state | {f"{key}.alpha": torch.tensor(alpha)}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 8


def _mid(rank: int) -> State:
    key = "lora_unet_input_blocks_4_0_in_layers_2"
    return {
        f"{key}.lora_down.weight": _random(rank, 32, 1, 1),
        f"{key}.lora_up.weight": _random(64, rank, 1, 1),
        f"{key}.lora_mid.weight": _random(rank, rank, 3, 3),
        f"{key}.alpha": torch.tensor(2.0),
    }


CASES: dict[str, State] = {
    "rank 0": _pair(0),
    "rank 0 with alpha": _pair(0, alpha=4.0),
    "rank 0, alpha infinite": _pair(0, alpha=float("inf")),
    "rank 0, three factors": _mid(0),
    "rank 0 of a DoRA": _pair(0, alpha=1.0) | {f"{KEY}.dora_scale": torch.ones(64, 1)},
    "rank 0 of LyCORIS' fork": _pair(0, alpha=1.0) | {f"{KEY}.lora2_nu": torch.tensor([0.3])},
    "zero": _pair(4, alpha=4.0),
    "zero on one side": _pair(4, alpha=4.0) | {f"{KEY}.lora_down.weight": _random(4, 64)},
    "zero, of a DoRA": _pair(4, alpha=1.0) | {f"{KEY}.dora_scale": torch.ones(64, 1)},
    "zero, of a PEFT's DoRA": {
        f"base_model.model.{KEY}.lora_A.weight": _random(4, 64),
        f"base_model.model.{KEY}.lora_B.weight": torch.zeros(64, 4),
        f"base_model.model.{KEY}.lora_magnitude_vector": torch.ones(64),
    },
    "alpha 0": _pair(4, fill=_random, alpha=0.0),
    "alpha below 0": _pair(4, fill=_random, alpha=-4.0),
    "alpha infinite": _pair(4, fill=_random, alpha=float("inf")),
    "alpha no number": _pair(4, fill=_random, alpha=float("nan")),
    "alpha infinite, of nothing": _pair(4, fill=_random)
    | {"lora_unet_nothing.alpha": torch.tensor(float("inf"))},
    "alpha as a list": _pair(4, fill=_random) | {f"{KEY}.alpha": torch.tensor([4.0])},
    "alpha whole": _pair(4, fill=_random, alpha=4),
    "rank 1": _pair(1, fill=_random),
    "width 1": {f"{KEY}.lora_down.weight": _random(1, 1), f"{KEY}.lora_up.weight": _random(1, 1)},
    "no inputs": {f"{KEY}.lora_down.weight": _random(2, 0), f"{KEY}.lora_up.weight": _random(4, 2)},
    "no outputs": {
        f"{KEY}.lora_down.weight": _random(2, 4), f"{KEY}.lora_up.weight": _random(0, 2)
    },
    "scalars": {f"{KEY}.lora_down.weight": _random(), f"{KEY}.lora_up.weight": _random()},
    "in a row": {f"{KEY}.lora_down.weight": _random(4), f"{KEY}.lora_up.weight": _random(4)},
    "smallest numbers": _pair(2, fill=lambda *shape: torch.full(shape, 1e-30), alpha=2.0),
    "no difference": {f"{NORM}.diff": torch.zeros(64)},
    "a difference of no numbers": {f"{NORM}.diff": torch.zeros(0)},
    "a bias of no numbers": {f"{NORM}.diff_b": torch.zeros(0)},
    "a norm of no numbers": {f"{NORM}.w_norm": torch.zeros(0), f"{NORM}.b_norm": torch.zeros(0)},
    "a difference of one number": {f"{NORM}.diff": torch.tensor(0.5)},
    "LoHa of rank 0": {
        f"{KEY}.hada_w1_a": _random(64, 0), f"{KEY}.hada_w1_b": _random(0, 64),
        f"{KEY}.hada_w2_a": _random(64, 0), f"{KEY}.hada_w2_b": _random(0, 64),
        f"{KEY}.alpha": torch.tensor(1.0),
    },
    "LoKr of rank 0": {
        f"{KEY}.lokr_w1": _random(8, 8), f"{KEY}.lokr_w2_a": _random(8, 0),
        f"{KEY}.lokr_w2_b": _random(0, 8), f"{KEY}.alpha": torch.tensor(1.0),
    },
    "LoKr, whole, alpha infinite": {
        f"{KEY}.lokr_w1": _random(8, 8), f"{KEY}.lokr_w2": _random(8, 8),
        f"{KEY}.alpha": torch.tensor(float("inf")),
    },
    "a difference, alpha infinite": {
        f"{NORM}.diff": _random(64), f"{NORM}.alpha": torch.tensor(float("inf"))
    },
    "LoKr of no numbers": {f"{KEY}.lokr_w1": _random(0, 0), f"{KEY}.lokr_w2": _random(8, 8)},
    "GLoRA of rank 0": {
        f"{KEY}.a1.weight": _random(64, 0), f"{KEY}.a2.weight": _random(0, 64),
        f"{KEY}.b1.weight": _random(64, 0), f"{KEY}.b2.weight": _random(0, 64),
    },
    "OFT of no numbers": {f"{KEY}.oft_blocks": _random(0, 4, 4)},
    "OFT of blocks of nothing": {f"{KEY}.oft_blocks": _random(4, 0, 0)},
    "an embedding of no words": _pair(4, fill=_random) | {"bundle_emb.cat.clip_l": _random(0, 64)},
    "something of no numbers": _pair(4, fill=_random) | {"else": torch.zeros(0, 3)},
}  # fmt: skip
WITH_ANOTHER = {"alone": {}, "beside a sound one": _pair(4, key=OTHER, fill=_random, alpha=4.0)}
LIMITS = [
    Limits(), Limits(max_rank=2), Limits(energy=0.9, order="learnt"), Limits(megabytes=0.01),
]  # fmt: skip


def _tried(deed: Callable[[], Any]) -> str:
    """What is said; empty where all went well. Nothing but a sentence is raised."""
    try:
        deed()
    except (LoRAFileError, comfy_host.HostError) as error:
        said = str(error)
        assert said.isprintable() and said.endswith((".", ".)")) and len(said) < 600
        return said
    return ""


@pytest.mark.parametrize("beside", WITH_ANOTHER)
@pytest.mark.parametrize("case", CASES)
def test_every_deed_ends_well(model: Any, tmp_path: Path, case: str, beside: str):
    state = CASES[case] | WITH_ANOTHER[beside]
    path, sound = tmp_path / "x.safetensors", tmp_path / "sound.safetensors"
    new = tmp_path / "new.safetensors"
    save_file(state, path)
    save_file(_pair(3, fill=_random, key=OTHER), sound)
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        def look(measure: bool) -> None:
            report = inspector.inspect(path, measure)
            assert report.text() and report.as_dict()
            empty = report.measured is not None and report.measured.norm == 0
            assert not empty or "could be cut" not in report.text()
            inspector.side_by_side([report] * 2)
            if measure or beside != "alone":
                return
            assert report.picture()
            comparison.compare([comparison.Shown("x", report.components, 9)] * 2)

        refused = _tried(lambda: look(False))
        assert bool(_tried(lambda: look(True))) == bool(refused)
        for limits in LIMITS if beside == "alone" else LIMITS[1:3]:
            for write in (
                lambda at=limits: resize_file(path, new, at),
                lambda at=limits: merge_files([(path, 1.0), (sound, 0.5)], new, at),
                lambda at=limits: merge_files([(path, -1.0)], new, at),
            ):
                said = _tried(write)
                assert new.exists() != bool(said)
                if not said:
                    assert not _tried(lambda: inspector.inspect(new).text())
                    _tried(lambda: _apply(model, new, Limits()))
                    new.unlink()
                assert not refused or said
            _tried(lambda at=limits: _apply(model, path, at))


def _apply(model: Any, path: Path, limits: Limits) -> Any:
    file = LoRACache().open(path, limits)
    return comfy_host.apply_lora(model, None, file, 1.0, 1.0, path.name).model


SAID = {
    "rank 0": "changes nothing: every component has rank 0",
    "rank 0 with alpha": "changes nothing: every component has rank 0",
    "rank 0, three factors": "changes nothing: every component has rank 0",
    "alpha infinite": "alpha holds weights that are not finite",
    "alpha no number": "alpha holds weights that are not finite",
    "no inputs": "has a tensor without numbers (2×0)",
    "no outputs": "has a tensor without numbers (0×2)",
    "scalars": "do not fit together (a single number and a single number)",
    "in a row": "do not fit together (4 and 4)",
    "a difference of no numbers": "has a tensor without numbers (0)",
    "OFT of no numbers": "has a tensor without numbers (0×4×4)",
    "width 1": "made for another architecture than this model",
}


@pytest.mark.parametrize("case", SAID)
def test_the_sentence_is_the_right_one(model: Any, tmp_path: Path, case: str):
    path = tmp_path / "x.safetensors"
    save_file(CASES[case], path)
    assert SAID[case] in _tried(lambda: _apply(model, path, Limits()))
    assert SAID[case] in _tried(lambda: _apply(model, path, Limits(max_rank=2)))


@pytest.mark.parametrize("rank0", ["rank 0", "rank 0 with alpha", "rank 0, alpha infinite", "zero"])
def test_a_layer_of_nothing_changes_nothing(model: Any, tmp_path: Path, rank0: str):
    """What is beside it does: as the stock loader reads that alone."""
    path, new = tmp_path / "x.safetensors", tmp_path / "new.safetensors"
    sound = _pair(4, key=OTHER, fill=_random, alpha=2.0)
    save_file(CASES[rank0] | sound, path)
    stock, _ = comfy.sd.load_lora_for_models(model, None, dict(sound), 1.0, 0)
    wanted, plain = weights(stock), weights(model)
    one = "diffusion_model." + "input_blocks.4.1.transformer_blocks.0.attn1.to_k.weight"
    change = float((wanted[one] - plain[one]).norm())
    resize_file(path, new, Limits())
    assert not any(key.startswith(KEY) for key in load_file(new))
    for got in (_apply(model, path, Limits()), _apply(model, new, Limits(max_rank=4))):
        found = weights(got)
        assert float((found[one] - wanted[one]).norm()) < 1e-3 * change
        others = itertools.filterfalse(lambda key: key == one, wanted)
        assert all(torch.equal(found[key], wanted[key]) for key in others)


@pytest.mark.parametrize(
    "case",
    ["LoKr, whole, alpha infinite", "a difference, alpha infinite", "alpha infinite, of nothing"],
)
def test_an_alpha_that_scales_nothing_may_be_anything(model: Any, tmp_path: Path, case: str):
    """As the stock loader has it; a smaller file keeps it so."""
    path, new = tmp_path / "x.safetensors", tmp_path / "new.safetensors"
    state = CASES[case] | _pair(4, key=OTHER, fill=_random, alpha=2.0)
    save_file(state, path)
    stock, _ = comfy.sd.load_lora_for_models(model, None, dict(state), 1.0, 0)
    wanted = weights(stock)
    assert inspector.inspect(path, True).as_dict()["measured"] is not None
    resize_file(path, new, Limits(max_rank=64))
    for file in (path, new):
        found = weights(_apply(model, file, Limits(max_rank=64)))
        assert all(torch.allclose(found[key], wanted[key], atol=1e-3) for key in wanted)


@pytest.mark.parametrize("case", ["zero, of a DoRA", "zero, of a PEFT's DoRA"])
def test_magnitudes_count_where_factors_are_zero(model: Any, tmp_path: Path, case: str):
    path, new = tmp_path / "x.safetensors", tmp_path / "new.safetensors"
    save_file(CASES[case] | _pair(4, key=OTHER, fill=_random, alpha=2.0), path)
    name = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    plain = weights(model)[name]
    wanted = plain / plain.norm(dim=1, keepdim=True)  # every row as long as its magnitude, 1
    assert "1 DoRA of magnitudes alone" in resize_file(path, new, Limits(max_rank=2)).text()
    for file, limits in ((path, Limits()), (path, Limits(max_rank=2)), (new, Limits())):
        found = weights(_apply(model, file, limits))[name]
        assert torch.allclose(found, wanted, atol=1e-5)
