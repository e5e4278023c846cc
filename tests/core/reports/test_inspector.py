"""What a file says of itself: to a person, to a script, in a picture, on the command line."""

from __future__ import annotations

import base64
import itertools
import json
import math
import random
import re
import struct
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lora2_pack.lora2_core import cli, lora_file
from lora2_pack.lora2_core.files.raw.tensors import TensorFile
from lora2_pack.lora2_core.reports import canvas, comparison, inspector
from lora2_pack.lora2_core.reports.report import Scale, scale_ticks, short
from lora2_pack.lora2_core.resizing.measure import measure_file
from lora2_pack.tests.core.resizing.test_resize import deltas, foreign, written
from lora2_pack.tests.core.toy import thumbnail
from PIL import Image

torch.set_num_threads(1)


# --- the header -------------------------------------------------------------------------------


def test_the_facts_of_a_file(tmp_path: Path, monkeypatch):
    tags = json.dumps({"1_mine": {"sks dog": 9, "grass": 4, "sky": 1}})
    path = written(
        tmp_path / "mine.safetensors",
        ss_tag_frequency=tags, ss_steps="500", ss_sd_model_name="base.safetensors",
        **{"modelspec.thumbnail": thumbnail()},
    )  # fmt: skip
    monkeypatch.setattr(TensorFile, "tensor", None)  # the header alone
    found = inspector.inspect(path)
    assert found.trigger == "sks dog" and found.tags == ["sks dog", "grass", "sky"]
    assert found.kinds == {"lora": 8, "conv": 1}
    picture = found.thumbnail()
    assert picture is not None and (picture.width, picture.height) == (16, 16)
    assert picture.picture.size == (16, 16)
    red, green, _ = found.picture().getpixel((1280 - 36 - 8, 32))
    assert red > 150 > 80 > green, "the thumbnail is in the corner of the map"
    text = found.text()
    digest = found.metadata["sshs_model_hash"]
    for word in ("sks dog", "grass", "steps 500", "base.safetensors", digest, "16×16 px", "8 lora"):
        assert word in text, word
    assert max(map(len, text.splitlines())) <= 230
    told = json.loads(json.dumps(found.as_dict()))
    assert told["hashes"]["sshs_model_hash"] == digest and len(told["hashes"]) == 2
    assert told["trigger"] == "sks dog" and len(told["components"]) == 9
    assert told["measured"] is None and told["metadata"]["ss_steps"] == "500"


@pytest.mark.parametrize(
    "uri",
    [
        "", "data:image/png;base64,", "data:image/png;base64,AAAAAAAAAAAAAAAAAAAA",
        "data:text/html;base64," + "A" * 40, "https://example.invalid/picture.png",
        thumbnail()[:60], "data:image/png;base64," + "A" * 2_000_000,
    ],
)  # fmt: skip
def test_a_thumbnail_that_is_none(uri: str, tmp_path: Path):
    assert inspector.decoded(uri) is None
    found = inspector.inspect(written(tmp_path / "x", **{"modelspec.thumbnail": uri}))
    assert ("Thumbnail    ignored: it is no PNG" in found.text()) == bool(uri)
    assert found.picture()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [4097, 12_000, 60_000])  # the last two: Pillow warns, and raises
def test_a_thumbnail_that_claims_to_be_huge(side: int):
    assert inspector.decoded(uri(png(side))) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_thumbnail_with_spoilt_bytes(kind: str):
    whole, chance = base64.b64decode(thumbnail(24, kind).partition(",")[2]), random.Random(0)
    for _ in range(400):
        spoilt = bytearray(whole[: chance.randint(1, len(whole))])
        for _ in range(chance.randint(0, 6)):
            spoilt[chance.randrange(len(spoilt))] = chance.randrange(256)
        inspector.decoded(uri(bytes(spoilt), kind))  # a picture or None


