"""Every kind of component in a file: told, checked for shape, and its numbers looked at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.lora_file import LoRAFileError
from lora2_pack.tests.core import toy

torch.set_num_threads(1)


def written(path: Path, **shapes: tuple[int, ...]) -> Path:
    """A file of ones; two underscores in a key stand for a dot."""
    state = {key.replace("__", "."): torch.ones(shape) for key, shape in shapes.items()}
    safetensors.torch.save_file(state, path)
    return path


DORA = {"x__lora_A__weight": (4, 16), "x__lora_B__weight": (24, 4)}
KINDS = {
    "kohya": ({"x__lora_down__weight": (4, 16), "x__lora_up__weight": (24, 4), "x__alpha": ()},
              (4, 16, 24, "lora")),
    "PEFT": ({"x__lora_A__default__weight": (4, 16), "x__lora_B__default__weight": (24, 4)},
             (4, 16, 24, "lora")),
    "old diffusers": ({"x_lora__down__weight": (4, 16), "x_lora__up__weight": (24, 4)},
                      (4, 16, 24, "lora")),
    "1×1": ({"x__lora_down__weight": (4, 6, 1, 1), "x__lora_up__weight": (8, 4, 1, 1)},
            (4, 6, 8, "lora")),
    "convolution": ({"x__lora_down__weight": (4, 6, 3, 3), "x__lora_up__weight": (8, 4, 1, 1)},
                    (4, 54, 8, "conv")),
    "three factors": ({"x__lora_down__weight": (4, 6, 1, 1), "x__lora_mid__weight": (4, 4, 3, 3),
                       "x__lora_up__weight": (8, 4, 1, 1)}, (4, 54, 8, "conv")),
    "rank 0": ({"x__lora_down__weight": (0, 16), "x__lora_up__weight": (24, 0)},
               (0, 16, 24, "lora")),
    "DoRA": ({**DORA, "x__dora_scale": (24, 1)}, (4, 16, 24, "dora")),
    "DoRA by PEFT": ({**DORA, "x__lora_magnitude_vector__default__weight": (24,)},
                     (4, 16, 24, "dora")),
    "LoHa": ({"x__hada_w1_a": (24, 3), "x__hada_w1_b": (3, 16), "x__hada_w2_a": (24, 2),
              "x__hada_w2_b": (2, 16), "x__alpha": (1,)}, (3, 16, 24, "loha")),
    "LoKr": ({"x__lokr_w1": (4, 4), "x__lokr_w2_a": (6, 2), "x__lokr_w2_b": (2, 4)},
             (2, 16, 24, "lokr")),
    "LoKr, whole": ({"x__lokr_w1": (4, 4), "x__lokr_w2": (6, 4)}, (0, 16, 24, "lokr")),
    "GLoRA": ({"x__a1__weight": (16, 4), "x__a2__weight": (4, 16), "x__b1__weight": (24, 4),
               "x__b2__weight": (4, 16)}, (4, 16, 24, "glora")),
    "OFT": ({"x__oft_blocks": (4, 6, 6)}, (0, 0, 24, "oft")),
    "difference": ({"x__diff": (24, 16), "x__diff_b": (24,)}, (0, 16, 24, "difference")),
    "norm": ({"x__w_norm": (24,), "x__b_norm": (24,)}, (0, 0, 24, "norm")),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_every_kind_is_told(tmp_path: Path, case: str) -> None:
    shapes, (rank, inside, out, kind) = KINDS[case]
    path = written(tmp_path / "x.safetensors", **shapes, bundle_emb__cat=(3,))
    [info], _ = lora_file.inspect(path)
    assert (info.key, info.rank, info.in_features, info.out_features, info.kind) == (
        "x", rank, inside, out, kind,
    )  # fmt: skip
    beside = ("alpha", "dora_scale", "default__weight", "bundle")
    tensors = [s for k, s in shapes.items() if kind != "dora" or not k.endswith(beside)]
    assert 0 <= info.nbytes <= sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    assert info.nbytes >= max(4 * torch.Size(shape).numel() for shape in tensors)
    assert set(lora_file.load(path).state) == {key.replace("__", ".") for key in shapes} | {
        "bundle_emb.cat"
    }


PAIR = KINDS["kohya"][0]
MISMATCHED = {
    "lonely": ({"x__lora_down__weight": (4, 16)}, r"x\.lora_down\.weight lacks its other half"),
    "a core alone": ({**PAIR, "y__lora_mid__weight": (4, 4, 3, 3)}, "y.lora_mid.weight lacks"),
    "half a LoHa": ({"x__hada_w1_a": (4, 2), "x__hada_w1_b": (2, 4)}, "lacks its other half"),
    "half a LoKr": ({"x__lokr_w1": (4, 2)}, r"x\.lokr_w1 lacks its other half"),
    "ranks": ({**PAIR, "x__lora_up__weight": (24, 5)}, r"halves of x do.*\(4×16 and 24×5\)"),
    "no rank": ({**PAIR, "x__lora_up__weight": (24,)}, r"halves of x do.*\(4×16 and 24\)"),
    "a core": ({**KINDS["three factors"][0], "x__lora_mid__weight": (4, 3, 3, 3)}, "halves of x"),
    "LoHa": ({**KINDS["LoHa"][0], "x__hada_w2_b": (3, 16)}, "halves of x"),
    "LoKr": ({**KINDS["LoKr"][0], "x__lokr_w2_b": (3, 4)}, "halves of x"),
    "GLoRA": ({**KINDS["GLoRA"][0], "x__a1__weight": (16, 5)}, "halves of x"),
    "alpha": ({**PAIR, "x__alpha": (3,)}, r"x\.alpha holds 3 numbers where one belongs"),
    "no alpha": ({**PAIR, "x__alpha": (0,)}, r"x\.alpha holds 0 numbers where one belongs"),
    "alpha of a LoHa": ({**KINDS["LoHa"][0], "x__alpha": (2,)}, "holds 2 numbers"),
}  # fmt: skip


@pytest.mark.parametrize("read", [lora_file.inspect, lora_file.load])
@pytest.mark.parametrize("case", MISMATCHED)
def test_what_does_not_fit_together_is_damaged(read, case: str, tmp_path: Path) -> None:
    shapes, words = MISMATCHED[case]
    path = written(tmp_path / "x.safetensors", **shapes)
    with pytest.raises(LoRAFileError, match=f"^{path} is damaged: .*{words}") as caught:
        read(path)
    assert str(caught.value).isprintable()


def test_kinds_of_the_future_are_left_to_the_loader(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", x__new_kind_a=(4, 4))
    assert list(lora_file.load(path).state) == ["x.new_kind_a"]
    with pytest.raises(LoRAFileError, match="holds no LoRA"):
        lora_file.inspect(path)


@pytest.mark.parametrize(
    "entry",
    [
        '{"nu": NaN, "in": 3, "out": 4}', '{"nu": 1e999, "in": 3, "out": 4}',
        '{"nu": 1, "in": 1e300, "out": 4}', '{"nu": 1, "in": -3, "out": 4}',
        '{"nu": 1, "in": 3, "out": 1e400}', '{"nu": "x", "in": 3, "out": 4}',
        '{"nu": 1, "in": 9999999999999999999, "out": 4}', '{"nu": 1, "in": [], "out": 4}',
    ],
)  # fmt: skip
def test_numbers_that_no_layer_has_are_not_ours(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(toy.meta(**{"lora2.components": f'{{"k": {entry}, "z": {entry}}}'}))
    assert lora_file.inspect(path)[0] == [lora_file.ComponentInfo("k", 2, 3, 4, None, 28)]


def test_more_than_there_is_memory_for_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        toy.raw_file({**toy.PAIR, "other": toy.entry([1 << 40], 28)})  # 2 TB of hole
    )
    os.truncate(path, path.stat().st_size + 28 + (1 << 41))
    before = resident()
    assert lora_file.inspect(path)[0]
    with pytest.raises(LoRAFileError, match=r"needs 2199\.0 GB of memory and .* GB are free"):
        lora_file.load(path)
    assert resident() - before < 50e6


def resident() -> float:
    """Bytes of memory of this process."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("only Linux tells")
    return int(pages.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_tensor_that_is_not_finite_is_named(dtype: torch.dtype, value: float) -> None:
    state = {"a": torch.ones(3, 3, dtype=dtype), "b": torch.zeros(0, dtype=dtype)}
    state["steps"] = torch.tensor([1 << 40])
    lora_file.check_finite(state, "cat")
    state["c\n"] = torch.ones(3, 3, dtype=dtype)
    state["c\n"][2, 1] = value
    with pytest.raises(LoRAFileError, match=r"^cat is damaged: c\? holds weights that are not fin"):
        lora_file.check_finite(state, "cat")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_looked_at_too(dtype: torch.dtype) -> None:
    state = {"a": torch.ones(9).to(dtype)}
    lora_file.check_finite(state, "cat")
    state["a"].view(torch.uint8)[4] = 0x7F
    with pytest.raises(LoRAFileError, match="not finite"):
        lora_file.check_finite(state, "cat")
