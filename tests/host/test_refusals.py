"""Whatever a training is refused for is known before a photo is encoded: through the node itself,
on the demo model."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.comfy_host import models, surface
from lora2_pack.lora2_core.comfy_host.copies import structure
from lora2_pack.lora2_core.config.presets import Options
from lora2_pack.lora2_core.config.train import (
    DataConfig,
    OptimizerConfig,
    SampleConfig,
    TextConfig,
)
from lora2_pack.lora2_core.tiny_sdxl.model import UNET_CONFIG, text_configs
from lora2_pack.lora2_core.training.memory import size
from lora2_pack.lora2_core.training.optimizers.make import OptimizerError
from lora2_pack.nodes import train
from lora2_pack.nodes.train_notes import Notes
from lora2_pack.tests.host import demo
from torch import nn

Parts = tuple[Any, Any, Any]
CPU = torch.device("cpu")
TEXT = TextConfig(learning_rate=1e-4)


class Node(train.LoRA2Train):
    hidden: Any = SimpleNamespace(unique_id="3", prompt={})


def inputs(parts: Parts, **changes: Any) -> dict[str, Any]:
    """What the node is called with, but for the lists around it."""
    plain = {
        "images": torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(7)),
        "instance_prompt": "a photo of sks cat",
        "steps": 1,
        "learning_rate": 1e-4,
        "mode": "balanced",
        "target_rank": 2.0,
        "file_name": "refusals/cat",
        "batch_size": 1,
        "resolution": 64,
        "seed": 0,
        "precision": "auto",
        "entropy_weight": 0.0,
        "targets": "attention",
        "schedule": "constant",
    }
    return {**dict(zip(("model", "clip", "vae"), parts, strict=True)), **plain, **changes}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what any VAE has encoded."""
    seen: list[tuple[int, ...]] = []
    encode = comfy.sd.VAE.encode

    def counted(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(pixels.shape))
        return encode(vae, pixels)

    monkeypatch.setattr(comfy.sd.VAE, "encode", counted)
    return seen


# --- what is refused --------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Changed inputs, made of the demo's parts, and words of the refusal."""

    words: str
    change: Callable[[Parts], dict[str, Any]] = lambda _: {}
    spoil: Callable[[pytest.MonkeyPatch], None] = field(default=lambda _: None)


def plain(words: str, **changes: Any) -> Case:
    return Case(words, lambda _: changes)


def options(words: str, spoil: Any = lambda _: None, **parts: Any) -> Case:
    return Case(words, lambda _: {"options": Options().joined(**parts)}, spoil)


def without(package: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setitem(sys.modules, package, None)  # type: ignore[arg-type]


def asked(name: str, **settings: Any) -> dict[str, Any]:
    return {"optimizer": OptimizerConfig(**settings), "optimizer_name": name}


def _old_bitsandbytes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pytest.importorskip("bitsandbytes"), "__version__", "0.43.3")


def _no_kernel(patch: pytest.MonkeyPatch) -> None:
    adamw = pytest.importorskip("bitsandbytes.optim.adamw")

    def step(*_: Any) -> None:
        raise NotImplementedError("no kernel for this device\nand more lines")

    patch.setattr(adamw.AdamW8bit, "step", step)


def _full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))


def _in_the_way(patch: pytest.MonkeyPatch) -> None:
    folder = Path(folder_paths.get_output_directory()) / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a_file").write_text("in the way")


def _sd15(parts: Parts) -> dict[str, Any]:
    unet = {key: value for key, value in UNET_CONFIG.items() if key != "num_classes"}
    unet |= {"adm_in_channels": None, "use_linear_in_transformer": False}
    return {"model": _model(comfy.supported_models.SD15(unet))}


def _model(config: Any) -> ModelPatcher:
    config.set_inference_dtype(torch.float32, None)
    return ModelPatcher(config.get_model({}, "", CPU), CPU, CPU)


def _clone(change: Callable[[Any], None]) -> Callable[[Parts], dict[str, Any]]:
    def changed(parts: Parts) -> dict[str, Any]:
        model = parts[0].clone()
        change(model)
        return {"model": model}

    return changed


class Injection:
    def inject(self, _: Any) -> None: ...

    def eject(self, _: Any) -> None: ...


def _flux_vae(_: Parts) -> dict[str, Any]:
    state = comfy.taesd.taesd.TAESD(latent_channels=16).state_dict()
    return {"vae": comfy.sd.VAE(sd={**state, "vae_scale": torch.tensor(0.3611)})}


