"""What lies beside the factors of a file: a smaller one keeps it, a sum adds what can be added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files.keys import parse_keys
from lora2_pack.lora2_core.lora_file import LoRAFileError, inspect
from lora2_pack.lora2_core.lora_file import save as save_as_ours
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.measure import measure_file
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.tests.core import toy
from lora2_pack.tests.core.resizing.test_shrink import PREFIX, pair, patch, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

torch.set_num_threads(1)

NORM, LINEAR = "lora_unet_input_blocks_4_1_norm", f"{PREFIX}out_0"


def _some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# By what a trainer or a person calls it, and what is said of it.
KEPT: dict[str, tuple[dict[str, Tensor], str]] = {
    "LyCORIS' norms": (
        {f"{NORM}.w_norm": _some(64), f"{NORM}.b_norm": _some(64, seed=1)}, "1 norm"
    ),
    "a bias beside its own factors": ({f"{PREFIX}q.diff_b": _some(80)}, "1 difference"),
    "TrainLoraNode's": (
        {"diffusion_model.x.norm.diff": _some(64), "diffusion_model.x.norm.diff_b": _some(64)},
        "1 difference",
    ),
    "a whole difference": ({f"{LINEAR}.diff": _some(80, 64)}, "1 difference"),
    "a weight that is set": ({"lora_unet_scale.set_weight": _some(8)}, "1 set weight"),
    "kohya's embedding": (
        {"bundle_emb.sks cat.clip_l": _some(2, 64), "bundle_emb.sks cat.clip_g": _some(2, 128)},
        "1 embedding (sks cat)",
    ),
    "A1111's embedding": (
        {"bundle_emb.s.k.s.string_to_param.*": _some(2, 64)}, "1 embedding (s.k.s)"
    ),
    "diffusers' embedding": ({"clip_l": _some(2, 64), "clip_g": _some(2, 128)}, "1 embedding."),
    "modules_to_save": (
        {"base_model.model.conv_in.weight": _some(8, 4, 3, 3),
         "base_model.model.conv_in.bias": _some(8), "unet.proj.modules_to_save.weight": _some(4)},
        "2 whole modules (conv_in, unet.proj)",
    ),
    "a bias that PEFT trained": ({f"{PREFIX}q.bias": _some(80)}, f"1 whole module ({PREFIX}q)"),
    "LoHa": (
        {f"{LINEAR}.hada_w{n}_{side}": _some(64, 64, seed=n) for n in (1, 2) for side in "ab"},
        "1 LoHa",
    ),
    "LoKr": ({f"{LINEAR}.lokr_w1": _some(8, 8), f"{LINEAR}.lokr_w2": _some(8, 8)}, "1 LoKr"),
    "GLoRA": (
        {f"{LINEAR}.{end}.weight": _some(8, 8) for end in ("a1", "a2", "b1", "b2")}, "1 GLoRA"
    ),
    "OFT": ({f"{LINEAR}.oft_blocks": _some(4, 6, 6)}, "1 OFT"),
    "IA³": (
        {f"{LINEAR}.weight": _some(24), f"{LINEAR}.on_input": torch.tensor(True)}, "1 IA³"
    ),
    "what nobody knows": ({"note": torch.arange(5)}, "1 unknown tensor"),
    "nothing, in eight bits": (
        {f"{NORM}.diff": _some(64).to(torch.float8_e4m3fn), "empty": torch.zeros(0, 3)},
        "1 difference, 1 unknown tensor",
    ),
}  # fmt: skip


def _bytes(path: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    found = load_file(path)
    return {
        key: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for key, t in found.items()
    }


@pytest.mark.parametrize("case", KEPT)
def test_a_smaller_file_keeps_it_bit_by_bit(tmp_path: Path, case: str):
    extra, said = KEPT[case]
    source = save(tmp_path / "a.safetensors", pair("q", 8) | pair("k", 6, seed=1) | extra)
    found = resize_file(source, tmp_path / "b.safetensors", Limits(max_rank=2))
    before, after = _bytes(source), _bytes(found.path)
    assert {key: after[key] for key in extra} == {key: before[key] for key in extra}
    assert f"Kept as they are: {said.rstrip('.')}" in found.text() and not found.ignored
    for layer in "qk":  # and cut is what can be cut: to the best there is of rank 2
        left, values, right = torch.linalg.svd(patch(source, f"{PREFIX}{layer}"))
        wanted = (left[:, :2] * values[:2]) @ right[:2]
        got = patch(found.path, f"{PREFIX}{layer}")
        assert (got - wanted).norm() < 1e-3 * wanted.norm()
    assert found.after == found.path.stat().st_size
    told = {info.key: info.rank for info in inspect(found.path)[0] if info.kind == "lora"}
    assert told == {f"{PREFIX}q": 2, f"{PREFIX}k": 2}
    again = resize_file(found.path, tmp_path / "c.safetensors", Limits())
    assert again.path.read_bytes() == found.path.read_bytes()


@pytest.mark.parametrize("case", ["a whole difference", "kohya's embedding", "LoHa"])
def test_it_counts_towards_a_size(tmp_path: Path, case: str):
    extra, _ = KEPT[case]
    own = sum(tensor.nbytes for tensor in extra.values())
    source = save(tmp_path / "a.safetensors", pair("q", 8, 640, 640) | extra)
    for megabytes in (0.0055 + own / 1e6, 0.012 + own / 1e6):
        found = resize_file(source, tmp_path / "b.safetensors", Limits(megabytes=megabytes))
        assert megabytes * 1e6 - 3000 < found.after <= megabytes * 1e6
        assert _bytes(found.path).keys() >= extra.keys()
        found.path.unlink()
    with pytest.raises(
        LoRAFileError,
        match=rf"what has no ranks to cut takes {own / 1e6:.4g} MB and the metadata .* at least",
    ) as told:
        resize_file(
            source, tmp_path / "b.safetensors", Limits(megabytes=max(0.9 * own / 1e6, 1e-3))
        )
    assert not (tmp_path / "b.safetensors").exists()
    least = float(str(told.value).rpartition(" ")[2].rstrip("."))
    assert resize_file(source, tmp_path / "b.safetensors", Limits(megabytes=least)).ranks_after


def test_what_it_could_be_cut_to_counts_it(tmp_path: Path):
    plain = save(tmp_path / "plain.safetensors", pair("q", 4))
    more = save(tmp_path / "more.safetensors", pair("q", 4) | {"clip_l": torch.ones(1000, 64)})
    assert measure_file(more).cut_bytes - measure_file(plain).cut_bytes >= 256_000


@pytest.mark.parametrize(
    "kinds", [["whole"], ["LoHa"], ["OFT"], ["embedding"], ["norms", "modules"]]
)
def test_where_nothing_can_be_cut_it_says_so(tmp_path: Path, kinds: list[str]):
    extra = {key: t for name, (some, _) in KEPT.items() for key, t in some.items()
             if any(kind in name for kind in kinds)}  # fmt: skip
    source = save(tmp_path / "a.safetensors", extra)
    words = (
        "no LoRA but a textual|holds no LoRA" if "embedding" in kinds else "have no ranks to cut"
    )
    with pytest.raises(LoRAFileError, match=words):
        resize_file(source, tmp_path / "b.safetensors", Limits(max_rank=1))


# --- sums -------------------------------------------------------------------------------------

DIFFERENCES = [
    f"{NORM}.w_norm", f"{NORM}.b_norm", "diffusion_model.input_blocks.4.1.norm.diff",
    "diffusion_model.input_blocks.4.1.norm.diff_b", "unet.input_blocks.4.1.norm.diff",
    "diffusion_model.input_blocks.4.1.norm.bias.diff",
]  # fmt: skip


def _applied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the differences of one file add to the weight and the bias of NORM, as ComfyUI reads
    them: a bias counts beside its weight, and of two for one weight the plain one."""
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(key.rsplit(".", 1)[0] for key in state):
        ends = {
            key.rsplit(".", 1)[1]: t for key, t in state.items() if key.rsplit(".", 1)[0] == name
        }
        if name.endswith(".bias"):
            found["bias"] = ends["diff"]
            continue
        if "w_norm" in ends:
            found["weight"] = ends["w_norm"]
            found |= {"bias": ends["b_norm"]} if "b_norm" in ends else {}
        found |= {"weight": ends["diff"]} if "diff" in ends else {}
        found |= {"bias": ends["diff_b"]} if "diff_b" in ends else {}
    return {part: tensor.double() for part, tensor in found.items()}


