"""What every writer of LoRA files writes, and what its own mathematics makes of a weight.

Tensors are as the writers lay them out; ``new`` is calculated in fp64 from those same tensors,
without this pack and without ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
NAMED = (".lora_A.default.weight", ".lora_B.default.weight")
OLD = ("_lora.down.weight", "_lora.up.weight")
LOOSE = (".lora.down.weight", ".lora.up.weight")
LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")

_ROOTS = {
    "unet": "diffusion_model.", "te1": "clip_l.transformer.", "te2": "clip_g.transformer.",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One module of the demo model by its names: ComfyUI's, which ``root`` is put before, and
    diffusers'."""

    ours: str
    diffusers: str
    root: str = "unet"

    @property
    def weight(self) -> str:
        """Its key in the model."""
        return _ROOTS[self.root] + self.ours


_BLOCK = ("input_blocks.4", "down_blocks.1.{}.0")


def _attention(end: str) -> Layer:
    there = f"1.{end}", _BLOCK[1].format("attentions")
    return Layer(f"{_BLOCK[0]}.{there[0]}", f"{there[1]}.{end}")


def _resnet(end: str, theirs: str) -> Layer:
    return Layer(f"{_BLOCK[0]}.0.{end}", f"{_BLOCK[1].format('resnets')}.{theirs}")


