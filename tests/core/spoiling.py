"""Files to spoil, sound ones of every kind, and the ways to spoil them."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import safetensors.torch
import torch
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.lora2_core.files.header import ITEM_BYTES
from lora2_pack.tests.core import toy
from torch import Tensor

LARGE = (1e5, -1e9, 9e14, 1e16, -1e20, 1e38, 1e-45, 0.0)
HUGE = (1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30)
NAMES = (
    "", "../../etc/passwd", "__class__", "a" * 5000, "\x00\n\x1b[31m", "💣", "lora_unet_", ".alpha",
    ".lora_down.weight", "lora_unet_x.lora_down.weight", "__metadata__",
)  # fmt: skip


Layer = tuple[str, int, int]  # dotted name, outputs, inputs


def noise(*shape: int) -> Tensor:
    return toy.noise(*shape, seed=sum(shape)) / 10


def sound(layers: Sequence[Layer]) -> bytes:
    """A LoRA of LoRA²'s own for ``layers``."""
    components = [
        Component(name, noise(2, inside), noise(out, 2), torch.ones(2), 0.1)
        for name, out, inside in layers
    ]
    return lora_file.encode(lora_file.to_state(components), {"ss_tag_frequency": "{}", "x": "y"})


def sound_of_other_kinds(layers: Sequence[Layer]) -> bytes:
    """A layer of every kind that ComfyUI applies, a LoRA under PEFT's names among them."""
    state: dict[str, Tensor] = {}
    for (layer, out, inside), make in zip(layers, KINDS.values(), strict=False):
        for end, tensor in make(out, inside).items():
            state[f"diffusion_model.{layer}{end}"] = tensor
    assert len(layers) >= len(KINDS)
    return safetensors.torch.save(state)


def sound_of_two_factors(layers: Sequence[Layer], way: str) -> bytes:
    """What can be resized and added, as another trainer writes it; ``way``: of TWO_FACTORS."""
    state: dict[str, Tensor] = {}
    for name, out, inside in layers:
        for end, tensor in TWO_FACTORS[way](out, inside).items():
            state[("lora_unet_" + name.replace(".", "_") if way in KOHYA else name) + end] = tensor
    if way == "with embeddings":
        state["bundle_emb.sks.string_to_param.*"] = noise(2, 8)
    return safetensors.torch.save(state, {"ss_network_dim": "2", "modelspec.trigger_phrase": "sks"})