@settings(deadline=None, max_examples=40)
@given(
    files=st.lists(
        st.tuples(
            st.sampled_from((1.0, 0.5, -0.7)),
            st.sampled_from(((0,), (0, 1), (2,), (3,), (2, 3), (4,), (4, 3), (5,), (2, 5))),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_differences_add_up(tmp_path_factory, files: list[tuple[float, tuple[int, ...]]]):
    folder = tmp_path_factory.mktemp("sum")
    sources, wanted = [], dict[str, Tensor]()
    for number, (weight, places) in enumerate(files):
        state = {DIFFERENCES[n]: _some(64, seed=10 * number + n) for n in places}
        sources.append(
            (save(folder / f"{number}.safetensors", state | pair("q", 2, seed=number)), weight)
        )
        for part, tensor in _applied(state).items():
            wanted[part] = wanted.get(part, 0) + weight * tensor
    found = merge_files(sources, folder / "sum.safetensors", Limits())
    state = load_file(found.path)
    got = _applied({key: t for key, t in state.items() if not key.startswith(PREFIX)})
    assert got.keys() == wanted.keys()
    for part, tensor in got.items():
        assert torch.allclose(tensor, wanted[part], atol=1e-6)
    assert (
        not parse_keys(state).unknown and "Added too: the differences of 1 layer." in found.text()
    )


def test_what_counts_once_and_is_one_file_s_stays_bit_by_bit(tmp_path: Path):
    a = save(tmp_path / "a.safetensors", pair("q", 2) | KEPT["LyCORIS' norms"][0])
    b = save(tmp_path / "b.safetensors", pair("q", 3, seed=5) | KEPT["kohya's embedding"][0])
    found = merge_files([(a, 1.0), (b, 0.5)], tmp_path / "c.safetensors", Limits(max_rank=2))
    after = _bytes(found.path)
    for path, names in ((a, "LyCORIS' norms"), (b, "kohya's embedding")):
        extra = KEPT[names][0]
        assert {key: after[key] for key in extra} == {key: _bytes(path)[key] for key in extra}
    assert "Kept as they are, whatever the weights: 1 embedding (sks cat)." in found.text()
    half = merge_files([(a, 0.5), (b, 1.0)], tmp_path / "d.safetensors", Limits())
    norm = load_file(half.path)[f"{NORM}.w_norm"]
    assert torch.equal(norm, 0.5 * KEPT["LyCORIS' norms"][0][f"{NORM}.w_norm"].float())


def test_a_sum_of_differences_alone(tmp_path: Path):
    a, b = (
        save(tmp_path / f"{n}.safetensors", {f"{LINEAR}.diff": _some(80, 64, seed=n)})
        for n in (1, 2)
    )
    found = merge_files([(a, 1.0), (b, 2.0)], tmp_path / "c.safetensors", Limits())
    wanted = sum(n * _some(80, 64, seed=n).double() for n in (1, 2))
    assert torch.allclose(load_file(found.path)[f"{LINEAR}.diff"].double(), wanted, atol=1e-6)
    assert "0.0" in found.text()
    for path, weight in ((a, 0.5), (b, 1.0)):  # in eight bits, of one file
        eight = {key: t.to(torch.float8_e4m3fn) for key, t in load_file(path).items()}
        own = save(tmp_path / "e.safetensors", eight)
        found.path.unlink()
        found = merge_files([(own, weight)], found.path, Limits())
        [(key, tensor)] = load_file(found.path).items()
        assert torch.equal(tensor.float(), weight * eight[key].float())
    with pytest.raises(LoRAFileError, match="would change nothing"):
        merge_files([(a, 1.0), (a, -1.0)], tmp_path / "d.safetensors", Limits())
    with pytest.raises(LoRAFileError, match=r"what has no ranks to cut takes 0\.02048 MB"):
        merge_files([(a, 1.0), (b, 2.0)], tmp_path / "d.safetensors", Limits(megabytes=0.01))


@pytest.mark.parametrize("kind", ["kohya's embedding", "modules_to_save", "a weight that is set"])
def test_of_what_has_no_sum_there_can_be_one(tmp_path: Path, kind: str):
    extra = KEPT[kind][0]
    a, same = (save(tmp_path / f"{n}.safetensors", pair("q", 2) | extra) for n in "ab")
    found = merge_files([(a, 1.0), (same, 1.0)], tmp_path / "c.safetensors", Limits())
    assert {key: _bytes(found.path)[key] for key in extra} == {k: _bytes(a)[k] for k in extra}
    key = next(iter(extra))
    others = [extra | {key: extra[key] + 1}]
    if kind == "kohya's embedding":
        others.append({key: extra[key]})  # for one text encoder alone
    for other in others:
        b = save(tmp_path / "b.safetensors", pair("q", 2) | other)
        with pytest.raises(LoRAFileError, match="load one beside the other") as told:
            merge_files([(a, 1.0), (b, 1.0)], tmp_path / "d.safetensors", Limits())
        assert str(a) in str(told.value) and str(b) in str(told.value)
    assert not (tmp_path / "d.safetensors").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            {f"{PREFIX}q.diff": _some(80, 64)},
            "has a difference of the whole weight of .*attn1_to_q",
        ),
        ({f"{PREFIX}q.set_weight": _some(80, 64)}, "sets the whole weight of .*attn1_to_q"),
        (KEPT["LoKr"][0], "holds LoKr, which have no ranks to cut or to add"),
        (KEPT["OFT"][0], "holds OFT, which have no ranks"),
        ({f"{NORM}.diff": _some(32)}, "trained for another architecture .* 32 in one and 64"),
    ],
)
def test_what_cannot_be_added_is_named(tmp_path: Path, extra: dict[str, Tensor], words: str):
    a = save(tmp_path / "a.safetensors", pair("q", 2) | {f"{NORM}.w_norm": _some(64)})
    b = save(tmp_path / "b.safetensors", extra | pair("v", 1))
    with pytest.raises(LoRAFileError, match=words) as told:
        merge_files([(a, 1.0), (b, 0.5)], tmp_path / "c.safetensors", Limits())
    assert str(told.value).isprintable() and not (tmp_path / "c.safetensors").exists()


