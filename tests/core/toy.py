"""Small models and tasks on which the laws of the core can be checked in milliseconds."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora2_pack.lora2_core import adaptive_rank, lora_file
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.rank_change import RankChange
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import OptimizerConfig, TrainConfig
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.lora2_core.training.objective import Prediction
from lora2_pack.lora2_core.training.optimizers.make import make_optimizer
from lora2_pack.lora2_core.training.optimizers.state import follow
from lora2_pack.lora2_core.training.trainer import StepEvent, train
from lora2_pack.tests.core.stacked import by_component, grad_of, places
from PIL import Image
from torch import Tensor, nn

torch.set_num_threads(1)


class Attention(nn.Module):
    """The projections and the arithmetic of a ComfyUI attention block."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)

        def split(t: Tensor) -> Tensor:
            return t.view(t.shape[0], t.shape[1], self.heads, -1).transpose(1, 2)

        mixed = nn.functional.scaled_dot_product_attention(split(q), split(k), split(v))
        return self.to_out(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context_width, heads)
        self.ff = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, context)
        return x + self.ff(x)


class Transformer(nn.Module):
    """A few blocks with self- and cross-attention, named as in SDXL, frozen."""

    def __init__(self, blocks: int = 2, width: int = 16, context_width: int = 12, heads: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, context_width, heads) for _ in range(blocks))
        freeze(self, seed=1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, context)
        return x


class Parallel(nn.Module):
    """Linear layers side by side, each with an input of its own: (batch, layers, width)."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        freeze(self, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.layers)], 1)


@torch.no_grad()
def freeze(module: nn.Module, seed: int) -> None:
    """Seeded weights, none of them learnable."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values / max(1, parameter.shape[-1]) ** 0.5)
    module.requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entropy_in_numpy(query: Tensor, key: Tensor, heads: int) -> float:
    """−E_p[log p] by a plain softmax in float64, averaged over images, heads and image tokens."""
    q, k = (
        t.double().numpy().reshape(t.shape[0], t.shape[1], heads, -1).swapaxes(1, 2)
        for t in (query, key)
    )
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    p = np.exp(scores)
    p /= p.sum(-1, keepdims=True)
    return float(-(p * np.log(p)).sum(-1).mean())