def uri(data: bytes, kind: str = "PNG") -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def png(side: int) -> bytes:
    """A hundred bytes that say they are a picture of ``side`` × ``side``."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_what_a_stranger_wrote_moves_no_terminal(tmp_path: Path, capsys):
    """Escape sequences, new lines that would pass for facts of ours, text that runs backwards."""
    evil = "a\x1b[2J\nBase         SDXL\rb\u202ec\x07"
    state = {f"{evil}{n}.lora_{part}.weight": torch.ones(n, n) for n in (2, 3)
             for part in ("down", "up")}  # fmt: skip
    names = ("modelspec.trigger_phrase", "ss_sd_model_name", "ss_steps", "ss_network_alpha")
    tags = json.dumps({"x": {evil: 3}})
    spec = dict.fromkeys(names, evil) | {"ss_tag_frequency": tags, "sshs_model_hash": evil}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state, path, spec)
    assert cli.main(["inspect", str(path), str(path), "--measure"]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert out.count("\nBase ") == 2 and "\nBase         SDXL" not in out
    assert inspector.inspect(path).hashes == {}


@pytest.mark.parametrize("tags", ["", "[]", "{", '{"a": 3}', '{"a": {"b": "c"}}', "[" * 9999])
def test_tags_that_are_none(tags: str):
    assert inspector.most_frequent_tags({"ss_tag_frequency": tags}) == []


# --- the tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [written, foreign])
def test_what_the_tensors_say(tmp_path: Path, kind):
    path = kind(tmp_path / "a.safetensors")
    found = measure_file(path)
    exact = deltas(path)
    total = sum(float(delta.square().sum()) for delta in exact.values())
    assert found.norm == pytest.approx(math.sqrt(total), rel=1e-4)
    assert sum(one.share for one in found.components) == pytest.approx(1)
    for one in found.components:
        values = torch.linalg.svdvals(exact[one.key])
        assert one.norm == pytest.approx(float(values.norm()), rel=1e-4)
        shares = values.square().cumsum(0) / values.square().sum()
        assert one.effective_rank == int((shares < 0.9).sum()) + 1
    assert 0 < found.cut_bytes <= path.stat().st_size + 2000
    text = inspector.inspect(path, with_tensors=True).text()
    assert "could be cut to" in text and "at 99 % of its energy" in text


def test_a_lora_that_adds_nothing(tmp_path: Path):
    state = {f"x.lora_{part}.weight": torch.zeros(4, 4) for part in ("down", "up")}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    found = measure_file(tmp_path / "x.safetensors")
    assert found.norm == 0 and found.cut_rank == 0
    assert [(one.norm, one.share, one.effective_rank) for one in found.components] == [(0, 0, 0)]
    assert inspector.inspect(tmp_path / "x.safetensors", with_tensors=True).text()


def test_what_cannot_be_measured_is_counted_and_the_rest_measured(tmp_path: Path):
    def pair(name: str, value: float = 1.0) -> dict[str, torch.Tensor]:
        ends = (".lora_down.weight", (2, 8)), (".lora_up.weight", (8, 2))
        return {name + end: torch.full(shape, value) for end, shape in ends}

    path = tmp_path / "x.safetensors"
    loha = {f"h.hada_w{n}_{side}": torch.ones(2, 2) for n in (1, 2) for side in "ab"}
    odd = {"r.reshape_weight": torch.tensor([9, 9]), "e.lora_E": torch.ones(2, 1)}
    state = pair("x") | pair("bad", math.nan) | pair("r") | pair("e") | loha | odd
    safetensors.torch.save_file(state | {"n.w_norm": torch.ones(4)}, path)
    report = inspector.inspect(path, with_tensors=True)
    assert [one.key for one in report.measured.components] == ["x"]
    assert report.measured.norm == pytest.approx(16)  # of 2 in 8 × 8 places
    said = report.text()
    assert "could be cut to" in said
    for told in ("1 LoHa", "1 norm", "1 AdaLoRA", "1 that change a layer's shape", "1 damaged"):
        assert told in said.partition("Not measured: ")[2].partition("\n")[0]
    safetensors.torch.save_file(loha, path)
    alone = inspector.inspect(path, with_tensors=True)
    assert alone.measured.components == () and alone.text().endswith("Not measured: 1 LoHa.\n")
    assert alone.picture().size and json.dumps(alone.as_dict())


# --- pictures ---------------------------------------------------------------------------------


def test_several_files_in_one_scale(tmp_path: Path):
    shown = [
        comparison.Shown(name, lora_file.inspect(written(tmp_path / name, seed))[0], 10**6)
        for seed, name in enumerate(("first", "second", "a very long name " * 9))
    ]
    picture, single = comparison.compare(shown), comparison.compare(shown[:1])
    assert picture.width == 1280 and picture.height > 2 * single.height
    assert len(picture.getcolors(1 << 20) or []) > 50
    with pytest.raises(ValueError, match="no LoRA to compare"):
        comparison.compare([])


def test_a_title_ends_before_the_picture(tmp_path: Path):
    """No letter is cut by the thumbnail, nor stands in the gap before it."""
    name = "wwwww " * 40
    path = written(tmp_path / name, **{"modelspec.thumbnail": thumbnail(64)})
    before_it = inspector.inspect(path).picture().crop((1280 - 36 - 64 - 14, 0, 1280 - 36 - 64, 90))
    assert len(before_it.getcolors() or []) == 1


def test_labels_of_the_scale_do_not_touch():
    for largest in (*range(2, 300), *range(300, 5000, 7)):
        scale, ticks = Scale(1, largest), scale_ticks(largest)
        for one, two in itertools.pairwise(ticks):
            if two > largest:  # no file has it
                continue
            apart = 290 * (scale.position(two) - scale.position(one))
            widths = [canvas.text_width(short(tick), 11) for tick in (one, two)]
            assert apart > sum(widths) / 2 + 2, (largest, one, two)


# --- the command line -------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, capsys):
    a, b = written(tmp_path / "a.safetensors"), foreign(tmp_path / "b.safetensors")
    png = tmp_path / "x.png"
    assert cli.main(["inspect", str(a), str(b), "--png", str(png), "--measure"]) == 0
    out = capsys.readouterr().out
    assert "sks dog" in out and "mean rank" in out and "b.safetensors" in out
    with Image.open(png) as picture:
        assert picture.width == 1280
    assert cli.main(["inspect", str(a), str(tmp_path / "no.safetensors"), "--json"]) == 1
    caught = capsys.readouterr()
    assert [one["name"] for one in json.loads(caught.out)] == ["a.safetensors"]
    assert caught.err.startswith("error: ") and "does not exist" in caught.err
    assert caught.err.count("\n") == 1


def test_the_command_line_writes(tmp_path: Path, capsys):
    a, b = written(tmp_path / "a.safetensors"), written(tmp_path / "b.safetensors", 9)
    new = tmp_path / "new.safetensors"
    assert cli.main(["resize", str(a), str(new), "--rank", "2"]) == 0
    assert "mean rank" in capsys.readouterr().out
    assert max(info.rank for info in lora_file.inspect(new)[0]) == 2
    assert cli.main(["resize", str(a), str(new), "--rank", "3"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["merge", str(a), f"{b}=0.5", "--out", str(new), "--force"]) == 0
    wanted = {key: deltas(a)[key] + 0.5 * deltas(b)[key] for key in deltas(a)}
    for key, delta in deltas(new).items():
        assert torch.allclose(delta, wanted[key], atol=1e-5)
    for bad in (["--rank", "0"], ["--energy", "2"]):
        other = tmp_path / "other.safetensors"
        assert cli.main(["resize", str(a), str(other), *bad]) == 1
        assert "error: " in capsys.readouterr().err and not other.exists()
    assert cli.main(["merge", f"{a}=much", "--out", str(tmp_path / "c.safetensors")]) == 1
    assert "does not end in a weight" in capsys.readouterr().err


OTHERS = {
    "loha": (
        {f"h.hada_w{n}_{s}": (6, 3) if s == "a" else (3, 5) for n in (1, 2) for s in "ab"},
        66,
    ),
    "lokr": ({"k.lokr_w1": (2, 2), "k.lokr_w2": (3, 4), "k.alpha": ()}, 16),
    "glora": ({f"g.{end}.weight": (4, 4) for end in ("a1", "a2", "b1", "b2")}, 64),
    "oft": ({"o.oft_blocks": (4, 6, 6)}, 144),
    "boft": ({"b.oft_blocks": (2, 4, 6, 6), "b.rescale": (24, 1)}, 312),
    "ia3": ({"i.weight": (24,), "i.on_input": ()}, 24),
    "difference": ({"d.diff": (6, 5), "d.diff_b": (6,)}, 36),
    "norm": ({"n.w_norm": (7,), "n.b_norm": (7,)}, 14),
}


@pytest.mark.parametrize("kind", [*OTHERS, "all"])
def test_every_kind_has_its_size_and_is_not_called_left_out(tmp_path: Path, kind: str):
    chosen = OTHERS if kind == "all" else {kind: OTHERS[kind]}
    state = {
        key: torch.ones(shape) for shapes, _ in chosen.values() for key, shape in shapes.items()
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state, path)
    report = inspector.inspect(path)
    assert report.kinds == dict.fromkeys(chosen, 1)
    text = report.text()
    assert "left out (rank 0)" not in text.replace("of which 0 left out (rank 0)", "")
    figures = report.as_dict()["summary"]
    assert figures["zero_count"] == 0
    assert figures["parameters"] == sum(numbers for _, numbers in chosen.values())
    for one in chosen if kind not in ("loha", "glora") else ():  # which have ranks
        numbers, nbytes = (
            OTHERS[one][1],
            sum(tensor.nbytes for key, tensor in state.items() if key in OTHERS[one][0]),
        )
        assert re.search(rf"^{one} +1 +{numbers} +{nbytes / 1e6:.3f}$", text, re.M), text
    assert report.picture().width == 1280
    assert inspector.side_by_side([report, report])
    assert comparison.compare([comparison.Shown("x", report.components, report.nbytes)] * 2)


def test_what_lies_beside_the_components_is_named(tmp_path: Path):
    state = {f"x.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")}
    state |= {
        "bundle_emb.sks cat.clip_l": torch.ones(2, 64),
        "bundle_emb.sks cat.clip_g": torch.ones(8),
    }
    state |= {"base_model.model.conv_in.weight": torch.ones(100), "x.strange\x1b": torch.ones(3)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state, path)
    report, size = inspector.inspect(path), path.stat().st_size
    lines = [line for line in report.text().splitlines() if line.startswith("Beside")]
    assert [line.split(None, 1)[1] for line in lines] == [
        f"1 whole module: conv_in; 1 tensor, 0.4 kB, {40000 / size:.1f} % of the file",
        f"1 embedding: sks cat; 2 tensors, 0.5 kB, {54400 / size:.1f} % of the file",
        f"1 unknown tensor: x.strange?, 0.0 kB, {1200 / size:.1f} % of the file",
    ]
    told = json.loads(json.dumps(report.as_dict()))["beside"]
    assert [(one["kind"], one["nbytes"]) for one in told] == [
        ("module", 400), ("embedding", 544), ("unknown", 12),
    ]  # fmt: skip


def test_files_of_other_kinds_are_shown(tmp_path: Path):
    state = {f"lora_unet_x.hada_w{n}_{s}": torch.ones(4, 4) for n in (1, 2) for s in "ab"}
    state |= {"lora_unet_y.lokr_w1": torch.ones(2, 2), "lora_unet_y.lokr_w2": torch.ones(2, 2)}
    state |= {"lora_unet_z.diff": torch.ones(3, 5), "lora_unet_n.w_norm": torch.ones(3)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    found = inspector.inspect(tmp_path / "x.safetensors")
    assert found.kinds == {"loha": 1, "lokr": 1, "difference": 1, "norm": 1}
    assert found.text() and found.picture()
    measured = inspector.inspect(tmp_path / "x.safetensors", with_tensors=True).text()
    told = "1 norm, 1 LoHa, 1 LoKr, 1 difference"
    assert found.text() in measured and measured.endswith(f"Not measured: {told}.\n")
