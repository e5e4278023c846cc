"""Any mix of kinds, names and sizes in a file: a model gets what the writers' own mathematics says,
a file written anew does the same again, and nothing goes missing in silence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.tests.host import writers
from lora2_pack.tests.host.patched import REFUSALS, loaded, said, worst
from lora2_pack.tests.host.writers import Draws, Layer
from safetensors.torch import save_file
from torch import Tensor

EXAMPLES = int(os.environ.get("LORA2_TRIES", "2000")) // 25
MOST = {torch.float32: 1e-4, torch.float16: 1e-4}  # of a load; what is written anew is fp16

OF_MATRICES: dict[str, writers.Make] = {
    "lora": writers.lora, "dora": writers.dora, "peft_dora": writers.peft_dora,
    "dora_of_loha": writers.dora_of_loha, "dora_of_lokr": writers.dora_of_lokr,
    "dora_by_input": writers.dora_by_input, "loha": writers.loha, "lokr": writers.lokr,
    "lokr_of_products": writers.lokr_of_products, "whole_lokr": writers.whole_lokr,
    "glora": writers.glora, "oft": writers.oft, "rescaled_oft": writers.rescaled_oft,
    "bounded_oft": writers.bounded_oft, "boft": writers.boft, "bounded_boft": writers.bounded_boft,
    "difference": writers.difference, "set_weight": writers.set_weight,
}  # fmt: skip
OF_KERNELS = OF_MATRICES | {
    "three_factors": writers.three_factors, "loha_with_cores": writers.loha_with_cores,
    "rolled": writers.rolled,
}  # fmt: skip
FLAT: dict[str, writers.Make] = {
    "norm": writers.norm, "difference": writers.difference, "set_weight": writers.set_weight,
}  # fmt: skip
NAMINGS = (
    writers.kohya, writers.kohya_of_diffusers, writers.dotted, writers.diffusers, writers.comfyui,
    writers.lycoris, writers.peft,
)  # fmt: skip
PAIRS = (writers.KOHYA, writers.PEFT, writers.NAMED, writers.LOOSE, writers.LINEAR, writers.OLD)
OF_PAIRS = ("lora", "dora", "peft_dora", "dora_by_input", "rolled")
LAYERS = (*writers.MATRICES, *writers.KERNELS, *writers.NORMS, *writers.TEXTS)


@st.composite
def components(draw: Any, layers: tuple[Layer, ...] = LAYERS) -> tuple[Layer, str, Any, Draws]:
    """Layer, kind, naming, and the numbers; kinds that no writer has for such a layer are left."""
    layer = draw(st.sampled_from(layers))
    kinds = FLAT if layer in writers.NORMS else OF_MATRICES
    if layer.ours.endswith("in_layers.2"):
        kinds = OF_KERNELS
    some = draw(st.booleans())  # half of all components are plain
    kind = "lora" if some and "lora" in kinds else draw(st.sampled_from(sorted(kinds)))
    naming = draw(st.sampled_from(NAMINGS if layer.root == "unet" else NAMINGS[:5]))
    ends = draw(st.sampled_from(PAIRS)) if kind in OF_PAIRS else writers.KOHYA
    draws = Draws(
        seed=draw(st.integers(0, 1000)),
        rank=draw(st.sampled_from((1, 2, 3, 7, 70))) if kind == "lora" else draw(st.integers(1, 5)),
        alpha=draw(st.sampled_from((None, 1.0, 2.0, 0.5, -3.0, 64.0, 0.0))),
        dtype=draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        ends=ends,
    )
    return layer, kind, naming, draws


EXTRAS: dict[str, tuple[str, Tensor]] = {
    "sks": ("bundle_emb.sks.string_to_param.*", torch.ones(2, 8)),
    "strange": ("strange.thing", torch.ones(3)),
    "lora_C": ("{}.lora_C", torch.ones(3)),
    "vera": ("{}.vera_lambda_d", torch.ones(3)),
    "scalar": ("{}.scalar", torch.ones(1)),
    "bm": ("{}.bm.weight", torch.ones(2, 2, 3, 3)),
    "bias_values": ("{}.bias_values", torch.ones(3)),
    "input_blocks_99": ("lora_unet_input_blocks_99_1_proj_in.diff", torch.ones(64, 64)),
}


def _make(parts: Any, found: list, biases: list, extras: list) -> tuple[Any, Any, bool]:
    """Tensors, the weights they make, and whether one weight is changed twice."""
    state: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    twice = False
    for layer, kind, naming, draws in (*found, *biases):
        weight = writers.of_model(parts, layer, kind == "bias").detach().double()
        make = writers.bias if kind == "bias" else (OF_KERNELS | FLAT)[kind]
        if "bounded" in kind and naming is writers.comfyui:  # whose constraint is another
            make = writers.own_oft
        written = make(draws, weight.shape)
        key = f"{layer.weight}.{'bias' if written.of_bias else 'weight'}"
        new = {naming(layer) + end: tensor for end, tensor in written.tensors.items()}
        if new.keys() & state.keys():
            continue
        twice = twice or key in wanted
        state |= {name: tensor.clone() for name, tensor in new.items()}
        wanted[key] = written.new(weight)
    for name in extras:
        key, tensor = EXTRAS[name]
        state[key.format(found[0][2](found[0][0]))] = tensor
    return state, wanted, twice


WITH_BIAS = tuple(
    layer
    for layer in (*writers.KERNELS, *writers.NORMS, *writers.TEXTS)
    if not layer.ours.endswith("attn1")
)


@settings(
    deadline=None, max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    found=st.lists(components(), min_size=1, max_size=4),
    biases=st.lists(
        st.tuples(
            st.sampled_from(WITH_BIAS),
            st.just("bias"),
            st.sampled_from(NAMINGS[:5]),
            st.builds(Draws, seed=st.integers(0, 99)),
        ),
        max_size=1,
    ),
    extras=st.lists(st.sampled_from(sorted(EXTRAS)), max_size=1),
)
def test_nothing_goes_wrong_in_silence(parts, tmp_path_factory, caplog, found, biases, extras):
    folder: Path = tmp_path_factory.getbasetemp()
    path, new = folder / "any.safetensors", folder / "any_new.safetensors"
    new.unlink(missing_ok=True)
    state, wanted, twice = _make(parts, found, biases, extras)
    save_file(state, path)
    try:
        report = inspector.inspect(path)
    except REFUSALS as refusal:
        assert said(refusal)
        report = None
    told = "" if report is None else str(report.as_dict()) + report.text()
    try:
        got, note = loaded(parts, path, caplog)
    except REFUSALS as refusal:
        assert said(refusal)
        got, note = None, ""
    if got is not None:
        assert not twice, "one weight is changed twice"
        off, where = worst(parts, got, wanted)
        assert off < 2e-4, (off, where)
        for name in extras:
            assert name in told, (name, "is not told")
            assert note, (name, "is left out in silence")
    for write in (
        lambda: resize_file(path, new, Limits()),
        lambda: merge_files([(path, 1.0)], new, Limits()),
    ):
        new.unlink(missing_ok=True)
        try:
            text = write().text()
        except REFUSALS as refusal:
            assert said(refusal) and not new.exists()
            continue
        for name in extras:
            kept = EXTRAS[name][0].format(found[0][2](found[0][0]))
            assert kept in inspector_keys(new) or name in text, (name, text)
        try:
            again, _ = loaded(parts, new, caplog)
        except REFUSALS as refusal:
            nothing = worst(parts, {}, wanted)[0] == 0  # is left of components that add nothing
            assert got is None or nothing, (said(refusal), "but what it was made of is loaded")
        else:
            if got is None:  # a component that adds nothing is gone, and with it what was unsure
                assert twice and any(draws.alpha == 0 for *_, draws in found)
                continue
            off, where = worst(parts, again, wanted)
            assert off < 1e-3, (off, where)


def inspector_keys(path: Path) -> set[str]:
    """Keys of a file's tensors."""
    from lora2_pack.lora2_core.files.header import read_header

    return set(read_header(path).entries)


