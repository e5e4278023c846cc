"""Files from strangers: a sentence each time, never a crash, a hang, or half a patch."""

from __future__ import annotations

import json
import logging
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lora2_pack.lora2_core import comfy_host, inspector, lora_file, lora_header
from lora2_pack.lora2_core.lora_cache import LoRACache
from lora2_pack.lora2_core.lora_file import LoRAFileError
from lora2_pack.lora2_core.network import Component
from lora2_pack.lora2_core.shrink import Limits
from lora2_pack.lora2_core.targets import find_targets
from lora2_pack.tests.host.demo import weights
from torch import Tensor

COUNT = 2000
MOST_SECONDS, MOST_MEGABYTES = 2.0, 200.0
HUGE = (1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30)
NAMES = (
    "", "../../etc/passwd", "__class__", "a" * 5000, "\x00\n\x1b[31m", "💣", "lora_unet_", ".alpha",
    ".lora_down.weight", "lora_unet_x.lora_down.weight", "__metadata__",
)  # fmt: skip


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 10


def _sound(model: Any) -> bytes:
    """A LoRA of every fourth layer."""
    components = [
        Component(
            target.name, _random(2, target.in_features), _random(target.out_features, 2),
            torch.ones(2), 0.1,
        )
        for target in find_targets(model.model.diffusion_model)[::4]
    ]  # fmt: skip
    return lora_file.encode(lora_file.to_state(components), {"ss_tag_frequency": "{}", "x": "y"})


def _sound_of_other_kinds(model: Any) -> bytes:
    """A layer of every kind that ComfyUI applies, a LoRA under PEFT's names among them."""
    layers = [t for t in find_targets(model.model.diffusion_model) if "attn1" in t.name]
    state: dict[str, Tensor] = {}
    for layer, make in zip(layers, KINDS.values(), strict=False):
        name = f"diffusion_model.{layer.name}"
        for end, tensor in make(layer.out_features, layer.in_features).items():
            state[name + end] = tensor
    assert len(layers) >= len(KINDS)
    return safetensors.torch.save(state)