def _sd15_clip(_: Parts) -> dict[str, Any]:
    small = {"clip_l_model_config": text_configs()["clip_l_model_config"]}
    target = comfy.supported_models.SD15({}).clip_target()
    target.params = {}
    options = {**small, "dtype": torch.float32, "custom_operations": structure.plain()}
    clip = comfy.sd.CLIP(target, model_options=options)
    for weight in clip.cond_stage_model.parameters():
        nn.init.normal_(weight, std=0.05)
    return {"clip": clip}


MASK = torch.zeros(2, 64, 96)
MASK[:, :, :4] = 1  # what a centred square leaves out

CASES = {
    # packages
    "no bitsandbytes": options(
        r"adamw8bit.*pip install bitsandbytes", without("bitsandbytes"), **asked("adamw8bit")
    ),
    "no prodigyopt": options(
        r"prodigy.*pip install prodigyopt", without("prodigyopt"), **asked("prodigy")
    ),
    "old bitsandbytes": options(r"0\.44 or newer", _old_bitsandbytes, **asked("adamw8bit")),
    "no kernel": options(
        r"adamw8bit.*cpu\S* \(no kernel for this device\).*adamw\.$",
        _no_kernel,
        **asked("adamw8bit"),
    ),
    "two rates": options(
        "one learning rate for all", text=TextConfig(learning_rate=0.5), **asked("prodigy")
    ),
    "no part of ComfyUI": options(
        r"lacks comfy\.some\.thing.*painting samples",
        lambda patch: patch.setattr(
            surface, "MISSING", {surface.Part.PAINTING: "comfy.some.thing"}
        ),
        samples=SampleConfig(prompts=("a cat",)),
    ),
    # the device: a type in which the CPU has no convolution
    "precision": Case(
        r"precision is fp16, and cpu\S* cannot train in it.*choose fp32",
        lambda _: {"precision": "fp16"},
        lambda patch: patch.setitem(models.DTYPES, "fp16", torch.float8_e4m3fn),
    ),
    "frozen weights": options(
        r"frozen_weights is fp8, and cpu\S* cannot keep .*float8_e4m3fn\); choose 'as precision'",
        lambda patch: patch.delattr(torch, "float8_e4m3fn"),
        frozen_weights="fp8",
    ),
    # layers and ranks
    "targets of nothing": plain("no_such_layer", targets="no_such_layer"),
    "broken targets": plain("regular expression", targets="("),
    "text targets of nothing": options(
        "'nothing' matches no layer", text=TextConfig(1e-4, targets="nothing")
    ),
    "max_rank": plain("max_rank is 4000", max_rank=4000),
    "target_rank": plain("target_rank is 128", max_rank=128, target_rank=128.0),
    "too large": plain("target_megabytes is 5000", target_megabytes=5000.0),
    "too small": plain(r"target_megabytes is 0\.001", target_megabytes=0.001),
    "no such group": Case(
        "group_targets names 'cross'",
        lambda _: {
            "targets": "self-attention",
            "options": Options(rank=(("group_targets", (("cross", 2.0),)),)),
        },
    ),
    "resolution": plain("resolution is 100", resolution=100),
    # models
    "SD 1.5": Case("model is of the BaseModel family", _sd15),
    "inpainting": Case(
        "inpainting",
        lambda _: {"model": _model(comfy.supported_models.SDXL({**UNET_CONFIG, "in_channels": 9}))},
    ),
    "no model": plain("model is of the NoneType family", model=None),
    "LCM": Case(
        "sampled neither",
        lambda parts: {"model": ModelSamplingDiscrete().patch(parts[0], "lcm", False)[0]},
    ),
    "beside the weights": Case(
        "model carries 'bypass_lora'",
        _clone(lambda model: model.set_injections("bypass_lora", [Injection()])),
    ),
    "another U-Net": Case(
        "U-Net replaced",
        _clone(lambda model: model.add_object_patch("diffusion_model", nn.Identity())),
    ),
    "VAE of Flux": Case("vae makes latents of 16 channels", _flux_vae),
    "empty VAE": Case("vae is empty", lambda _: {"vae": comfy.sd.VAE(sd={})}),
    "no VAE": plain("vae is empty", vae=None),
    "no CLIP": plain("clip is empty", clip=None),
    "CLIP of SD 1.5": Case("clip gives text embeddings of width", _sd15_clip),
    "CLIP of SD 1.5 to train": Case(
        "the text encoders of SDXL are trained",
        lambda parts: {**_sd15_clip(parts), "options": Options(text=TEXT)},
    ),
    # photos
    "small photo": plain("96×32 px", images=torch.zeros(1, 32, 96, 3)),
    "captions": plain("captions has 3 entries for 2", captions=["a", "b", "c"]),
    "mask": plain("only what the centred cut", masks=MASK),
    "class images": plain("class_prompt is empty", class_images=torch.zeros(1, 64, 64, 3)),
    # the file
    "name": plain("file_name is '../cat'", file_name="../cat"),
    "folder": Case("a_file", lambda _: {"file_name": "a_file/cat"}, _in_the_way),
    "disk": Case("is full: the LoRA needs", spoil=_full),
}
LISTS = ("captions",)  # inputs that come as lists of their own


