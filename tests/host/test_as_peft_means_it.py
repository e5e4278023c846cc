"""What PEFT and diffusers tell beside the two factors: alpha in the metadata, magnitudes, lora_E.

The values are PEFT's own: the weights of its merged model.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files.header import LoRAFileError
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.recent import LoRACache
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.tests.host.demo import weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NAMES = [
    f"diffusion_model.input_blocks.4.1.transformer_blocks.0.attn{n}.to_{projection}"
    for n in (1, 2)
    for projection in ("q", "k")
]


class _Layers(nn.Module):
    """Some layers of the model under their names, for PEFT to train on."""

    def __init__(self, model: Any):
        super().__init__()
        for name in NAMES:
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            old = model.model.get_submodule(name)
            new = nn.Linear(old.in_features, old.out_features, bias=False)
            new.weight.data.copy_(old.weight)
            parent.add_module(last, new)


def _trained(model: Any, config: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Tensors as PEFT saves them, the weights as it merges them, and its settings."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(_Layers(model), config)
    state = {key: t.clone() for key, t in peft.get_peft_model_state_dict(wrapped).items()}
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    merged = dict(wrapped.merge_and_unload().named_parameters())
    return state, {name: merged[f"{name}.weight"].detach() for name in NAMES}, settings


def _painted_by(model: Any, path: Path, **limits: Any) -> dict[str, Tensor]:
    opened = LoRACache().open(path, Limits(**limits))
    found = weights(comfy_host.apply_lora(model, None, opened, 1.0, 1.0, path.name).model)
    return {name: found[f"{name}.weight"] for name in NAMES}


def _same(model: Any, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To what fp16 leaves of the change."""
    before = weights(model)
    for name in NAMES:
        change = (wanted[name] - before[f"{name}.weight"]).norm()
        assert change > 0 and (got[name] - wanted[name]).norm() < 1e-3 * change


PATTERN = {NAMES[1]: 4, "attn2.to_k": 24}
REGULAR = {r".*attn1\.to_q": 4, r"attn\d\.to_(k|v)": 24, "attn2[.]to_q|none": 2}


@pytest.mark.parametrize("root", ["unet.", "", "base_model.model."])
@pytest.mark.parametrize(
    "more",
    [{}, {"alpha_pattern": PATTERN}, {"alpha_pattern": REGULAR}, {"use_rslora": True}],
)
def test_alpha_in_the_metadata(model: Any, tmp_path: Path, root: str, more: dict[str, Any]):
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=NAMES, init_lora_weights=False, **more
    )
    state, wanted, settings = _trained(model, config)
    told = "" if root.startswith("base") else root
    if root == "unet.":  # and diffusers' blocks

        def renamed(text: str) -> str:
            return text.replace("diffusion_model.input_blocks.4.1.", "down_blocks.1.attentions.0.")

        state = {renamed(key): tensor for key, tensor in state.items()}
        settings = json.loads(renamed(json.dumps(settings)))
    path = tmp_path / "x.safetensors"
    save_file(
        {key.replace("base_model.model.", root): tensor for key, tensor in state.items()},
        path,
        {"lora_adapter_metadata": json.dumps({told + k: v for k, v in settings.items()})},
    )
    _same(model, _painted_by(model, path), wanted)
    _same(model, _painted_by(model, path, max_rank=4), wanted)
    told = inspector.inspect(path).alpha
    if "use_rslora" in more:
        assert told == "counts as 32, by use_rslora over √rank (lora_adapter_metadata)"
    else:
        alphas = {*more.get("alpha_pattern", {}).values()}
        alphas |= set() if alphas == {*REGULAR.values()} else {16}
        assert told == f"{', '.join(map(str, sorted(alphas)))} (lora_adapter_metadata)"
    again, sum_ = tmp_path / "again.safetensors", tmp_path / "sum.safetensors"
    resize_file(path, again, Limits())
    merge_files([(path, 1.0)], sum_, Limits())
    for written in (again, sum_):
        _same(model, _painted_by(model, written), wanted)
        assert "lora_adapter_metadata" not in lora_file.load(written).metadata