KINDS: dict[str, Callable[[int, int], dict[str, Tensor]]] = {
    "PEFT": lambda out, inside: {
        ".lora_A.weight": noise(2, inside), ".lora_B.weight": noise(out, 2),
        ".alpha": torch.tensor(2.0),
    },
    "DoRA": lambda out, inside: {
        ".lora_down.weight": noise(2, inside), ".lora_up.weight": noise(out, 2),
        ".dora_scale": noise(out, 1) + 1, ".alpha": torch.tensor(1.0),
    },
    "LoHa": lambda out, inside: {
        ".hada_w1_a": noise(out, 3), ".hada_w1_b": noise(3, inside),
        ".hada_w2_a": noise(out, 2), ".hada_w2_b": noise(2, inside),
        ".alpha": torch.tensor(1.0),
    },
    "LoKr": lambda out, inside: {
        ".lokr_w1": noise(4, 4), ".lokr_w2_a": noise(out // 4, 2),
        ".lokr_w2_b": noise(2, inside // 4), ".alpha": torch.tensor(1.0),
    },
    "LoKr of products": lambda out, inside: {
        ".lokr_w1_a": noise(4, 2), ".lokr_w1_b": noise(2, 4),
        ".lokr_w2": noise(out // 4, inside // 4),
    },
    "GLoRA": lambda out, inside: {
        ".a1.weight": noise(inside, 2), ".a2.weight": noise(2, inside),
        ".b1.weight": noise(out, 2), ".b2.weight": noise(2, inside),
        ".alpha": torch.tensor(1.0),
    },
    "OFT": lambda out, inside: {".oft_blocks": noise(4, out // 4, out // 4)},
    "difference": lambda out, inside: {".diff": noise(out, inside)},
    "rescaled OFT": lambda out, _: {
        ".oft_blocks": noise(out // 4, 4, 4), ".rescale": noise(out, 1) + 1,
        ".alpha": torch.tensor(0.1),
    },
    "BOFT": lambda out, _: {
        ".oft_blocks": noise(2, out // 4, 4, 4), ".rescale": noise(out, 1) + 1,
        ".alpha": torch.tensor(0.0),
    },
    "LoKr, whole": lambda out, inside: {
        ".lokr_w1": noise(4, 4), ".lokr_w2": noise(out // 4, inside // 4),
    },
    "a weight that is set": lambda out, inside: {".set_weight": noise(out, inside)},
}  # fmt: skip


def _pair(out: int, inside: int, *kernel: int) -> dict[str, Tensor]:
    one = [1 for _ in kernel]
    return {
        ".lora_down.weight": noise(2, inside, *kernel), ".lora_up.weight": noise(out, 2, *one),
        ".alpha": torch.tensor(1.0),
    }  # fmt: skip


TWO_FACTORS: dict[str, Callable[[int, int], dict[str, Tensor]]] = {
    "kohya": _pair,
    "convolutions": lambda out, inside: _pair(out, inside, 3, 3),
    "half": lambda out, inside: {end: t.half() for end, t in _pair(out, inside).items()},
    "three factors": lambda out, inside: {
        **_pair(out, inside, 1, 1), ".lora_mid.weight": noise(2, 2, 3, 3),
    },
    "ranks above the sides": lambda out, inside: {
        ".lora_down.weight": noise(40, inside), ".lora_up.weight": noise(out, 40),
    },
    "magnitudes": lambda out, inside: {**_pair(out, inside), ".dora_scale": noise(out, 1) + 1},
    "another LoRA²": lambda out, inside: {**_pair(out, inside), ".lora2_nu": torch.tensor(0.1)},
    "PEFT": lambda out, inside: {
        ".lora_A.weight": noise(2, inside), ".lora_B.weight": noise(out, 2),
    },
    "PEFT's magnitudes": lambda out, inside: {
        ".lora_A.default.weight": noise(2, inside), ".lora_B.default.weight": noise(out, 2),
        ".lora_magnitude_vector.default.weight": noise(out) + 1,
    },
    "diffusers": lambda out, inside: {
        "_lora.down.weight": noise(2, inside), "_lora.up.weight": noise(out, 2),
    },
    "another size": lambda out, inside: {
        **_pair(out, inside), ".reshape_weight": torch.tensor([out, inside]),
    },
    "with embeddings": _pair,
    "with biases": lambda out, inside: {**_pair(out, inside), ".diff_b": noise(out)},
    "with whole modules": lambda out, inside: {
        ".lora_A.weight": noise(2, inside), ".lora_B.weight": noise(out, 2),
        ".base_layer.bias": noise(out),
    },
    "linear layers": lambda out, inside: {
        ".lora_linear_layer.down.weight": noise(2, inside),
        ".lora_linear_layer.up.weight": noise(out, 2),
    },
}  # fmt: skip
KOHYA = (
    "kohya",
    "convolutions",
    "half",
    "three factors",
    "another LoRA²",
    "with embeddings",
    "with biases",
)


def header_and_body(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def tensors_of(header: dict[str, Any]) -> list[str]:
    return [key for key in header if key != "__metadata__"]


def laid_out(header: dict[str, Any], body: bytes) -> bytes:
    """The file of these entries, whatever their places were."""
    end = 0
    for key in tensors_of(header):
        entry = header[key]
        size = math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
        entry["data_offsets"] = [end, end + size]
        end += size
    return toy.raw_file(header, (body * (end // max(1, len(body)) + 1))[:end])


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
        header, body = header_and_body(self.sound)
        key = self.chance.choice(tensors_of(header))
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
        return toy.raw_file(header, body)

    def overlap(self) -> bytes:
        header, body = header_and_body(self.sound)
        first, second = self.chance.sample(tensors_of(header), 2)
        header[first]["data_offsets"] = list(header[second]["data_offsets"])
        if self.chance.random() < 0.5:
            header[first]["shape"] = list(header[second]["shape"])
            header[first]["dtype"] = header[second]["dtype"]
        return toy.raw_file(header, body)

    def shape(self) -> bytes:
        """Sound as a file, but not as a LoRA of this model."""
        header, body = header_and_body(self.sound)
        key = self.chance.choice(tensors_of(header))
        shape = header[key].get("shape") or [1]
        new = (
            shape[::-1], [1, *shape], [*shape, 1], [shape[0] * shape[-1]],
            [*shape[:-1], 1, shape[-1]],
        )  # fmt: skip
        header[key]["shape"] = self.chance.choice(new)
        return toy.raw_file(header, body)

    def resized(self) -> bytes:
        """Tensors that are larger, smaller or empty, and lie where their entries say."""
        header, body = header_and_body(self.sound)
        chosen = self.chance.sample(sorted(tensors_of(header)), 2)
        for key in chosen:
            shape = header[key]["shape"] or [self.chance.choice((0, 2))]
            place = self.chance.randrange(len(shape))
            shape[place] = max(0, shape[place] + self.chance.choice((-1, 1, 3, -(10**6))))
            header[key]["shape"] = shape
        return laid_out(header, body)

    def missing(self) -> bytes:
        """Some tensors fewer, and no trace of them."""
        header, body = header_and_body(self.sound)
        keys = sorted(tensors_of(header))
        for key in self.chance.sample(keys, self.chance.choice((1, 1, 2, len(keys) - 1))):
            del header[key]
        return laid_out(header, body)

    def names(self) -> bytes:
        header, body = header_and_body(self.sound)
        key = self.chance.choice(tensors_of(header))
        new = self.chance.choice((*NAMES, key.replace("down", "up"), key.replace("unet", "te1")))
        if self.chance.random() < 0.3:  # twice the same
            text = json.dumps(header).encode()
            text = text.replace(b"{", b"{" + json.dumps(key).encode() + b": 1, ", 1)
            return toy.raw_file(text, body)
        header = {new if name == key else name: value for name, value in header.items()}
        return toy.raw_file(header, body)

    def weights(self) -> bytes:
        header, body = header_and_body(self.sound)
        spoilt = bytearray(body)
        key = self.chance.choice(tensors_of(header))
        start = header[key]["data_offsets"][0]
        bad = {
            "F16": (b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"),
            "F32": (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"),
            "I64": (b"\xff" * 8, b"\0" * 8, b"\1" * 8),
        }[header[key]["dtype"]]
        spoilt[start : start + len(bad[0])] = self.chance.choice(bad)
        return toy.raw_file(header, bytes(spoilt))

    def numbers(self) -> bytes:
        """Finite, and more than can be calculated with."""
        header, body = header_and_body(self.sound)
        spoilt = bytearray(body)
        keys = sorted(tensors_of(header))
        for key in self.chance.sample(keys, self.chance.choice((1, 2, len(keys)))):
            entry, value = header[key], self.chance.choice(LARGE)
            start, end = entry["data_offsets"]
            kind = {"F16": "<e", "F32": "<f", "I64": "<q"}[entry["dtype"]]
            most = {"<e": 65504.0, "<f": 3e38, "<q": 1 << 62}[kind]
            one = struct.pack(kind, type(most)(max(-most, min(most, value))))
            count = (end - start) // len(one)
            filled = count if self.chance.random() < 0.5 else min(1, count)
            spoilt[start : start + filled * len(one)] = one * filled
        return toy.raw_file(header, bytes(spoilt))

    def wide(self) -> bytes:
        """Numbers of 64 bits, which become infinite in 32, and of other types."""
        header, body = header_and_body(self.sound)
        for key in self.chance.sample(sorted(tensors_of(header)), 2):
            header[key]["dtype"] = self.chance.choice(
                ("F64", "BF16", "F8_E4M3", "I32", "U8", "U16")
            )
        return laid_out(header, body)

    def empty(self) -> bytes:
        """Some components of rank 0, or all; or without inputs and outputs."""
        state = safetensors.torch.load(self.sound)
        names = sorted({key.rpartition(".lora")[0] or key.rpartition(".")[0] for key in state})
        chosen = self.chance.sample(names, self.chance.choice((1, 1, len(names))))
        rank = self.chance.random() < 0.7
        for key, tensor in state.items():
            if tensor.dim() < 2 or not key.startswith(tuple(chosen)):
                continue
            first = any(end in key for end in (".lora_down", ".lora_A", "_lora.down", "_b"))
            place = (0 if first else 1) if rank else (1 if first else 0)
            state[key] = tensor.narrow(place, 0, 0).contiguous()
        return safetensors.torch.save(state)

    def dimensions(self) -> bytes:
        """The same numbers in more or fewer dimensions."""
        state = safetensors.torch.load(self.sound)
        for key in self.chance.sample(sorted(state), min(len(state), 3)):
            tensor = state[key]
            state[key] = self.chance.choice((
                tensor.flatten(), tensor[None], tensor[..., None], tensor[..., None, None],
                tensor.flatten(1) if tensor.dim() > 1 else tensor, tensor.squeeze(),
            )).clone()  # fmt: skip
        return safetensors.torch.save(state)

    def beside(self) -> bytes:
        """Alphas, sizes, magnitudes and a ν that nothing fits."""
        state = safetensors.torch.load(self.sound)
        key = self.chance.choice(sorted(state))
        name = key.rpartition(".lora")[0] or key.rpartition(".")[0]
        end = self.chance.choice(
            (".alpha", ".reshape_weight", ".dora_scale", ".lora2_nu", ".lora_mid.weight", ".diff_b",
             ".rescale", ".lora_magnitude_vector", ".hada_t1", ".set_weight"),
        )  # fmt: skip
        state[name + end] = self.chance.choice((
            torch.tensor(1e14), torch.tensor(-3.0), torch.tensor(0.0), torch.ones(0), torch.ones(2),
            torch.tensor([1, 1]), torch.tensor([1 << 40, 1 << 40]), torch.tensor([[3, 4]]),
            torch.ones(3, 3), torch.ones(2, 2, 3, 3), torch.tensor(True), torch.tensor([-1, 5]),
        ))  # fmt: skip
        return safetensors.torch.save(state)

    def metadata(self) -> bytes:
        header, body = header_and_body(self.sound)
        header["__metadata__"] = self.chance.choice(
            (
                None, [], 3, "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"": ""},
                {"lora2.components": "[" * 5000}, {"lora2.components": '{"a": {"nu": 1e999}}'},
                {"lora2.components": '{"a": {"nu": 1, "in": 1e400, "out": 1}}'},
                {"lora2.config": "[" * 9999}, {"ss_tag_frequency": '{"a": {"b": "c"}}'},
                {"modelspec.thumbnail": "data:image/png;base64," + "A" * 4000},
                {"modelspec.trigger_phrase": "\n\x1b[31m" * 50},
                {"lora2.config": '{"precision": []}', "lora2.format_version": "1"},
                {"lora2.config": '{"precision": {}}', "lora2.base_model_hash": "x"},
                {"ss_tag_frequency": '{"a": {"b": 1e999}}'}, {"ss_tag_frequency": '{"a": [1]}'},
                {"ss_tag_frequency": '{"a": {"b": {}}}'}, {"ss_network_dim": "1e999"},
                {"ss_network_args": '{"conv_dim": 1e999}', "ss_network_dim": "-1"},
                {"modelspec.trigger_phrase": "w " * self.chance.choice((9, 2_000_000))},
                {"ss_steps": "9" * 5000, "lora2.mode": "m" * 5000, "lora2.format_version": "1"},
                {"modelspec.thumbnail": toy.thumbnail(), "modelspec.title": "\u202ex\ud83d"},
                {"lora2.components": '{"a": {"nu": [], "in": {}, "out": "x"}}'},
                {"lora2.format_version": "2", "lora2.components": "7"}, {"ss_v2": "True"},
            )
        )  # fmt: skip
        return toy.raw_file(header, body)

    def text(self) -> bytes:
        return toy.raw_file(
            self.chance.choice(
                (
                    b"{" * 9000, b"[" * 9000, b'{"a":' * 9000, b"\xff\xfe{", b"{}", b'{"a": NaN}',
                    b"{", b'{"a": 1' + b"0" * 9000 + b"}", b'{"__metadata__": {}}',
                    self.chance.randbytes(300), b'{"a\\ud800": 1}',
                )
            ),
            b"",
        )  # fmt: skip
