"""Files from strangers: a sentence each time, never a crash, a hang, or half a patch."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import comfy_host, inspector, lora_file, lora_header
from lora2_pack.lora2_core.lora_cache import LoRACache
from lora2_pack.lora2_core.lora_file import LoRAFileError
from lora2_pack.lora2_core.network import Component
from lora2_pack.lora2_core.shrink import Limits
from lora2_pack.lora2_core.targets import find_targets

COUNT = 2000
MOST_SECONDS, MOST_BYTES = 2.0, 200e6
HUGE = (1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30)
NAMES = (
    "", "../../etc/passwd", "__class__", "a" * 5000, "\x00\n\x1b[31m", "💣", "lora_unet_", ".alpha",
    ".lora_down.weight", "lora_unet_x.lora_down.weight", "__metadata__",
)  # fmt: skip


def _sound(model: Any) -> bytes:
    generator = torch.Generator().manual_seed(1)
    components = [
        Component(
            target.name,
            torch.randn(2, target.in_features, generator=generator),
            torch.randn(target.out_features, 2, generator=generator),
            torch.ones(2),
            0.1,
        )
        for target in find_targets(model.model.diffusion_model)
    ]
    return lora_file.encode(lora_file.to_state(components), {"ss_tag_frequency": "{}", "x": "y"})


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _file(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


class Mutations:
    """Ways to spoil a file; each returns its bytes."""

    def __init__(self, sound: bytes, chance: random.Random):
        self.sound, self.chance = sound, chance

    def bit_flips(self) -> bytes:
        data = bytearray(self.sound)
        for _ in range(self.chance.choice((1, 1, 2, 50))):
            place = self.chance.randrange(len(data) * 8 if self.chance.random() < 0.5 else 30_000)
            data[place // 8] ^= 1 << place % 8
        return bytes(data)

    def cut(self) -> bytes:
        return self.sound[
            : self.chance.choice((0, 1, 7, 8, 9, self.chance.randrange(len(self.sound))))
        ]

    def longer(self) -> bytes:
        return self.sound + os.urandom(self.chance.choice((1, 8, 1000)))

    def length(self) -> bytes:
        number = self.chance.choice((0, 1, 2**63, 2**64 - 1, len(self.sound), 10_000_001, 500))
        return struct.pack("<Q", number) + self.sound[8:]

    def entry(self) -> bytes:
        header, body = _header(self.sound)
        key = self.chance.choice([key for key in header if key != "__metadata__"])
        field = self.chance.choice(("shape", "dtype", "data_offsets", None))
        values = (
            [], [0], [-1, 3], [*HUGE], [self.chance.choice(HUGE)] * 2, [2.5, 1], ["a"], [[1]], 7,
            None, "F16", "F8_E5M2", "Q4", {}, True,
            [0, 1 << 40], [5, 3], [1] * 64, [0, 0], [True, False],
        )  # fmt: skip
        if field is None:
            header[key] = self.chance.choice(values)
        else:
            header[key][field] = self.chance.choice(values)
        return _file(header, body)

    def overlap(self) -> bytes:
        header, body = _header(self.sound)
        keys = [key for key in header if key != "__metadata__"]
        first, second = self.chance.sample(keys, 2)
        header[first]["data_offsets"] = list(header[second]["data_offsets"])
        if self.chance.random() < 0.5:
            header[first]["shape"] = list(header[second]["shape"])
            header[first]["dtype"] = header[second]["dtype"]
        return _file(header, body)

    def shape(self) -> bytes:
        """Sound as a file, but not as a LoRA of this model."""
        header, body = _header(self.sound)
        key = self.chance.choice([key for key in header if "lora_" in key])
        shape = header[key].get("shape") or [1]
        header[key]["shape"] = self.chance.choice(
            (
                shape[::-1],
                [1, *shape],
                [*shape, 1],
                [shape[0] * shape[-1]],
                [*shape[:-1], 1, shape[-1]],
            )
        )
        return _file(header, body)

    def names(self) -> bytes:
        header, body = _header(self.sound)
        key = self.chance.choice([key for key in header if key != "__metadata__"])
        new = self.chance.choice((*NAMES, key.replace("down", "up"), key.replace("unet", "te1")))
        if self.chance.random() < 0.3:  # twice the same
            text = json.dumps(header).encode()
            text = text.replace(b"{", b"{" + json.dumps(key).encode() + b": 1, ", 1)
            return _file(text, body)
        header = {new if name == key else name: value for name, value in header.items()}
        return _file(header, body)

    def weights(self) -> bytes:
        header, body = _header(self.sound)
        spoilt = bytearray(body)
        key = self.chance.choice([key for key in header if "weight" in key])
        start = header[key]["data_offsets"][0]
        spoilt[start : start + 2] = self.chance.choice((b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"))
        return _file(header, bytes(spoilt))

    def metadata(self) -> bytes:
        header, body = _header(self.sound)
        header["__metadata__"] = self.chance.choice(
            (
                None, [], 3, "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"": ""},
                {"lora2.components": "[" * 5000}, {"lora2.components": '{"a": {"nu": 1e999}}'},
                {"lora2.components": '{"a": {"nu": 1, "in": 1e400, "out": 1}}'},
                {"lora2.config": "[" * 9999}, {"ss_tag_frequency": '{"a": {"b": "c"}}'},
                {"modelspec.thumbnail": "data:image/png;base64," + "A" * 4000},
                {"modelspec.trigger_phrase": "\n\x1b[31m" * 50},
            )
        )  # fmt: skip
        return _file(header, body)

    def text(self) -> bytes:
        return _file(
            self.chance.choice(
                (
                    b"{" * 9000, b"[" * 9000, b'{"a":' * 9000, b"\xff\xfe{", b"{}", b'{"a": NaN}',
                    b"{", b'{"a": 1' + b"0" * 9000 + b"}", os.urandom(300), b'{"__metadata__": {}}',
                )
            ),
            b"",
        )  # fmt: skip


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _use(path: Path, model: Any, cache: LoRACache, cut: bool = True) -> str:
    """Everything that people do with a file; the sentence of a refusal, or nothing."""
    sentences = []
    try:
        inspector.inspect(path).text()
    except LoRAFileError as error:
        sentences.append(str(error))
    try:
        opened = cache.open(path, Limits())
        comfy_host.apply_lora(
            model, None, opened.state, 1.0, 1.0, path.name, metadata=opened.metadata
        )
        if cut:
            cache.open(path, Limits(max_rank=1))
    except (LoRAFileError, comfy_host.HostError) as error:
        sentences.append(str(error))
    for sentence in sentences:
        assert "\n" not in sentence and sentence.startswith((str(path), path.name)), sentence
        assert len(sentence) < 1000
    return sentences[-1] if sentences else ""


def test_two_thousand_spoilt_files(model: Any, tmp_path: Path):
    sound = _sound(model)
    path = tmp_path / "x.safetensors"
    path.write_bytes(sound)
    assert _use(path, model, LoRACache()) == "", "the sound one is taken"
    chance = random.Random(7)
    made = Mutations(sound, chance)
    ways = [name for name in vars(Mutations) if not name.startswith("_")]
    told: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    before, patches, uuid = _peak(), dict(model.patches), model.patches_uuid
    for number in range(COUNT):
        way = ways[number % len(ways)]
        path.write_bytes(getattr(made, way)())
        started = time.monotonic()
        sentence = _use(path, model, LoRACache(), cut=number % 5 == 0)
        assert time.monotonic() - started < MOST_SECONDS, way
        (told if sentence else taken)[way] += 1
        assert model.patches == patches and model.patches_uuid == uuid
    assert _peak() - before < MOST_BYTES
    assert set(told) == set(ways), f"never refused: {set(ways) - set(told)}"
    for way in ("cut", "longer", "overlap", "weights", "text"):
        assert not taken[way], f"{way} was taken {taken[way]} times"


def test_a_hundred_megabytes_of_metadata(model: Any, tmp_path: Path):
    header, body = _header(_sound(model))
    header["__metadata__"] = {"ss_tag_frequency": "x" * 100_000_000}
    path = tmp_path / "x.safetensors"
    path.write_bytes(_file(header, body))
    del header, body
    before = _peak()
    assert "its header would take 100.1 MB, and 10 MB is the most" in _use(path, model, LoRACache())
    assert _peak() - before < MOST_BYTES
    many = {f"k{n}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for n in range(120_000)}
    path.write_bytes(_file(many, b""))
    del many
    before = _peak()
    assert "fits no layer of this model" in _use(path, model, LoRACache())
    assert _peak() - before < MOST_BYTES


def test_links_out_of_the_folder(model: Any, comfy_directory: Path, tmp_path: Path):
    """They are followed, as ComfyUI does for models on another disk; what is no LoRA is no LoRA,
    and a name never leaves the folders by itself."""
    loras = comfy_directory / "output" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    secret, sound = tmp_path / "secret.txt", tmp_path / "sound.safetensors"
    secret.write_text("root:x:0:0")
    sound.write_bytes(_sound(model))
    links = {name: loras / f"to_{name}.safetensors" for name in ("secret", "sound")}
    try:
        links["secret"].symlink_to(secret)
        links["sound"].symlink_to(sound)
        refused = _use(comfy_host.lora_path("to_secret.safetensors"), model, LoRACache())
        assert "is not a safetensors file" in refused and "root" not in refused
        assert _use(comfy_host.lora_path("to_sound.safetensors"), model, LoRACache()) == ""
        for name in (f"../../../{secret}", str(sound), "../sound.safetensors"):
            with pytest.raises(comfy_host.HostError):
                comfy_host.lora_path(name)
    finally:
        for link in links.values():
            link.unlink(missing_ok=True)


def test_what_is_no_file(model: Any, tmp_path: Path):
    fifo, folder, loop = (tmp_path / f"{name}.safetensors" for name in ("fifo", "folder", "loop"))
    os.mkfifo(fifo)
    folder.mkdir()
    loop.symlink_to(loop)
    for path in (fifo, folder, loop, tmp_path / "missing.safetensors", Path("/dev/zero")):
        started = time.monotonic()
        with pytest.raises(LoRAFileError, match=r"does not exist|cannot be read"):
            lora_header.read_header(path)
        assert time.monotonic() - started < 1