@pytest.mark.parametrize("name", CASES)
def test_no_photo_is_encoded_for_what_is_refused(
    parts: Parts,
    model: Any,
    encoded: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
):
    case = CASES[name]
    changed = inputs(parts, **case.change(parts))
    case.spoil(monkeypatch)
    lists = {key: value if key in LISTS else [value] for key, value in changed.items()}
    with (
        pytest.raises((ValueError, RuntimeError), match=case.words) as refusal,
        torch.inference_mode(),
    ):
        Node.execute(**lists)
    assert "\n" not in str(refusal.value)
    assert encoded == []


def test_what_is_not_refused_is_encoded(parts: Parts, model: Any, encoded: list[tuple[int, ...]]):
    """Else nothing would be shown by what is not."""
    plan = comfy_host.plan_training(*parts, demo.photos(2), demo.settings())
    assert encoded == []
    setup = comfy_host.carry_out(plan)
    assert encoded == [(1, 64, 64, 3)] * 2
    assert plan.expected_bytes == setup.network.expected_bytes()
    assert plan.ranks == setup.network.ranks
    assert setup.estimate is not None
    assert plan.least_memory == dataclasses.replace(setup.estimate.memory, activations=0)


def test_what_cannot_fit_is_told_before(
    parts: Parts, encoded: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """No machine is so small; the model and the settings are real."""
    plan = comfy_host.plan_training(*parts, demo.photos(2), demo.settings())
    assert list(train._about_memory(plan)) == []
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda _: 1_000_000)
    [line] = train._about_memory(plan)
    assert size(plan.least_memory.total) in line and "there are 1.0 MB in all" in line
    assert "set frozen_weights to fp8" in line and encoded == []
    assert "gradient_checkpointing" not in line  # of what lies there all the time it saves nothing


def test_folders_that_a_run_can_do_without_are_told_of(monkeypatch: pytest.MonkeyPatch):
    blocked = Path(folder_paths.get_output_directory()) / "lora2_samples" / "blocked"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("in the way")
    path = comfy_host.new_lora_path("blocked/cat")
    plain, sampled = demo.settings(), demo.settings(samples=SampleConfig(prompts=("a cat",)))
    assert list(train._about_folders(plain, path)) == []
    [line] = train._about_folders(sampled, path)
    assert line.startswith("Samples of this run will not be kept: ") and "blocked" in line
    monkeypatch.setattr(comfy_host, "checkpoint_folder", lambda: blocked)
    [line] = train._about_folders(plain, path)
    assert line.startswith("Checkpoints of this run will not be kept: ")


# --- presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["12 GB", "8 GB", "6 GB", "paper (SDXL)", "paper (KOALA-700m)"])
def test_a_preset_does_without_a_package(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, preset: str
):
    one = {**inputs(parts, preset=preset), "options": Options()}
    notes = Notes("3")
    one.pop("images")
    assert train._config(one, notes).optimizer.name == "adamw8bit"
    assert not any("stands in" in line for line in notes.lines)
    without("bitsandbytes")(monkeypatch)
    assert train._config(one, notes).optimizer == OptimizerConfig("adamw")
    assert notes.lines[-1] == (
        f"The preset {preset}: optimizer is adamw8bit, which needs the package bitsandbytes: "
        "install it into ComfyUI's Python (pip install bitsandbytes) or choose adamw. Until then "
        "adamw stands in, with 16 bytes of memory for each number that learns instead of 10.1."
    )


def test_who_asks_for_it_by_name_is_refused(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    without("bitsandbytes")(monkeypatch)
    for preset in ("as set above", "12 GB"):
        one = inputs(parts, preset=preset, options=Options().joined(**asked("adamw8bit")))
        one.pop("images")
        with pytest.raises(OptimizerError, match="pip install bitsandbytes"):
            train._config(one, Notes("3"))


def test_options_that_say_nothing_of_8_bits_leave_it_to_the_preset(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
):
    without("bitsandbytes")(monkeypatch)
    told = Options().joined(data=DataConfig(trigger="sks"), optimizer=OptimizerConfig(ema=0.9))
    one = inputs(parts, preset="12 GB", options=told)
    one.pop("images")
    found = train._config(one, Notes("3"))
    assert found.optimizer == OptimizerConfig("adamw", ema=0.9)