def test_what_nobody_knows_and_is_two_things_is_left_out_by_name(tmp_path: Path):
    a, b = (
        save(tmp_path / f"{n}.safetensors", pair("q", 2) | {"note": torch.arange(5) + n})
        for n in (1, 2)
    )
    found = merge_files([(a, 1.0), (b, 1.0)], tmp_path / "c.safetensors", Limits())
    assert "Left out as no part of a LoRA: note" in found.text()
    assert "note" not in load_file(found.path)


def test_nu_and_width_are_those_of_the_factors(tmp_path: Path):
    """A bias beside them has the same key."""
    key = f"{PREFIX}k".replace("attn1", "attn2")
    made = [toy.component("input_blocks.4.1.transformer_blocks.0.attn2.to_k", 4, (64, 2048))]
    own = save_as_ours(tmp_path / "a.safetensors", made, {})
    other = save(tmp_path / "b.safetensors", {f"{key}.diff_b": _some(64)})
    found = merge_files([(own, 1.0), (other, 1.0)], tmp_path / "c.safetensors", Limits())
    again = resize_file(found.path, tmp_path / "d.safetensors", Limits(max_rank=2))
    infos = {info.kind: info for info in inspect(again.path)[0]}
    assert infos["lora"].nu == made[0].nu and infos["difference"].nu is None
    assert inspector.inspect(again.path).family.name == "SDXL"


