"""What the model is trained in, and how its prediction is told, on real ComfyUI objects."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.host import demo


@pytest.fixture(scope="module")
def parts(comfyui: Any) -> tuple[Any, Any, Any]:
    return demo.build(4)


def sampled_as(model: Any, kind: str) -> Any:
    """The MODEL after ComfyUI's own node has changed its sampling."""
    return ModelSamplingDiscrete().patch(model, kind, False)[0]


@pytest.mark.parametrize(("kind", "name"), [("eps", "EPS"), ("v_prediction", "V_PREDICTION")])
def test_the_prediction_is_that_of_the_sampling(parts: Any, kind: str, name: str):
    model = sampled_as(parts[0], kind)
    assert comfy_host.prediction_of(model) == name
    config = demo.settings(steps=1)
    setup = comfy_host.prepare_training(model, *parts[1:], demo.photos(), config)
    assert setup.task.prediction == name


@pytest.mark.parametrize("kind", ["x0", "lcm"])
def test_other_sampling_is_refused(parts: Any, kind: str):
    with pytest.raises(comfy_host.HostError, match="model is sampled neither"):
        comfy_host.check_model(sampled_as(parts[0], kind))


@pytest.mark.parametrize(
    ("asked", "used", "scaled"),
    [("auto", "fp32", False), ("bf16", "bf16", False), ("fp16", "fp16", True)],
)
def test_only_fp16_scales_its_loss(parts: Any, asked: str, used: str, scaled: bool):
    config = demo.settings(steps=1, precision=asked)
    setup = comfy_host.prepare_training(*parts, demo.photos(), config)
    assert setup.config.precision == used
    trainer = Trainer(setup.network, setup.task, setup.config, setup.entropy)
    assert trainer.scaler.is_enabled() == scaled


@pytest.mark.parametrize(("card", "used"), [(True, "bf16"), (False, "fp16")])
def test_auto_prefers_bf16_to_fp16(parts: Any, monkeypatch: Any, card: bool, used: str):
    # This machine loads the demo model in fp32; on a graphics card ComfyUI computes SDXL in fp16.
    model = parts[0].clone()
    monkeypatch.setattr(model.model, "manual_cast_dtype", torch.float16)
    management = comfy.model_management
    monkeypatch.setattr(management, "should_use_bf16", lambda *_: card)
    setup = comfy_host.prepare_training(model, *parts[1:], demo.photos(), demo.settings(steps=1))
    assert setup.config.precision == used