class Endless:
    """A task whose draws are new each time, so that there is no order to remember."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        assert state == {}


class TransformerTask(Endless):
    """Noise in, a fixed random map of it out; ``scale`` multiplies prediction and target."""

    def __init__(self, model: Transformer, scale: float = 1.0):
        self.model, self.scale = model, scale
        width = model.blocks[0].attn1.to_q.in_features
        self.context_width = model.blocks[0].attn2.to_k.in_features
        generator = torch.Generator().manual_seed(3)
        self.matrix = torch.randn(width, width, generator=generator) / width**0.5

    def draw(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 6, self.matrix.shape[0], generator=generator)
        return x, torch.randn(size, 5, self.context_width, generator=generator)

    def spread(self, generator: torch.Generator, count: int, size: int) -> list[Any]:
        return [self.draw(generator, size) for _ in range(-(-count // size))]

    def predict(self, batch: Any) -> Prediction:
        x, context = batch
        return Prediction(self.scale * self.model(x, context), self.scale * x @ self.matrix)


class TeacherTask(Endless):
    """Layers that lack an update of a known rank each: the task that ranks should follow."""

    def __init__(self, student: Parallel, true_ranks: Sequence[int], scale: float = 1.0):
        self.student, self.scale = student, scale
        width = student.layers[0].in_features
        generator = torch.Generator().manual_seed(4)
        updates = []
        for layer, rank in zip(student.layers, true_ranks, strict=True):
            up = torch.randn(width, rank, generator=generator)
            down = torch.randn(rank, width, generator=generator)
            updates.append(layer.weight.detach() + up @ down / width)  # singular values near 1
        self.weight = torch.stack(updates)  # (layers, out, in)
        self.bias = torch.stack([layer.bias.detach() for layer in student.layers])

    def draw(self, generator: torch.Generator, size: int) -> Tensor:
        return torch.randn(size, *self.weight.shape[::2], generator=generator)

    def spread(self, generator: torch.Generator, count: int, size: int) -> list[Tensor]:
        return [self.draw(generator, size) for _ in range(-(-count // size))]

    def predict(self, batch: Tensor) -> Prediction:
        target = torch.einsum("loi,bli->blo", self.weight, batch) + self.bias
        return Prediction(self.scale * self.student(batch), self.scale * target)


def adapt(
    model: nn.Module, targets: str = "attention", seed: int = 0, **rank: Any
) -> AdaptiveRankNetwork:
    """Adapters on ``model``; ``rank`` goes to the configuration of the given or default mode."""
    config = RankConfig.for_mode(rank.pop("mode", "balanced"), **rank)
    return AdaptiveRankNetwork(model, find_targets(model, targets), config, seed)


def run(
    network: AdaptiveRankNetwork,
    task: Any,
    entropy: Any = None,
    stop_at: int | None = None,
    **settings: Any,
):
    """Train to the end, or to the end of a step; returns the events."""
    settings = {"entropy_weight": 0.0, "probes": 0, "learning_rate": 1e-2, **settings}
    config = TrainConfig(rank=network.config, **settings)
    return list(itertools.islice(train(network, task, config, entropy), stop_at))


def teacher_run(
    true_ranks: Sequence[int], width: int = 24, scale: float = 1.0, seed: int = 0, **options: Any
) -> tuple[AdaptiveRankNetwork, list[StepEvent]]:
    """One run on a :class:`TeacherTask`. Keys of TrainConfig go there, the rest to RankConfig."""
    settings = {k: options.pop(k) for k in ("steps", "learning_rate", "probes") if k in options}
    student = Parallel(len(true_ranks), width)
    task = TeacherTask(student, true_ranks, scale)
    network = adapt(student, r"layers", seed, **options)
    return network, run(network, task, batch_size=16, seed=seed, **settings)


def component(
    name: str = "blocks.0.attn1.to_q",
    rank: int = 4,
    shape: tuple[int, ...] = (24, 16),
    seed: int = 0,
    up_scale: float = 1.0,
    importance: Tensor | None = None,
) -> Component:
    """A trained component with random weights; ``shape``: (out, in) or (out, in, kh, kw)."""
    generator = torch.Generator().manual_seed(seed)
    out, inner = shape[0], shape[1:]
    down = torch.randn(rank, *inner, generator=generator) / inner[0] ** 0.5
    up = up_scale * torch.randn(out, rank, *(1 for _ in inner[1:]), generator=generator)
    if importance is None:
        importance = torch.exp(-0.2 * torch.arange(rank))
    return Component(name, down, up, importance, nu=0.2)


def random_steps(net: AdaptiveRankNetwork, optimizer, steps: int) -> None:
    """Steps with gradients that belong to a row and a step, however many rows there are."""
    for step in range(steps):
        for weight in net.weights():
            weight.grad = torch.zeros_like(weight)
        for grad in by_component(net, grad_of):
            drawn = torch.Generator().manual_seed(step)
            grad.copy_(torch.randn(64, grad.shape[1], generator=drawn)[: len(grad)])
        optimizer.step()


def snapshot(net: AdaptiveRankNetwork, optimizer) -> list[dict[str, Tensor]]:
    """Weight and moments of A and B of every component, rows are ranks."""
    parts = [by_component(net)]
    parts += [
        by_component(net, lambda weight, name=name: optimizer.state[weight][name])
        for name in ("exp_avg", "exp_avg_sq")
    ]
    found = [
        {name: part.clone() for name, part in zip(("weight", "m", "v"), one, strict=True)}
        for one in zip(*parts, strict=True)
    ]
    stacks = [stack for stack, _ in places(net)]
    for one, weight in zip(found, (w for s in stacks for w in (s.down, s.up)), strict=True):
        one["step"] = optimizer.state[weight]["step"].clone()
    return found


def trained(net: AdaptiveRankNetwork, steps: int = 3) -> torch.optim.Adam:
    """The trainer's optimizer after a few steps."""
    optimizer = make_optimizer(OptimizerConfig(), [(net.weights(), 1e-2)])
    random_steps(net, optimizer, steps)
    return optimizer


def resize(net: AdaptiveRankNetwork, ranks: Sequence[float], optimizer) -> RankChange:
    """To the given ranks, without hysteresis when the network has none; the optimizer follows."""
    change = net.resize(adaptive_rank.nu_for_rank(1.0, 0.9) / torch.tensor(ranks))
    follow(optimizer, change)
    return change