MATRICES = (
    *(_attention(f"transformer_blocks.0.attn1.to_{p}") for p in ("q", "k", "v", "out.0")),
    _attention("transformer_blocks.0.attn2.to_k"),
    _attention("transformer_blocks.0.ff.net.0.proj"),
    _attention("proj_in"),
    _resnet("emb_layers.1", "time_emb_proj"),
)
KERNELS = (
    _resnet("in_layers.2", "conv1"),
    Layer("output_blocks.3.0.skip_connection", "up_blocks.1.resnets.0.conv_shortcut"),
)
# Those that B-LoRA trains, of the demo model: in SDXL their blocks are the same.
B_LORA = tuple(
    Layer(f"output_blocks.{n}.1.transformer_blocks.0.attn{of}.to_{p}",
          f"up_blocks.0.attentions.{n}.transformer_blocks.0.attn{of}.to_{p}")
    for n in (0, 1) for of in (1, 2) for p in ("q", "k", "v", "out.0")
)  # fmt: skip
NORMS = (_resnet("in_layers.0", "norm1"), _attention("transformer_blocks.0.norm1"))
TEXTS = tuple(
    Layer(name, name, root)
    for root in ("te1", "te2")
    for name in (
        "text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A component: tensors by their endings, and the weight that they make of another."""

    tensors: State
    new: Callable[[Tensor], Tensor]  # fp64 in, fp64 out
    of_bias: bool = False


Make = Callable[["Draws", torch.Size], Written]


@dataclass
class Draws:
    """Numbers from a seed, and the settings of a file's components."""

    seed: int = 0
    rank: int = 3
    alpha: float | None = 2.0
    dtype: torch.dtype = torch.float32
    ends: tuple[str, str] = KOHYA

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def some(self, *shape: int, scale: float = 0.1) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self.dtype)

    @property
    def strength(self) -> State:
        return {} if self.alpha is None else {".alpha": torch.tensor(self.alpha).to(self.dtype)}

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else float(self.strength[".alpha"]) / self.rank


def added(tensors: State, delta: Tensor) -> Written:
    return Written(tensors, lambda weight: weight + delta.reshape(weight.shape))


def lora(draws: Draws, shape: torch.Size) -> Written:
    out, inside, *kernel = shape
    down = draws.some(draws.rank, inside, *kernel)
    up = draws.some(out, draws.rank, *(1 for _ in kernel))
    delta = up.double().flatten(1) @ down.double().flatten(1) * draws.scale
    return added(dict(zip(draws.ends, (down, up), strict=True)) | draws.strength, delta)


def rolled(draws: Draws, shape: torch.Size) -> Written:
    """As ComfyUI's TrainLoraNode writes a convolution: both factors are matrices."""
    return lora(draws, torch.Size((shape[0], shape[1:].numel())))


def three_factors(draws: Draws, shape: torch.Size) -> Written:
    out, inside, *kernel = shape
    down, up = draws.some(draws.rank, inside, 1, 1), draws.some(out, draws.rank, 1, 1)
    mid = draws.some(draws.rank, draws.rank, *kernel)
    made = torch.einsum("or,rsyx,si->oiyx", up.double()[..., 0, 0], mid.double(),
                        down.double()[..., 0, 0])  # fmt: skip
    tensors = {KOHYA[0]: down, KOHYA[1]: up, ".lora_mid.weight": mid}
    return added(tensors | draws.strength, made * draws.scale)


def dora(
    draws: Draws, shape: torch.Size, ending: str = ".dora_scale", by: str = "out", make: Make = lora
) -> Written:
    """m · (W + ΔW) / ‖W + ΔW‖, norms of rows, or of columns as older LyCORIS and OneTrainer."""
    plain = make(draws, shape)
    size = shape[0] if by == "out" else shape[1]
    magnitudes = (draws.some(size) + 1.0).abs().to(draws.dtype)
    ones = [1 for _ in shape[2:]]
    place = (-1, 1, *ones) if by == "out" else (1, -1, *ones)
    told = magnitudes.reshape(place)
    if "vector" in ending:
        told = magnitudes if len(shape) == 2 else magnitudes.reshape(1, -1, *ones)

    def new(weight: Tensor) -> Tensor:
        changed = plain.new(weight)
        axes = [n for n in range(len(shape)) if n != (0 if by == "out" else 1)]
        length = changed.square().sum(axes, keepdim=True).sqrt()
        return changed / length * magnitudes.double().reshape(place)

    return Written(plain.tensors | {ending: told}, new)


def peft_dora(draws: Draws, shape: torch.Size) -> Written:
    return dora(draws, shape, ".lora_magnitude_vector")


def dora_by_input(draws: Draws, shape: torch.Size) -> Written:
    return dora(draws, shape, by="in")


def loha(draws: Draws, shape: torch.Size) -> Written:
    flat = shape[1:].numel()
    parts = {
        f".hada_w{n}_{part}": draws.some(*size, scale=0.3)
        for n in (1, 2)
        for part, size in (("a", (shape[0], draws.rank)), ("b", (draws.rank, flat)))
    }
    a, b, c, d = (tensor.double() for tensor in parts.values())
    return added(parts | draws.strength, (a @ b) * (c @ d) * draws.scale)


def loha_with_cores(draws: Draws, shape: torch.Size) -> Written:
    out, inside, *kernel = shape
    parts = {}
    for n in (1, 2):
        parts[f".hada_t{n}"] = draws.some(draws.rank, draws.rank, *kernel, scale=0.5)
        parts[f".hada_w{n}_a"] = draws.some(draws.rank, out, scale=0.5)
        parts[f".hada_w{n}_b"] = draws.some(draws.rank, inside, scale=0.5)
    made = [
        torch.einsum("ijyx,jr,ip->pryx", *(parts[key].double() for key in
                     (f".hada_t{n}", f".hada_w{n}_b", f".hada_w{n}_a")))
        for n in (1, 2)
    ]  # fmt: skip
    return added(parts | draws.strength, made[0] * made[1] * draws.scale)


def lokr(draws: Draws, shape: torch.Size, whole: str = "1") -> Written:
    """``whole``: which of both matrices are no products."""
    out, flat = shape[0], shape[1:].numel()
    sizes = {"1": (4, 2), "2": (out // 4, flat // 2)}
    parts, made = {}, []
    for n, (rows, columns) in sizes.items():
        if n in whole:
            shaped = (rows, columns) if n == "1" or len(shape) == 2 else (
                rows, shape[1] // 2, *shape[2:])  # fmt: skip
            parts[f".lokr_w{n}"] = draws.some(*shaped, scale=0.3)
            made.append(parts[f".lokr_w{n}"].double().flatten(1))
        else:
            parts[f".lokr_w{n}_a"] = draws.some(rows, draws.rank, scale=0.3)
            parts[f".lokr_w{n}_b"] = draws.some(draws.rank, columns, scale=0.3)
            made.append(parts[f".lokr_w{n}_a"].double() @ parts[f".lokr_w{n}_b"].double())
    scale = 1.0 if whole == "12" else draws.scale
    delta = torch.kron(made[0], made[1]) * scale
    return added(parts | draws.strength, delta)


def lokr_of_products(draws: Draws, shape: torch.Size) -> Written:
    return lokr(draws, shape, "")


def whole_lokr(draws: Draws, shape: torch.Size) -> Written:
    return lokr(draws, shape, "12")


def glora(draws: Draws, shape: torch.Size) -> Written:
    out, inside, *kernel = shape
    ones = [1 for _ in kernel]
    a1, a2 = draws.some(inside, draws.rank, *ones), draws.some(draws.rank, inside, *ones)
    b1, b2 = draws.some(out, draws.rank, *ones), draws.some(draws.rank, inside, *kernel)
    both = a1.double().flatten(1) @ a2.double().flatten(1)
    added_ = b1.double().flatten(1) @ b2.double().flatten(1)

    def new(weight: Tensor) -> Tensor:
        turned = torch.einsum("oi...,ij->oj...", weight, both)
        return weight + (turned + added_.reshape(weight.shape)) * draws.scale

    tensors = {f".{end}.weight": t for end, t in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2),
                                                     strict=True)}  # fmt: skip
    return Written(tensors | draws.strength, new)


def dora_of_loha(draws: Draws, shape: torch.Size) -> Written:
    return dora(draws, shape, make=loha)


def dora_of_lokr(draws: Draws, shape: torch.Size) -> Written:
    return dora(draws, shape, make=lokr)


def _rotations(blocks: Tensor, constraint: float) -> Tensor:
    skew = blocks.double() - blocks.double().transpose(-1, -2)
    if constraint and float(skew.norm()) > constraint:
        skew = skew * constraint / skew.norm()
    one = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return (one + skew) @ torch.linalg.inv(one - skew)


def oft(
    draws: Draws, shape: torch.Size, rescaled: bool = False, bound: float = 0.0, own: bool = False
) -> Written:
    """LyCORIS' diag-oft; ``bound``: its ``constraint``, which counts times the outputs, but not
    where ComfyUI's ``own`` trainer writes it."""
    blocks = draws.some(shape[0] // 8, 8, 8)
    turns = _rotations(blocks, bound * (1 if own else shape[0]))
    tensors = {".oft_blocks": blocks, ".alpha": torch.tensor(bound)}
    ones = [1 for _ in shape[1:]]
    scales = (draws.some(shape[0], *ones) + 1).to(draws.dtype)
    if rescaled:
        tensors[".rescale"] = scales

    def new(weight: Tensor) -> Tensor:
        rows = weight.reshape(len(blocks), 8, -1)
        turned = torch.einsum("knm,knx->kmx", turns, rows).reshape(weight.shape)
        return turned * scales.double() if rescaled else turned

    return Written(tensors, new)


def rescaled_oft(draws: Draws, shape: torch.Size) -> Written:
    return oft(draws, shape, rescaled=True)


def bounded_oft(draws: Draws, shape: torch.Size) -> Written:
    return oft(draws, shape, bound=1 / 32)


def own_oft(draws: Draws, shape: torch.Size) -> Written:
    return oft(draws, shape, bound=1.0, own=True)


def boft(draws: Draws, shape: torch.Size, bound: float = 0.0) -> Written:
    """LyCORIS' BOFT: rotations of blocks of 8, each step with the rows in another order."""
    blocks = draws.some(2, shape[0] // 8, 8, 8)
    turns = _rotations(blocks, bound * shape[0])

    def new(weight: Tensor) -> Tensor:
        for step, turn in enumerate(turns):
            reach = 2**step * 4
            order = torch.arange(len(weight)).reshape(-1, 2, reach).transpose(1, 2).flatten()
            rows = weight[order].reshape(len(turn), 8, -1)
            turned = torch.einsum("bij,bjx->bix", turn, rows).reshape(weight.shape)
            weight = torch.empty_like(turned).index_copy(0, order, turned)
        return weight

    return Written({".oft_blocks": blocks, ".alpha": torch.tensor(bound)}, new)


def bounded_boft(draws: Draws, shape: torch.Size) -> Written:
    return boft(draws, shape, 1 / 32)


def difference(draws: Draws, shape: torch.Size) -> Written:
    delta = draws.some(*shape)
    return added({".diff": delta}, delta.double())


def set_weight(draws: Draws, shape: torch.Size) -> Written:
    new = draws.some(*shape)
    return Written({".set_weight": new}, lambda _: new.double())


def norm(draws: Draws, shape: torch.Size) -> Written:
    delta = draws.some(*shape)
    return added({".w_norm": delta}, delta.double())


def bias(draws: Draws, shape: torch.Size) -> Written:
    delta = draws.some(*shape)
    return Written({".diff_b": delta}, lambda old: old + delta.double(), of_bias=True)


# Names of layers as writers put them; of a text encoder where they have one.
_TEXT = {"te1": "text_encoder", "te2": "text_encoder_2"}


def kohya(layer: Layer, prefix: str = "lora") -> str:
    return f"{prefix}_{layer.root}_" + layer.ours.replace(".", "_")


def kohya_of_diffusers(layer: Layer, prefix: str = "lora") -> str:
    return f"{prefix}_{layer.root}_" + layer.diffusers.replace(".", "_")


def dotted(layer: Layer) -> str:
    return f"lora_{layer.root}.{layer.diffusers}"


def diffusers(layer: Layer) -> str:
    return f"{_TEXT.get(layer.root, 'unet')}.{layer.diffusers}"


def processors(layer: Layer) -> str:
    name = layer.diffusers.replace(".to_", ".processor.to_").removesuffix(".0")
    return f"{_TEXT.get(layer.root, 'unet')}.{name}"


def peft(layer: Layer) -> str:
    return f"base_model.model.{layer.diffusers}"


def comfyui(layer: Layer) -> str:
    return layer.weight if layer.root == "unet" else f"text_encoders.{layer.weight}"


def lycoris(layer: Layer) -> str:
    return "lycoris_" + layer.diffusers.replace(".", "_")


def of_model(parts: Any, layer: Layer, bias: bool = False) -> Tensor:
    """The weight of a layer in the demo model, or its bias."""
    root = parts[0].model if layer.root == "unet" else parts[1].cond_stage_model
    module = root.get_submodule(layer.weight)
    return module.bias if bias else module.weight
