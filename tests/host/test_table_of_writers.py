"""The table of writers in docs/format.md: every cell is what happens.

Files are as each writer lays them out, under the names that SDXL's layers have with it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.tests.conftest import ROOT
from lora2_pack.tests.host import writers as w
from lora2_pack.tests.host.patched import REFUSALS, loaded, said, worst
from safetensors.torch import load_file, save_file
from torch import Tensor

HEAD = "| what a file holds | Inspect | Load | Resize | Merge |"
WORDS = {"works", "kept", "refused"}
ATTENTION, ALL = w.MATRICES[:4], (*w.MATRICES, *w.KERNELS)
BESIDE = w.Layer(*["text_model.encoder.layers.1.mlp.fc2"] * 2, "te2")  # another file's

Made = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]  # tensors, weights, metadata
Maker = Callable[[Any], Made]


def _of(
    make: w.Make,
    naming: Callable[[w.Layer], str],
    layers: Iterable[w.Layer] = ALL,
    *,
    beside: dict[str, Tensor] | None = None,
    biases: Iterable[w.Layer] = (),
    told: dict[str, str] | None = None,
    **draws: Any,
) -> Maker:
    """One kind on several layers; ``beside``: tensors that change no weight."""

    def made(parts: Any) -> Made:
        state, wanted = dict(beside or {}), {}
        jobs = [(layer, make) for layer in layers] + [(layer, w.bias) for layer in biases]
        for seed, (layer, kind) in enumerate(jobs):
            old = w.of_model(parts, layer, kind is w.bias).detach().double()
            written = kind(w.Draws(seed, **draws), old.shape)
            state |= {
                naming(layer) + end: tensor.contiguous() for end, tensor in written.tensors.items()
            }
            wanted[f"{layer.weight}.{'bias' if written.of_bias else 'weight'}"] = written.new(old)
        return state, wanted, told or {}

    return made


def _both(*makers: Maker) -> Maker:
    """Several in one file."""

    def made(parts: Any) -> Made:
        every = [one(parts) for one in makers]
        return tuple({k: v for m in every for k, v in m[n].items()} for n in range(3))  # type: ignore[return-value]

    return made


def _of_core(parts: Any) -> Made:
    """ComfyUI's TrainLoraNode: factors of matrices, unrolled, and differences of all that is
    flat."""
    return _both(
        _of(w.rolled, w.comfyui, ALL, biases=w.KERNELS, alpha=1.0),
        _of(w.difference, w.comfyui, w.NORMS, biases=w.NORMS[:1]),
    )(parts)


def _of_ours(parts: Any) -> Made:
    """LoRA²'s own."""
    components, wanted = [], {}
    for seed, layer in enumerate(ALL):
        old = w.of_model(parts, layer).detach()
        draws = w.Draws(seed)
        down = draws.some(3, *old.shape[1:])
        up = draws.some(old.shape[0], 3, *(1 for _ in old.shape[2:]))
        components.append(Component(layer.ours, down, up, torch.ones(3), 0.3))
        delta = up.double().flatten(1) @ down.double().flatten(1)
        wanted[f"{layer.weight}.weight"] = old.double() + delta.reshape(old.shape)
    return dict(lora_file.to_state(components)), wanted, {}


def _named(text: str, ends: dict[str, tuple[int, ...]]) -> Maker:
    """Tensors of a kind that is refused, of two layers; ``text``: the first one's name, …q."""
    keys = [(name + end, shape) for name in (text, text.removesuffix("q") + "k")
            for end, shape in ends.items()]  # fmt: skip
    return lambda _: ({key: torch.ones(shape) / 9 for key, shape in keys}, {}, {})


def _without_alpha(draws: w.Draws, shape: torch.Size) -> w.Written:
    """Of a file whose metadata tells the alpha."""
    written = w.lora(draws, shape)
    return w.Written({k: t for k, t in written.tensors.items() if k != ".alpha"}, written.new)


def _metadata(**more: Any) -> dict[str, str]:
    told = {"unet.r": 3, "unet.lora_alpha": 6, **{f"unet.{key}": v for key, v in more.items()}}
    return {"lora_adapter_metadata": json.dumps(told)}


Q = w.MATRICES[0]
WORDS_OF_TEXT = {
    "bundle_emb.sks.string_to_param.clip_l": torch.ones(2, 64),
    "bundle_emb.sks.string_to_param.clip_g": torch.ones(2, 128),
}
LYCORIS = (w.kohya, w.kohya_of_diffusers, w.lycoris)


def _lycoris(*makes: w.Make, layers: Iterable[w.Layer] = ALL) -> list[Maker]:
    return [_of(make, naming, layers) for make in makes for naming in LYCORIS]