@torch.no_grad()
def silence(net: AdaptiveRankNetwork) -> None:
    """B = 0 everywhere: what is left is the frozen model."""
    for layer in net.layers:
        layer.lora_up.zero_()
    net.refresh()


def infos_in_memory(components: Sequence[Component]) -> list[lora_file.ComponentInfo]:
    """What ``inspect`` should say of an fp16 file of these components, told without a file."""
    return [
        lora_file.ComponentInfo(
            key=lora_file.kohya_key(c.name),
            rank=int(c.importance.numel()) if c.lora_up.any() else 0,
            in_features=math.prod(c.lora_down.shape[1:]),
            out_features=c.lora_up.shape[0],
            nu=c.nu,
            nbytes=2 * (c.lora_down.numel() + c.lora_up.numel()) if c.lora_up.any() else 0,
            kind="conv" if c.lora_up.any() and c.lora_down[0, 0].numel() > 1 else "lora",
        )
        for c in components
    ]


def exact_delta(component: Component) -> Tensor:
    """B Λ A in float64."""
    up, down = (t.double().flatten(1) for t in (component.lora_up, component.lora_down))
    return up @ torch.diag(component.importance.double()) @ down


def stored_delta(state: dict[str, Tensor], key: str) -> Tensor:
    """What every loader makes of the tensors, in float64."""
    down, up = (state[f"{key}.lora_{s}.weight"].double().flatten(1) for s in ("down", "up"))
    return up @ down * (float(state[key + ".alpha"]) / down.shape[0])


def raw_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """The disk as good as full: no file of this process may grow beyond ``nbytes``."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def unprivileged_folder(mode: int) -> Iterator[Path]:
    """A folder of ``mode``, seen as an ordinary user even where the tests run as root."""
    if not hasattr(os, "geteuid"):
        pytest.skip("permissions are POSIX")
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()
    (folder / "x.safetensors").write_bytes(b"content")
    (folder / "x.safetensors").chmod(0)
    folder.chmod(mode)
    try:
        if user == 0:
            os.seteuid(65534)
        yield folder
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def entry(shape: list[int], start: int, dtype: str = "F16") -> dict:
    end = start + 2 * torch.Size(shape).numel()
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


PAIR = {"k.lora_down.weight": entry([2, 3], 0), "k.lora_up.weight": entry([4, 2], 12)}
GOOD = raw_file(PAIR, bytes(28))


UNREADABLE = {
    "cut in its data": (GOOD[:-1], "is cut short: .* Download or copy it again"),
    "cut in its header": (GOOD[:50], "is cut short: .*its header.* Download or copy it again"),
    "empty": (b"", "is not a safetensors file"),
    "random": (bytes(range(7, 256)) * 9, "is not a safetensors file"),
    "pickle": (pickle.dumps({"a": [1.0]}), "is not a safetensors file.*pickled"),
    "giant header": (struct.pack("<Q", 1 << 62) + b"{}", "is not a safetensors file"),
    "list": (raw_file([1, 2]), "is not a safetensors file"),
    "number for an entry": (raw_file({"k": 3}), "is not a safetensors file"),
}


def meta(**metadata: object) -> bytes:
    return raw_file({"__metadata__": metadata, **PAIR}, bytes(28))


DAMAGED = {
    "nested too deep": raw_file(b"[" * 100_000),
    "metadata is a list": raw_file({"__metadata__": [1], **PAIR}, bytes(28)),
    "no shape": raw_file({**PAIR, "k.lora_up.weight": {"data_offsets": [12, 28]}}, bytes(28)),
    "no partner": raw_file({"k.lora_down.weight": entry([2, 3], 0)}, bytes(12)),
    "no dimension": raw_file({**PAIR, "k.lora_down.weight": entry([], 0)}, bytes(28)),
}
FOREIGN = {
    "a list": meta(**{"lora2.components": "[1, 2]"}),
    "a component without ν": meta(**{"lora2.components": '{"k": {"rank": 2}}'}),
    "a component without shape": meta(**{"lora2.components": '{"z": {"nu": 1}}'}),
}


def thumbnail(size: int = 16, kind: str = "JPEG") -> str:
    """A picture as ModelSpec has it in the metadata of a file."""
    data = io.BytesIO()
    Image.new("RGB", (size, size), (200, 30, 30)).save(data, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