@pytest.mark.parametrize("kind", sorted(OF_KERNELS | FLAT))
def test_each_kind_alone(parts: Any, tmp_path: Path, caplog: Any, kind: str):
    path = tmp_path / "x.safetensors"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for layer in LAYERS:
            kinds = FLAT if layer in writers.NORMS else OF_MATRICES
            if kind not in (OF_KERNELS if layer.ours.endswith("in_layers.2") else kinds):
                continue
            state, wanted, _ = _make(parts, [(layer, kind, writers.kohya, Draws(dtype=dtype))],
                                     [], [])  # fmt: skip
            save_file(state, path)
            got, note = loaded(parts, path, caplog)
            off, where = worst(parts, got, wanted)
            assert off < 2e-4 and note == "", (off, where, note)


@pytest.mark.parametrize("kind", sorted(OF_MATRICES.keys() - {"set_weight"}))
def test_half_of_the_strength_goes_half_of_the_way(parts, tmp_path, caplog, kind):
    path, layer = tmp_path / "x.safetensors", writers.MATRICES[0]
    state, wanted, _ = _make(parts, [(layer, kind, writers.kohya, Draws())], [], [])
    save_file(state, path)
    before = writers.of_model(parts, layer).detach().double()
    halves = {key: before + 0.5 * (new - before) for key, new in wanted.items()}
    assert worst(parts, loaded(parts, path, caplog, 0.5)[0], halves)[0] < 2e-4