@pytest.mark.parametrize(
    "told",
    [
        "[1]", "{", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1e999}',
        '{"unet.lora_alpha": true}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(?=a)b": 2}}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_q": [2]}}', "[" * 100_000,
        '{"unet.lora_alpha": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_read(model: Any, tmp_path: Path, told: str):
    path = tmp_path / "x.safetensors"
    config = peft.LoraConfig(r=4, target_modules=NAMES)
    save_file(_trained(model, config)[0], path, {"lora_adapter_metadata": told})
    for use in (LoRACache().open, partial(resize_file, target=tmp_path / "y.safetensors")):
        with pytest.raises(LoRAFileError, match="lora_adapter_metadata that cannot be read") as no:
            use(path, limits=Limits())
        assert str(no.value).isprintable() and len(str(no.value)) < 500
    assert inspector.inspect(path).alpha == ""


def test_an_alpha_of_its_own_counts(model: Any, tmp_path: Path):
    """What stands beside the factors is newer than what a program has copied."""
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=NAMES, init_lora_weights=False)
    state, wanted, _ = _trained(model, config)
    path = tmp_path / "x.safetensors"
    alphas = {f"base_model.model.{name}.alpha": torch.tensor(4.0) for name in NAMES}
    save_file(state | alphas, path, {"lora_adapter_metadata": '{"unet.lora_alpha": 400}'})
    _same(model, _painted_by(model, path), wanted)


def test_magnitudes_by_every_name_stay(model: Any, tmp_path: Path):
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=NAMES, init_lora_weights=False, use_dora=True
    )
    state = _trained(model, config)[0]
    end = ".lora_magnitude_vector"
    magnitudes = {key.partition(end)[0]: t for key, t in state.items() if end in key}
    assert len(magnitudes) == len(NAMES)
    for number, name in enumerate((end, f"{end}.weight", f"{end}.default.weight")):
        path = tmp_path / f"{number}.safetensors"
        plain = {key: tensor for key, tensor in state.items() if end not in key}
        save_file(plain | {key + name: t for key, t in magnitudes.items()}, path)
        again = tmp_path / f"{number}_again.safetensors"
        told = resize_file(path, again, Limits()).text()
        assert "Left out" not in told
        kept = {k: t for k, t in load_file(again).items() if k.endswith(".dora_scale")}
        assert [t.shape for t in kept.values()] == [(len(t), 1) for t in kept.values()]
        _same(model, _painted_by(model, again), _painted_by(model, path))
        with pytest.raises(LoRAFileError, match="is a DoRA"):
            merge_files([(path, 1.0), (path, 0.5)], tmp_path / "sum.safetensors", Limits())
        assert inspector.inspect(path).kinds == {"dora": len(NAMES)}


def test_an_adalora_is_refused_by_name(model: Any, tmp_path: Path):
    """Its update takes lora_E, and a scale that its file does not hold."""
    config = peft.AdaLoraConfig(
        init_r=6, target_r=4, tinit=1, tfinal=1, total_step=10, target_modules=NAMES
    )
    state = _trained(model, config)[0]
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file({key: t.contiguous() for key, t in state.items()}, path)
    for use in (
        lambda: LoRACache().open(path, Limits()),
        lambda: LoRACache().open(path, Limits(max_rank=1)),
        lambda: resize_file(path, other, Limits(max_rank=1)),
        lambda: merge_files([(path, 1.0)], other, Limits()),
        lambda: lora_file.load(path),
    ):
        with pytest.raises(LoRAFileError, match=r"is an AdaLoRA \(.*lora_E\)"):
            use()
    report = inspector.inspect(path)
    assert report.kinds == {"adalora": len(NAMES)} and "adalora" in report.text()
    assert not other.exists()


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_peft_saves_whole_stays(model: Any, tmp_path: Path, bias: str):
    """``modules_to_save`` and biases are weights themselves: they have no rank, no sum."""
    torch.manual_seed(0)
    layers = _Layers(model)
    layers.add_module("head", nn.Linear(8, 3))
    config = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=NAMES, modules_to_save=["head"], bias=bias,
        init_lora_weights=False,
    )  # fmt: skip
    for name in NAMES[:2]:
        layers.get_submodule(name).bias = nn.Parameter(torch.randn(64))
    found = peft.get_peft_model_state_dict(peft.get_peft_model(layers, config))
    state = {key: tensor.clone() for key, tensor in found.items()}
    whole = {key: tensor for key, tensor in state.items() if "lora_" not in key}
    assert len(whole) == {"none": 2, "lora_only": 4, "all": 6}[bias], sorted(whole)
    path, new = tmp_path / "x.safetensors", tmp_path / "new.safetensors"
    save_file(state, path)
    told = [one for one in inspector.inspect(path).beside if one.kind == "module"]
    assert sum(one.tensors for one in told) == len(whole) and "head" in {one.name for one in told}
    assert "whole module" in resize_file(path, new, Limits(max_rank=2)).text()
    kept, summed = load_file(new), tmp_path / "sum.safetensors"
    merge_files([(path, 0.5), (new, 0.5)], summed, Limits())
    for written in (kept, load_file(summed)):
        assert all(torch.equal(written[key], whole[key]) for key in whole)
    _same(model, _painted_by(model, new), _painted_by(model, path, max_rank=2))