FILES: dict[str, list[Maker]] = {
    "LoRA²": [_of_ours],
    "kohya's sd-scripts: LoRA, LoCon": [
        _of(w.lora, w.kohya, (*ALL, *w.TEXTS)), _of(w.lora, w.kohya_of_diffusers, (*ALL, *w.TEXTS)),
        _of(w.lora, w.kohya, ALL, dtype=torch.float16),
    ],
    "kohya's sd-scripts: OFT": [
        _of(make, lambda layer: w.kohya(layer, "oft")) for make in (w.oft, w.bounded_oft)
    ],
    "LyCORIS: LoCon": [
        *_lycoris(w.lora), *_lycoris(w.three_factors, layers=w.KERNELS[:1]),
        _of(w.lora, w.kohya, w.TEXTS),
    ],
    "LyCORIS: LoHa, LoKr, GLoRA": [
        *_lycoris(w.loha, w.lokr, w.whole_lokr, w.lokr_of_products, w.glora),
        *_lycoris(w.loha_with_cores, layers=w.KERNELS[:1]),
    ],
    "LyCORIS: diag-OFT, BOFT": _lycoris(
        w.oft, w.rescaled_oft, w.bounded_oft, w.boft, w.bounded_boft
    ),
    "LyCORIS: full, norms": [
        *(_of(w.difference, naming, ALL, biases=w.KERNELS) for naming in LYCORIS),
        _both(_of(w.norm, w.kohya, w.NORMS[:1]), _of(w.difference, w.kohya, w.TEXTS)),
    ],
    "LyCORIS: (IA)³": [_named("lora_unet_" + Q.ours.replace(".", "_"), {
        ".weight": (64, 1), ".on_input": (),
    })],
    "LyCORIS, OneTrainer: DoRA": [
        *_lycoris(w.dora, w.dora_by_input), _of(w.dora, w.dotted), _of(w.dora_by_input, w.dotted),
    ],
    "diffusers, its old processors": [
        _of(w.lora, w.processors, ATTENTION, ends=w.OLD, alpha=None),
        _of(w.lora, lambda layer: w.processors(layer).removeprefix("unet."), ATTENTION,
            ends=w.OLD, alpha=None),
        _of(w.lora, w.diffusers, w.TEXTS, ends=w.LINEAR, alpha=None),
    ],
    "diffusers with PEFT, SimpleTuner": [
        _of(w.lora, w.diffusers, (*ALL, *w.TEXTS), ends=w.PEFT, alpha=None),
        _of(w.lora, w.diffusers, ALL, ends=w.LOOSE, alpha=None),
        _of(w.lora, w.lycoris, ALL),
    ],
    "diffusers with PEFT: alpha in its metadata": [
        _of(_without_alpha, w.diffusers, ALL, told=_metadata(), ends=w.PEFT, alpha=6.0),
    ],
    "diffusers with PEFT: DoRA": [
        _of(w.peft_dora, w.diffusers, (*ALL, *w.TEXTS), ends=w.PEFT, alpha=None),
        _of(w.peft_dora, w.diffusers, ALL, ends=w.LOOSE, alpha=None),
    ],
    "PEFT: LoRA": [
        _of(w.lora, w.peft, ALL, ends=w.PEFT, alpha=None),
        _of(w.lora, w.peft, ALL, ends=w.NAMED, alpha=None),
        _of(w.lora, lambda layer: "base_model.model." + w.comfyui(layer), ALL, ends=w.PEFT,
            alpha=None),
    ],
    "PEFT: DoRA": [_of(w.peft_dora, w.peft, ALL, ends=w.PEFT, alpha=None)],
    "PEFT: AdaLoRA": [_named(f"base_model.model.{Q.diffusers}", {
        ".lora_A": (3, 64), ".lora_B": (64, 3), ".lora_E": (3, 1),
    })],
    "PEFT: (IA)³": [_named(f"base_model.model.{Q.diffusers}", {".ia3_l": (64, 1)})],
    "PEFT, OneTrainer: OFT; PEFT: VeRA, …": [
        _named(f"base_model.model.{Q.diffusers}", {".vera_lambda_d": (3,)}),
        _named(f"base_model.model.{Q.diffusers}", {".oft_R.weight": (8, 28)}),
        _named(f"base_model.model.{Q.diffusers}", {".boft_R": (1, 8, 8, 8), ".boft_s": (64, 1)}),
        _named("lora_unet_" + Q.diffusers.replace(".", "_"), {".oft_R.weight": (8, 28)}),
    ],
    "OneTrainer": [
        _of(w.lora, naming, (*ALL, *w.TEXTS)) for naming in (w.kohya_of_diffusers, w.dotted)
    ],
    "OneTrainer: with embeddings": [_of(w.lora, w.dotted, ALL, beside=WORDS_OF_TEXT)],
    "ai-toolkit": [_of(w.lora, w.kohya_of_diffusers, (*ALL, *w.TEXTS), dtype=torch.float16)],
    "ComfyUI's trainer: LoRA, with norms and biases": [_of_core],
    "ComfyUI's trainer: LoHa, LoKr, OFT": [
        _of(make, w.comfyui, ALL, alpha=1.0) for make in (w.loha, w.lokr, w.own_oft)
    ],
    "musubi (Wan, …)": [_named("lora_unet_blocks_0_self_attn_q", {
        ".lora_down.weight": (3, 64), ".lora_up.weight": (64, 3), ".alpha": (),
    })],
    "B-LoRA": [
        _of(w.lora, w.diffusers, w.B_LORA, ends=ends, alpha=None) for ends in (w.LOOSE, w.PEFT)
    ],
}  # fmt: skip


