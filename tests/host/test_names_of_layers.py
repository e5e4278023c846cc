"""One layer under every name that a trainer gives it: loaded, inspected, written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.utils
import pytest
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.config.load import Limits
from lora2_pack.lora2_core.reports import inspector
from lora2_pack.lora2_core.resizing.recent import LoRACache
from lora2_pack.lora2_core.resizing.resize import resize_file
from lora2_pack.tests.host.demo import weights
from safetensors.torch import save_file
from torch import Tensor

SGM = "input_blocks.4.1.transformer_blocks.0.attn1.to_{}"
DIFFUSERS = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{}"
PROCESSOR = DIFFUSERS.replace(".to_", ".processor.to_")
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
OLD, LOOSE = ("_lora.down.weight", "_lora.up.weight"), (".lora.down.weight", ".lora.up.weight")
LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
# A layer of the U-Net, without what stands for q, k, v or out; the endings of both factors.
NAMINGS = {
    "kohya, ComfyUI's blocks": ("lora_unet_" + SGM.replace(".", "_"), KOHYA),
    "kohya, diffusers' blocks": ("lora_unet_" + DIFFUSERS.replace(".", "_"), KOHYA),
    "diffusers": (f"unet.{DIFFUSERS}", PEFT),
    "diffusers, kohya's endings": (f"unet.{DIFFUSERS}", KOHYA),
    "diffusers, loose endings": (f"unet.{DIFFUSERS}", LOOSE),
    "diffusers, processors": (f"unet.{PROCESSOR}", OLD),
    "diffusers, processors, no prefix": (PROCESSOR, OLD),
    "a U-Net alone": (DIFFUSERS, PEFT),
    "PEFT": (f"base_model.model.{DIFFUSERS}", PEFT),
    "PEFT on a pipeline": (f"base_model.model.unet.{DIFFUSERS}", PEFT),
    "PEFT on ComfyUI's": (f"base_model.model.{SGM}", PEFT),
    "PEFT, an adapter's name": (
        f"base_model.model.{DIFFUSERS}", (".lora_A.default.weight", ".lora_B.default.weight"),
    ),
    "ComfyUI": (f"diffusion_model.{SGM}", PEFT),
    "ComfyUI, kohya's endings": (f"diffusion_model.{SGM}", KOHYA),
    "a checkpoint's": (f"model.diffusion_model.{SGM}", KOHYA),
    "dotted": (f"lora_unet.{DIFFUSERS}", KOHYA),
    "kohya, its OFT": ("oft_unet_" + SGM.replace(".", "_"), KOHYA),
    "LyCORIS": ("lycoris_" + SGM.replace(".", "_"), KOHYA),
    "LyCORIS, diffusers' blocks": ("lycoris_" + DIFFUSERS.replace(".", "_"), KOHYA),
    "LyCORIS, with the network": ("lycoris_unet_" + SGM.replace(".", "_"), KOHYA),
}  # fmt: skip
SHORT = TEXT.removeprefix("text_model.")  # of transformers 5, in the encoder without a projection
PROCESSORS = TEXT.replace("q_proj", "to_q")  # of diffusers, before it trained text encoders by PEFT
TEXTS = {
    "kohya": ("lora_te1_" + TEXT.replace(".", "_"), "lora_te2_" + TEXT.replace(".", "_"), KOHYA),
    "diffusers": (f"text_encoder.{TEXT}", f"text_encoder_2.{TEXT}", PEFT),
    "diffusers, linear layers": (f"text_encoder.{TEXT}", f"text_encoder_2.{TEXT}", LINEAR),
    "diffusers, transformers 5": (f"text_encoder.{SHORT}", f"text_encoder_2.{TEXT}", PEFT),
    "kohya, transformers 5": (
        "lora_te1_" + SHORT.replace(".", "_"), "lora_te2_" + TEXT.replace(".", "_"), KOHYA
    ),
    "diffusers, processors": (f"text_encoder.{PROCESSORS}", f"text_encoder_2.{PROCESSORS}", OLD),
    "dotted": (f"lora_te1.{TEXT}", f"lora_te2.{TEXT}", KOHYA),
}  # fmt: skip


def _factors(weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out, inside = weight.shape
    down = torch.randn(3, inside, generator=generator) / 10
    return down, torch.randn(out, 3, generator=generator) / 10


def _changed(parts: Any, path: Path) -> dict[str, Tensor]:
    """Weights that a file changes, and by how much."""
    model, clip, _ = parts
    applied = comfy_host.apply_lora(
        model, clip, LoRACache().open(path, Limits()), 1.0, 1.0, path.name
    )
    assert applied.note == ""
    both: dict[str, Tensor] = {}
    for after, before in ((applied.model, model), (applied.clip.patcher, clip.patcher)):
        new = weights(after)
        old = weights(before)
        both |= {k: new[k] - old[k] for k in new if not torch.equal(new[k], old[k])}
    return both


def _check(parts: Any, tmp_path: Path, state: dict[str, Tensor], wanted: dict[str, Tensor]):
    path, again = tmp_path / "x.safetensors", tmp_path / "again.safetensors"
    save_file(state, path)
    assert len(inspector.inspect(path).components) == len(wanted)
    resize_file(path, again, Limits())
    for file, most in ((path, 1e-4), (again, 1e-3)):
        got = _changed(parts, file)
        assert got.keys() == wanted.keys()
        for key, change in wanted.items():
            assert float((got[key] - change).norm() / change.norm()) < most, key


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_layer_of_the_u_net(parts: Any, tmp_path: Path, naming: str):
    name, (down_end, up_end) = NAMINGS[naming]
    state, wanted = {}, {}
    for seed, projection in enumerate(("q", "k", "v", "out.0")):
        key = f"diffusion_model.{SGM.format(projection)}.weight"
        down, up = _factors(comfy.utils.get_attr(parts[0].model, key), seed)
        wanted[key] = up @ down
        written = projection if down_end != OLD[0] else projection.removesuffix(".0")
        base = name.format(written if "." in name else written.replace(".", "_"))
        state |= {base + down_end: down, base + up_end: up}
    _check(parts, tmp_path, state, wanted)


@pytest.mark.parametrize("naming", TEXTS)
def test_a_layer_of_both_text_encoders(parts: Any, tmp_path: Path, naming: str):
    first, second, (down_end, up_end) = TEXTS[naming]
    state, wanted = {}, {}
    for seed, (name, tower) in enumerate(((first, "clip_l"), (second, "clip_g"))):
        key = f"{tower}.transformer.{TEXT}.weight"
        down, up = _factors(comfy.utils.get_attr(parts[1].cond_stage_model, key), seed)
        wanted[key] = up @ down
        state |= {name + down_end: down, name + up_end: up}
    _check(parts, tmp_path, state, wanted)
