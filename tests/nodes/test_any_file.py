"""Any file, at random: everything that is done with one ends in a result or in one sentence."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.files.header import LoRAFileError
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.recent import LoRACache
from lora2_pack.lora2_core.resizing.resize import merge_files, resize_file
from lora2_pack.nodes.screen import views
from lora2_pack.tests.core import spoiling
from lora2_pack.tests.core.spoiling import TWO_FACTORS, Mutations
from lora2_pack.tests.core.tries import TRIES, in_memory, in_time
from torch import Tensor

torch.set_num_threads(1)

LAYERS = [(f"input_blocks.{n}.1.transformer_blocks.0.attn1.to_q", 16, 8) for n in range(12)]
LIMITS = (
    Limits(max_rank=1), Limits(energy=0.5), Limits(megabytes=0.004), Limits(),
    Limits(max_rank=2, order="learnt"), Limits(energy=0.9, megabytes=0.003, order="learnt"),
)  # fmt: skip
WAYS = [name for name in vars(Mutations) if not name.startswith("_")]


def _sound() -> dict[str, bytes]:
    made = {way: spoiling.sound_of_two_factors(LAYERS[:3], way) for way in TWO_FACTORS}
    return made | {
        "LoRA²": spoiling.sound(LAYERS[:3]), "other kinds": spoiling.sound_of_other_kinds(LAYERS),
    }  # fmt: skip


def _finite(state: Mapping[str, Tensor]) -> bool:
    floats = [tensor for tensor in state.values() if tensor.is_floating_point()]
    return all(bool(tensor.float().isfinite().all()) for tensor in floats)


class Everything:
    """What people, nodes and pages do with the file at ``path``; ``other`` is a sound one."""

    def __init__(self, path: Path, other: Path, chance: random.Random):
        self.path, self.other, self.chance = path, other, chance
        self.target = path.parent / "new" / "y.safetensors"

    def inspect(self) -> None:
        report = inspector.inspect(self.path)
        json.dumps(report.as_dict())
        assert all(line.isprintable() for line in report.text().split("\n"))

    def draw(self) -> None:
        inspector.inspect(self.path).picture()

    def measure(self) -> None:
        assert inspector.inspect(self.path, with_tensors=True).text()

    def answer(self) -> None:
        json.dumps(views.inspected("x", self.path), allow_nan=False)

    def load(self) -> None:
        cache = LoRACache()
        for limits in (Limits(), self.chance.choice(LIMITS)):
            state = cache.open(self.path, limits).state
            assert _finite(state)

    def resize(self) -> None:
        assert resize_file(self.path, self.target, self.chance.choice(LIMITS)).text()
        assert _finite(lora_file.load(self.target).state)

    def merge(self) -> None:
        weight = self.chance.choice((1.0, -10.0, 0.001))
        files = [(self.path, weight), (self.other, 1.0)]
        self.chance.shuffle(files)
        assert merge_files(files, self.target, self.chance.choice(LIMITS)).text()
        assert _finite(lora_file.load(self.target).state)


DEEDS = [name for name in vars(Everything) if not name.startswith("_")]


def _some(number: int, chance: random.Random) -> list[str]:
    """Two of them, and the drawing now and then: it takes as long as all the rest."""
    drawn = ["draw"] if number % 20 == 0 else []
    return [*drawn, *chance.sample([deed for deed in DEEDS if deed != "draw"], 2)]


def _done(deed: Callable[[], None], path: Path) -> str:
    try:
        deed()
    except LoRAFileError as error:
        said = str(error)
        assert said.isprintable() and len(said) < 1000 and "Traceback" not in said
        return said
    return ""


def _unchanged(folder: Path, expected: dict[str, bytes]) -> None:
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == expected.keys(), "a temporary is left"
    for name, data in expected.items():
        assert (folder / name).read_bytes() == data


@pytest.mark.parametrize("kind", [*TWO_FACTORS, "LoRA²", "other kinds"])
def test_what_is_sound_is_taken(kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other.safetensors"
    path.write_bytes(_sound()[kind])
    other.write_bytes(_sound()["kohya"])
    made = Everything(path, other, random.Random(0))
    for deed in ("inspect", "draw", "answer", "load"):
        assert _done(getattr(made, deed), path) == "", deed


def test_files_spoilt_at_random(tmp_path: Path) -> None:
    sound, chance = _sound(), random.Random(5)
    path, other = tmp_path / "x.safetensors", tmp_path / "other.safetensors"
    other.write_bytes(sound["kohya"])
    spoilt = {kind: Mutations(data, chance) for kind, data in sound.items()}
    everything = Everything(path, other, chance)
    ends: dict[str, Counter[bool]] = {deed: Counter() for deed in DEEDS}
    with in_memory():
        for number in range(TRIES):
            kind, way = chance.choice([*sound]), WAYS[number % len(WAYS)]
            data = getattr(spoilt[kind], way)()
            path.write_bytes(data)
            for deed in _some(number, chance):
                everything.target.parent.mkdir(exist_ok=True)
                with in_time((kind, way, deed)):
                    try:
                        said = _done(getattr(everything, deed), path)
                    except Exception as error:
                        error.add_note(f"try {number}: {kind}, {way}, {deed}")
                        raise
                ends[deed][bool(said)] += 1
                everything.target.unlink(missing_ok=True)
            _unchanged(tmp_path, {path.name: data, other.name: sound["kohya"]})
    for deed, counted in ends.items():
        tried = counted.total()
        assert tried // 20 < counted[False] < tried, (deed, counted)


@pytest.mark.parametrize("deed", DEEDS)
def test_a_trigger_of_megabytes(deed: str, tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other.safetensors"
    header, body = spoiling.header_and_body(spoiling.sound(LAYERS[:3]))
    header["__metadata__"] |= {"modelspec.trigger_phrase": "word " * 1_000_000}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    other.write_bytes(path.read_bytes())
    with in_time(), in_memory(200):
        said = _done(getattr(Everything(path, other, random.Random(0)), deed), path)
    assert said == ""