def _table() -> dict[str, list[str]]:
    """Cells of the page, by the first of each row."""
    lines = iter((ROOT / "docs" / "format.md").read_text(encoding="utf-8").splitlines())
    rows = itertools.takewhile(lambda line: line.startswith("|"),
                               itertools.dropwhile(lambda line: line != HEAD, lines))  # fmt: skip
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][2:]
    return {first: rest for first, *rest in cells}


TABLE = _table()


def test_every_row_has_files_and_words_that_are_explained():
    assert TABLE.keys() == FILES.keys()
    assert {cell for row in TABLE.values() for cell in row} == WORDS


def _happens(deed: Callable[[], Any]) -> Any:
    """What a deed gives, or None where it is refused in a sentence."""
    try:
        return deed()
    except REFUSALS as refusal:
        assert said(refusal)
        return None


@pytest.mark.parametrize("row", FILES)
def test_every_cell(parts: Any, tmp_path: Path, caplog: Any, row: str):
    cells = dict(zip(("inspect", "load", "resize", "merge"), TABLE[row], strict=True))
    path, new = tmp_path / "x.safetensors", tmp_path / "new.safetensors"
    other, both = tmp_path / "other.safetensors", tmp_path / "both.safetensors"
    plain, more, _ = _of(w.lora, w.kohya, [BESIDE])(parts)
    save_file(plain, other)
    for make in FILES[row]:
        state, wanted, told = make(parts)
        save_file(state, path, told)
        save_file(state | plain, both, told)
        report = _happens(lambda: inspector.inspect(path).text())
        assert (report is not None) == (cells["inspect"] == "works")
        found = _happens(lambda: loaded(parts, path, caplog))
        assert (found is not None) == (cells["load"] == "works")
        if found is not None:
            assert worst(parts, found[0], wanted)[0] < (
                6e-4 if row == "LoRA²" else 2e-4
            )  # its fp16
            assert bool(found[1]) == any(key.startswith("bundle_emb") for key in state)
        else:
            wanted = {}
        _check_resized(parts, caplog, cells["resize"], (path, both, new), (wanted, wanted | more))
        _check_added(parts, caplog, cells["merge"], (path, other, new), (wanted, more))


def _check_resized(parts, caplog, word, paths, weights) -> None:
    path, both, new = paths
    alone, beside = weights
    done = _happens(lambda: resize_file(path, new, Limits()))
    assert (done is not None) == (word == "works")
    if word == "kept":
        resize_file(both, new, Limits(max_rank=1))
        had, kept = load_file(both), load_file(new)
        own = [key for key in had if not key.startswith(w.kohya(BESIDE))]
        assert own and all(torch.equal(had[key], kept[key]) for key in own)
        resize_file(both, new, Limits())
        assert worst(parts, loaded(parts, new, caplog)[0], beside)[0] < 1e-3
    if word == "works":
        if alone:
            assert worst(parts, loaded(parts, new, caplog)[0], alone)[0] < 1e-3
        resize_file(path, new, Limits(max_rank=1))
        assert {one.rank for one in inspector.inspect(new).components if one.ranked} == {1}


def _check_added(parts, caplog, word, paths, weights) -> None:
    path, other, new = paths
    new.unlink(missing_ok=True)
    wanted, more = weights
    done = _happens(lambda: merge_files([(path, 0.25), (other, 1.0), (path, 0.75)], new, Limits()))
    assert (done is not None) == (word == "works") == new.exists()
    if done is not None and wanted:
        assert worst(parts, loaded(parts, new, caplog)[0], wanted | more)[0] < 1e-3