# --- what the header says ---------------------------------------------------------------------


def test_the_header_of_the_new_file_is_true(tmp_path: Path):
    said = {
        "lora_adapter_metadata": json.dumps({"unet.r": 8}),
        "ss_network_args": json.dumps({"algo": "locon", "conv_dim": "8", "conv_alpha": "4"}),
        "ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_steps": "12",
    }  # fmt: skip
    state = pair("q", 8) | KEPT["a whole difference"][0]
    path, new = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(state, path, said)
    resize_file(path, new, Limits(max_rank=2))
    with safe_open(new, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_steps"] == "12" and "lora_adapter_metadata" not in metadata
    assert json.loads(metadata["ss_network_args"]) == {"algo": "locon"}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "1.0")
    listed = json.loads(metadata["lora2.components"])
    assert {key: one["rank"] for key, one in listed.items()} == {f"{PREFIX}q": 2}


def test_flux_tools_that_make_a_layer_larger_are_only_loaded(tmp_path: Path):
    """ComfyUI tells them by two keys, which a file of our names would not have."""
    state = {"img_in.lora_A.weight": _some(2, 8), "img_in.lora_B.weight": _some(16, 2),
             "single_blocks.0.norm.key_norm.scale": _some(4)}  # fmt: skip
    path = save(tmp_path / "a.safetensors", state)
    with pytest.raises(LoRAFileError, match="changes the shape of img_in"):
        resize_file(path, tmp_path / "b.safetensors", Limits())


def test_a_weight_that_is_set_is_called_so(tmp_path: Path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(a, pair("q", 4) | {"lora_unet_scale.set_weight": _some(8)})
    text = merge_files([(a, 1.0)], b, Limits()).text()
    assert "1 set weight." in text and "1 set weight" in resize_file(a, b, Limits()).text()
    assert inspector.inspect(a).kinds == {"lora": 1, "set weight": 1}


def test_a_boft_is_called_so(tmp_path: Path):
    a = save(tmp_path / "a.safetensors", pair("q", 4) | {"x.oft_blocks": torch.zeros(2, 4, 8, 8)})
    assert "1 BOFT" in resize_file(a, tmp_path / "b.safetensors", Limits()).text()
    assert measure_file(a).not_measured == "Not measured: 1 BOFT."