BLOCK = "lora_unet_input_blocks_4_1_transformer_blocks_0"
BIAS = "lora_unet_input_blocks_4_0_in_layers_2"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({f"{BIAS}.b_norm": (64,)}, "b_norm"),  # of which ComfyUI reads none without its weight
        ({f"{BLOCK}_attn1_to_q.diff_b": (64,)}, "diff_b"),  # which has no bias
        ({f"{BIAS}.rescale": (64, 1, 1, 1)}, "rescale"),
        ({f"{BIAS}.oft_diag": (64,)}, "oft_diag"),
        ({f"{BIAS}.diff_b": (64,), f"{BIAS}.b_norm": (64,)}, "bias twice"),
        ({f"{BIAS}.diff": (64, 32, 3, 3), f"{BIAS}.w_norm": (64, 32, 3, 3)}, "weight twice"),
        ({f"{BIAS}.diff": (64, 32, 3, 3), f"{BIAS}.set_weight": (64, 32, 3, 3)}, "weight twice"),
        (
            {f"{name}{end}": shape
             for name in ("base_model.model.diffusion_model.{}", f"{BLOCK}_attn1_to_q")
             for end, shape in ((".lora_A.weight", (2, 64)), (".lora_B.weight", (64, 2)))},
            "layer twice",
        ),
    ],
)  # fmt: skip
def test_what_a_loader_would_leave_out_in_silence(parts, tmp_path, caplog, more, named):
    path, layer = tmp_path / "x.safetensors", writers.MATRICES[1]
    state = {
        key.format(writers.MATRICES[0].ours): torch.ones(shape) / 9 for key, shape in more.items()
    }
    plain, wanted, _ = _make(parts, [(layer, "lora", writers.kohya, Draws())], [], [])
    save_file(state | plain, path)
    try:
        got, note = loaded(parts, path, caplog)
    except REFUSALS as refusal:
        assert "twice" in named and named in said(refusal)
    else:
        assert worst(parts, got, wanted)[0] < 1e-4 and "twice" not in named and named in note
