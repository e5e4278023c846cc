"""A training whose frozen weights are kept in fp8: what it takes, computes and learns."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.adapters.frozen import eight_bits, is_in_eight_bits
from lora2_pack.lora2_core.comfy_host import class_images
from lora2_pack.lora2_core.comfy_host.models import keep_less
from lora2_pack.lora2_core.comfy_host.painting import Painter
from lora2_pack.lora2_core.config.train import DataConfig, SampleConfig, TrainConfig
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.training.memory import SDXL, Memory, scaled
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.host import demo
from lora2_pack.tests.host.test_estimate import _memory_on_meta
from lora2_pack.tests.host.test_gradients import FP32, Reference, _step, check_equal, check_near
from lora2_pack.tests.host.test_training import check_same_through_both
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
Parts = tuple[Any, Any, Any]


@pytest.fixture(scope="module")
def trained(comfyui: Any) -> Parts:
    return demo.build(None)


def _prepare(parts: Parts, config: TrainConfig, cache: Path | None = None) -> TrainingSetup:
    with torch.inference_mode():  # as nodes are
        return comfy_host.prepare_training(*parts, demo.photos(), config, cache=cache)


def _storages(unet: nn.Module) -> int:
    kept = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in unet.parameters()}
    return sum(storage.nbytes() for storage in kept.values())


def _rounded(unet: nn.Module) -> int:
    """Round a copy's weights as they are kept in fp8; how many."""
    count = 0
    for layer in unet.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.numel() >= 4096:
            found = eight_bits(layer.weight.detach())
            assert found is not None
            layer.weight.data.copy_(found.cast(layer.weight.dtype))
            count += 1
    return count


# --- what it takes ----------------------------------------------------------------------------