KINDS: dict[str, Callable[[int, int], dict[str, Tensor]]] = {
    "PEFT": lambda out, inside: {
        ".lora_A.weight": _random(2, inside), ".lora_B.weight": _random(out, 2),
        ".alpha": torch.tensor(2.0),
    },
    "DoRA": lambda out, inside: {
        ".lora_down.weight": _random(2, inside), ".lora_up.weight": _random(out, 2),
        ".dora_scale": _random(out, 1) + 1, ".alpha": torch.tensor(1.0),
    },
    "LoHa": lambda out, inside: {
        ".hada_w1_a": _random(out, 3), ".hada_w1_b": _random(3, inside),
        ".hada_w2_a": _random(out, 2), ".hada_w2_b": _random(2, inside),
        ".alpha": torch.tensor(1.0),
    },
    "LoKr": lambda out, inside: {
        ".lokr_w1": _random(4, 4), ".lokr_w2_a": _random(out // 4, 2),
        ".lokr_w2_b": _random(2, inside // 4), ".alpha": torch.tensor(1.0),
    },
    "LoKr of products": lambda out, inside: {
        ".lokr_w1_a": _random(4, 2), ".lokr_w1_b": _random(2, 4),
        ".lokr_w2": _random(out // 4, inside // 4),
    },
    "GLoRA": lambda out, inside: {
        ".a1.weight": _random(inside, 2), ".a2.weight": _random(2, inside),
        ".b1.weight": _random(out, 2), ".b2.weight": _random(2, inside),
        ".alpha": torch.tensor(1.0),
    },
    "OFT": lambda out, inside: {".oft_blocks": _random(4, out // 4, out // 4)},
    "difference": lambda out, inside: {".diff": _random(out, inside)},
}  # fmt: skip


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _laid_out(header: dict[str, Any], body: bytes) -> bytes:
    """The file of these entries, whatever their places were."""
    end = 0
    for key in [key for key in header if key != "__metadata__"]:
        start, end = (
            end,
            end
            + torch.Size(header[key]["shape"]).numel()
            * (2 if header[key]["dtype"] == "F16" else 4),
        )
        header[key]["data_offsets"] = [start, end]
    return _file(header, (body * (end // max(1, len(body)) + 1))[:end])


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
            most = len(data) * 8
            place = self.chance.randrange(most if self.chance.random() < 0.5 else min(30_000, most))
            data[place // 8] ^= 1 << place % 8
        return bytes(data)

    def cut(self) -> bytes:
        return self.sound[
            : self.chance.choice((0, 1, 7, 8, 9, self.chance.randrange(len(self.sound))))
        ]

    def longer(self) -> bytes:
        return self.sound + self.chance.randbytes(self.chance.choice((1, 8, 1000)))

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
        key = self.chance.choice([key for key in header if key != "__metadata__"])
        shape = header[key].get("shape") or [1]
        new = (
            shape[::-1], [1, *shape], [*shape, 1], [shape[0] * shape[-1]],
            [*shape[:-1], 1, shape[-1]],
        )  # fmt: skip
        header[key]["shape"] = self.chance.choice(new)
        return _file(header, body)

    def resized(self) -> bytes:
        """Tensors that are larger, smaller or empty, and lie where their entries say."""
        header, body = _header(self.sound)
        chosen = self.chance.sample(sorted(header.keys() - {"__metadata__"}), 2)
        for key in chosen:
            shape = header[key]["shape"] or [self.chance.choice((0, 2))]
            place = self.chance.randrange(len(shape))
            shape[place] = max(0, shape[place] + self.chance.choice((-1, 1, 3, -(10**6))))
            header[key]["shape"] = shape
        return _laid_out(header, body)

    def missing(self) -> bytes:
        """Some tensors fewer, and no trace of them."""
        header, body = _header(self.sound)
        keys = sorted(header.keys() - {"__metadata__"})
        for key in self.chance.sample(keys, self.chance.choice((1, 1, 2, len(keys) - 1))):
            del header[key]
        return _laid_out(header, body)

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
        key = self.chance.choice([key for key in header if key != "__metadata__"])
        start = header[key]["data_offsets"][0]
        bad = {
            "F16": (b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"),
            "F32": (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"),
        }[header[key]["dtype"]]
        spoilt[start : start + len(bad[0])] = self.chance.choice(bad)
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
                    b"{", b'{"a": 1' + b"0" * 9000 + b"}", b'{"__metadata__": {}}',
                    self.chance.randbytes(300), b'{"a\\ud800": 1}',
                )
            ),
            b"",
        )  # fmt: skip


@contextmanager
def _little_memory() -> Iterator[None]:
    """No more than 200 MB above what there is now, not even for a moment."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is there now
    before = _status("VmRSS")
    yield
    assert _status("VmHWM") - before < MOST_MEGABYTES


def _status(field: str) -> float:
    """MB of memory, as the kernel counts them."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1e3
    raise AssertionError(field)


def _use(path: Path, model: Any, cut: bool = True, merge: bool = True) -> str:
    """Everything that people do with a file; the sentence of a refusal, or nothing."""
    cache, sentences = LoRACache(), []
    try:
        inspector.inspect(path).text()
    except LoRAFileError as error:
        sentences.append(str(error))
    try:
        opened = cache.open(path, Limits())
        applied = comfy_host.apply_lora(
            model, None, opened.state, 1.0, 1.0, path.name, metadata=opened.metadata
        )
        if merge:  # as the sampler does: what was taken must not fail there
            weights(applied.model)
        if cut:
            cache.open(path, Limits(max_rank=1))
    except (LoRAFileError, comfy_host.HostError) as error:
        sentences.append(str(error))
    for sentence in sentences:
        assert sentence.isprintable() and sentence.startswith((str(path), path.name)), sentence
        assert len(sentence) < 1000
    return sentences[-1] if sentences else ""


@pytest.mark.parametrize("make", [_sound, _sound_of_other_kinds])
def test_two_thousand_spoilt_files(model: Any, tmp_path: Path, caplog: Any, make: Any):
    """A thousand of a plain LoRA, and as many of one that has a layer of every kind."""
    sound = make(model)
    path = tmp_path / "x.safetensors"
    path.write_bytes(sound)
    assert _use(path, model) == "", "the sound one is taken"
    made = Mutations(sound, random.Random(7))
    ways = [name for name in vars(Mutations) if not name.startswith("_")]
    told: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    patches, uuid = dict(model.patches), model.patches_uuid
    with _little_memory(), caplog.at_level(logging.ERROR):
        for number in range(COUNT // 2):
            way = ways[number % len(ways)]
            path.write_bytes(getattr(made, way)())
            started = time.process_time()
            sentence = _use(path, model, cut=number % 5 == 0, merge=number % 3 == 0)
            assert time.process_time() - started < MOST_SECONDS, way
            (told if sentence else taken)[way] += 1
            assert model.patches == patches and model.patches_uuid == uuid
            # ComfyUI writes an error, and samples on, where it cannot make sense of a patch.
            assert not caplog.records, (way, caplog.text)
    assert set(told) == set(ways), f"never refused: {set(ways) - set(told)}"
    for way in ("cut", "longer", "overlap", "weights", "text"):
        assert not taken[way], f"{way} was taken {taken[way]} times"
    assert sum(taken.values()) > COUNT // 20, "some are still sound"


def test_a_hundred_megabytes_of_metadata(model: Any, tmp_path: Path):
    header, body = _header(_sound(model))
    header["__metadata__"] = {"ss_tag_frequency": "x" * 100_000_000}
    path = tmp_path / "x.safetensors"
    path.write_bytes(_file(header, body))
    del header, body
    with _little_memory():
        refused = _use(path, model)
    assert "its header would take 100 MB, and 10 MB is the most" in refused


@pytest.mark.parametrize(
    "part", ["[],", "{},", '"ab",', "1,", "1.5,", '"\\"",', '{"a":1},', "null,"]
)
def test_headers_that_would_swell_in_memory(tmp_path: Path, part: str):
    """Ten million bytes of lists would take a quarter of a billion once they are read."""
    path = tmp_path / "x.safetensors"
    count = 9_999_900 // len(part)
    path.write_bytes(_file(f'{{"a":[{part * count}0]}}'.encode(), b""))
    started = time.process_time()
    with _little_memory(), pytest.raises(LoRAFileError, match="is not a safetensors file"):
        lora_header.read_header(path)
    assert time.process_time() - started < MOST_SECONDS


@pytest.mark.parametrize("end", ["", ".lora_down.weight", ".diff"])
def test_more_tensors_than_any_lora_has(model: Any, tmp_path: Path, end: str):
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(_file({f"{n}{end}": entry for n in range(20_000)}, b""))
    started = time.process_time()
    with _little_memory():
        assert _use(path, model, cut=False)
    assert time.process_time() - started < 2 * MOST_SECONDS
    path.write_bytes(_file({f"{n}": entry for n in range(120_000)}, b""))
    with _little_memory():
        assert "has more parts than any LoRA's" in _use(path, model)


@contextmanager
def _linked(loras: Path, **targets: Path) -> Iterator[None]:
    loras.mkdir(parents=True, exist_ok=True)
    links = {loras / f"{name}.safetensors": target for name, target in targets.items()}
    try:
        for link, target in links.items():
            link.symlink_to(target)
        yield
    finally:
        for link in links:
            link.unlink(missing_ok=True)


def test_links_out_of_the_folder(model: Any, comfy_directory: Path, tmp_path: Path):
    """They are followed, as ComfyUI does for models on another disk, to a file that may be one."""
    secret, other, disk = tmp_path / "secret.txt", tmp_path / "other.ckpt", tmp_path / "disk"
    for path in (secret, other):
        path.write_text("root:x:0:0")
    disk.mkdir()
    sound, cached, words = disk / "sound.safetensors", disk / ("0a1b" * 16), disk / "passwd"
    for path in (sound, cached):
        path.write_bytes(_sound(model))
    words.write_text("root:x:0:0")
    pipe = disk / "pipe.safetensors"
    os.mkfifo(pipe)
    loras = comfy_directory / "output" / "loras"
    with _linked(
        loras, secret=secret, other=other, sound=sound, cached=cached, words=words, pipe=pipe,
        gone=tmp_path / "gone.safetensors", loop=loras / "loop.safetensors",
    ):  # fmt: skip
        for name in ("sound", "cached"):
            assert _use(comfy_host.lora_path(f"{name}.safetensors"), model) == ""
        for name in ("secret", "other"):
            with pytest.raises(comfy_host.HostError, match="link to another kind of file"):
                comfy_host.lora_path(f"{name}.safetensors")
        for name in ("gone", "pipe", "loop"):
            with pytest.raises(comfy_host.HostError, match="is not in a loras folder"):
                comfy_host.lora_path(f"{name}.safetensors")
        refused = _use(comfy_host.lora_path("words.safetensors"), model)
        assert "is not a safetensors file" in refused and "root" not in refused


def test_a_linked_folder(model: Any, comfy_directory: Path, tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(_sound(model))
    folder = comfy_directory / "output" / "loras" / "disk"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(tmp_path, target_is_directory=True)
    try:
        assert _use(comfy_host.lora_path("disk/x.safetensors"), model) == ""
    finally:
        folder.unlink()


def test_names_that_leave_the_folders(comfy_directory: Path):
    loras = comfy_directory / "output" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    there = loras / "there.safetensors"
    there.write_bytes(b"")
    try:
        assert comfy_host.lora_path("there.safetensors") == there
        assert comfy_host.lora_path("./there.safetensors").samefile(there)
        for name in (
            str(there), "../there.safetensors", "x/../there.safetensors", "..\\there.safetensors",
            "C:\\there.safetensors", "C:there.safetensors", "\\\\host\\there.safetensors",
            "//host/share/there.safetensors", "..",
        ):  # fmt: skip
            with pytest.raises(comfy_host.HostError, match="leads out of the loras folders"):
                comfy_host.lora_path(name)
        for name in ("", "missing.safetensors", "a\0b.safetensors", "x" * 5000, "a\nb", "\ud800"):
            with pytest.raises(comfy_host.HostError, match="not in a loras folder") as caught:
                comfy_host.lora_path(name)
            assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    finally:
        there.unlink()


def test_what_is_no_file(tmp_path: Path):
    fifo, folder, loop = (tmp_path / f"{name}.safetensors" for name in ("fifo", "folder", "loop"))
    os.mkfifo(fifo)
    folder.mkdir()
    loop.symlink_to(loop)
    missing = tmp_path / "missing.safetensors"
    for path in (fifo, folder, loop, missing, Path("/dev/zero"), Path("a\0b"), Path("\ud800")):
        started = time.monotonic()
        with pytest.raises(LoRAFileError, match="does not exist") as caught:
            lora_header.read_header(path)
        assert time.monotonic() - started < 1 and str(caught.value).isprintable()