def test_the_copy_takes_half_and_is_told_so(
    parts: Parts, model: Any, monkeypatch: pytest.MonkeyPatch
):
    """And is in eight bits before it is moved to where it is trained."""
    moved: list[int] = []
    original = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(module).__name__ == "UNetModel":
            moved.append(_storages(module))
        return original(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    config = {"precision": "bf16", "steps": 2}
    found = {
        kind: _prepare(parts, demo.settings(frozen_weights=kind, **config))
        for kind in ("as precision", "fp8")
    }
    unets = {kind: setup.task.model.diffusion_model for kind, setup in found.items()}
    plain, eight = (_storages(unet) for unet in unets.values())
    assert moved == [plain, eight]
    assert plain == sum(2 * p.numel() for p in unets["fp8"].parameters())
    kept = [p for p in unets["fp8"].parameters() if p.dtype == FP8]
    assert eight == plain - sum(p.numel() for p in kept)
    assert 0.5 < eight / plain < 0.52
    told = {kind: setup.estimate.memory for kind, setup in found.items()}
    assert told["as precision"].frozen == plain
    assert told["fp8"].frozen == eight + max(2 * p.numel() for p in kept)
    least = comfy_host.plan_training(
        *parts, demo.photos(), demo.settings(frozen_weights="fp8", **config)
    ).least_memory
    assert least == Memory(told["fp8"].frozen, told["fp8"].learning, 0)
    # Names, classes and what is found by them are those of the plain copy.
    ways = [[(n, type(m)) for n, m in unet.named_modules()] for unet in unets.values()]
    assert ways[0] == ways[1]
    assert found["fp8"].base_hash == found["as precision"].base_hash
    assert found["fp8"].config.precision == "bf16"
    # All layers that are worth it, adapted or not.
    left = [
        name
        for name, m in unets["fp8"].named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and not is_in_eight_bits(m)
    ]
    assert all(unets["fp8"].get_submodule(name).weight.numel() < 4096 for name in left)
    assert not any("attn" in name for name in left)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sdxl_in_fp8(checkpointing: bool):
    changes = {"gradient_checkpointing": checkpointing}
    config, plain = TrainConfig(frozen_weights="fp8", **changes), TrainConfig(**changes)
    memory = _memory_on_meta("SDXL", config)
    assert 2.6e9 < memory.frozen < 2.7e9  # 2.57 billion weights of a byte, and the largest cast
    told = scaled(SDXL, TrainConfig(), config)
    assert told.frozen == pytest.approx(memory.frozen, rel=0.01)
    assert told.learning == pytest.approx(memory.learning, rel=0.01)
    # Convolutions in fp8 keep no input, which nobody scales: a quarter of what checkpoints leave.
    assert 0.7 * told.activations < memory.activations < 1.1 * told.activations
    assert memory.total < scaled(SDXL, TrainConfig(), plain).total - 2.4e9


# --- what it computes -------------------------------------------------------------------------


def _weights(model: Any) -> dict[str, Tensor]:
    unet = model.model.diffusion_model
    found = {name: value.clone() for name, value in unet.state_dict().items()}
    for name, layer in unet.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.numel() >= 4096:
            eight = eight_bits(layer.weight.detach())
            assert eight is not None
            found[f"{name}.weight"] = eight.cast(torch.float32)
    return found


def test_gradients_are_those_of_the_rounded_weights(parts: Parts, model: Any):
    """With convolutions adapted; and the same, bit by bit, with gradient checkpointing."""
    settings = {"targets": "attention+ff+conv", "frozen_weights": "fp8"}
    step = _step(parts, **settings)
    with torch.inference_mode(False):
        wanted, loss = Reference(_weights(model), step).gradients()
    assert step.loss == pytest.approx(loss, rel=1e-5)
    check_near(step.grads, wanted, FP32, FP32)
    check_equal(_step(parts, **settings, gradient_checkpointing=True).grads, step.grads)


def test_nothing_of_a_cast_weight_is_kept_and_nothing_folds_alone(
    parts: Parts, model: Any, monkeypatch: pytest.MonkeyPatch
):
    setup = _prepare(parts, demo.settings(precision="bf16", frozen_weights="fp8"))
    unet = setup.task.model.diffusion_model
    assert {stack.dtype for stack in setup.network.all_stacks} == {torch.bfloat16}
    for stack in setup.network.all_stacks:
        monkeypatch.setattr(stack, "folded_alone", None)
    shapes = {p.shape for p in unet.parameters() if p.dtype == FP8}
    kept: Counter[torch.dtype] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape in shapes:
            kept[tensor.dtype] += 1
        return tensor

    trainer = Trainer(setup.network, setup.task, setup.config, setup.entropy)
    steps = trainer.run()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in range(3):
            next(steps)
    assert kept.keys() == {FP8}


# --- what it learns ---------------------------------------------------------------------------


def _run(parts: Parts, rounded: bool = False, **changes: Any) -> tuple[list[float], list[float]]:
    """Losses of all steps, and those on fixed noise."""
    settings = {"steps": 40, "learning_rate": 3e-3, "probes": 1, "precision": "bf16", **changes}
    setup = _prepare(parts, demo.settings(**settings))
    if rounded:
        assert _rounded(setup.task.model.diffusion_model) > 200
    events = list(Trainer(setup.network, setup.task, setup.config, setup.entropy).run())
    return [e.loss for e in events], [e.probe for e in events if e.probe is not None]


def test_it_learns_as_much(trained: Parts):
    """The noise is a run in bf16 on weights that were rounded before: the same but for the order
    of sums. In 100 steps at 96 px the loss on fixed noise begins 1.4 % above that of bf16, as the
    model itself is rounded, and falls by 19.6 %, there by 20.0 %, and with another seed by 19.5 %.
    """
    plain, eight = _run(trained), _run(trained, frozen_weights="fp8")
    rounded = _run(trained, rounded=True)
    apart = [
        statistics.fmean(abs(a / b - 1) for a, b in zip(found[0], plain[0], strict=True))
        for found in (eight, rounded)
    ]
    learnt = [1 - probes[-1] / probes[0] for _, probes in (plain, eight, rounded)]
    print(apart, learnt, plain[1], eight[1], rounded[1])
    assert 0 < apart[0] < 1.25 * apart[1] < 0.06
    assert learnt[0] > 0.05
    assert learnt[1] == pytest.approx(learnt[0], rel=0.15)
    assert learnt[1] == pytest.approx(learnt[2], rel=0.15)


def test_the_lora_goes_onto_the_user_s_model(parts: Parts, model: Any, tmp_path: Path):
    """By our loader and by ComfyUI's own, and it is no other base to it than without fp8."""
    path = tmp_path / "cat.safetensors"
    config = demo.settings(precision="bf16", frozen_weights="fp8")
    job = TrainingJob(_prepare(parts, config), path, guard=comfy_host.deaf_to_cancel)
    job.start()
    assert job.wait(60) and job.progress.error is None
    file = lora_file.load(path)
    assert file.metadata["ss_fp8_base"] == "True"
    assert '"frozen_weights": "fp8"' in file.metadata["lora2.config"]
    applied = comfy_host.apply_lora(model, None, file, 1.0, 1.0, path.name)
    assert len(applied.model.patches) == len(lora_file.component_keys(file.state))
    assert "another base" not in applied.note
    check_same_through_both(model, path)
    _prepare(parts, demo.settings(precision="bf16"))
    assert applied.note == comfy_host.apply_lora(model, None, file, 1.0, 1.0, path.name).note


# --- what goes on with it ---------------------------------------------------------------------


def test_pictures_are_painted_on_it(trained: Parts):
    """As on a copy whose weights are rounded, and not as on one whose are not."""
    samples = SampleConfig(prompts=("a cat",))
    pictures = []
    for kind, rounded in (("fp8", False), ("as precision", True), ("as precision", False)):
        config = demo.settings(precision="fp32", samples=samples, frozen_weights=kind)
        setup = _prepare(trained, config)
        if rounded:
            _rounded(setup.task.model.diffusion_model)
        assert setup.painter is not None
        pictures.append(setup.painter.paint(["a cat"], 3, (64, 64), 4, 5.0))
    apart = [float((one - pictures[0]).abs().mean()) for one in pictures[1:]]
    assert apart[0] < 1e-4 < 1e-2 < apart[1], apart


def test_class_images_of_another_kind_are_painted_anew(
    trained: Parts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(class_images, "_STEPS", 1)
    painted: list[int] = []
    paint = Painter.paint
    monkeypatch.setattr(
        Painter, "paint", lambda self, *args: (painted.append(1), paint(self, *args))[1]
    )
    data = DataConfig(class_prompt="a cat", class_images=1)
    for kind, count in (("fp8", 1), ("as precision", 2), ("fp8", 2), ("as precision", 2)):
        _prepare(trained, demo.settings(data=data, frozen_weights=kind), tmp_path)
        assert len(painted) == count, kind


def test_a_run_whose_convolutions_keep_no_input_is_the_same(trained: Parts):
    """As on a GPU; and is told to take less."""
    settings = demo.settings(steps=4)
    plain = _prepare(trained, settings)
    with torch.inference_mode():
        plan = comfy_host.plan_training(*trained, demo.photos(), settings)
        keep_less(plan.private)
        lean = comfy_host.carry_out(plan)
    assert plain.estimate is not None and lean.estimate is not None
    kept = [setup.estimate.memory.activations for setup in (plain, lean)]
    assert kept[1] < 0.95 * kept[0]
    losses = [[e.loss for e in Trainer(s.network, s.task, s.config, s.entropy).run()]
              for s in (plain, lean)]  # fmt: skip
    assert losses[0] == losses[1]
