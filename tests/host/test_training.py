"""A whole training in this process: what it learns on, what it writes, what it leaves alone."""

from __future__ import annotations

import gc
import hashlib
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models
import comfy.utils
import numpy as np
import pytest
import safetensors
import torch
from comfy.model_patcher import ModelPatcher
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.comfy_host.copies.structure import plain
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.lora2_core.jobs import job as job_module
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.tiny_sdxl.model import UNET_CONFIG, fill_seeded
from lora2_pack.lora2_core.training.denoising import output_scale
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.tests.host import demo
from lora2_pack.tests.host.demo import photos, settings, weights

Parts = tuple[Any, Any, Any]


def _prepare(parts: Parts, config: TrainConfig) -> TrainingSetup:
    with torch.inference_mode():  # as ComfyUI runs nodes
        return comfy_host.prepare_training(*parts, photos(), config)


def _train(parts: Parts, path: Path, **changes: Any) -> TrainingJob:
    config = settings(**changes)
    job = TrainingJob(_prepare(parts, config), path, guard=comfy_host.deaf_to_cancel)
    job.start()
    assert job.wait(120)
    if job.progress.error is not None:
        raise job.progress.error
    return job


# --- the file ---------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(parts: Parts, model: Any, tmp_path: Path):
    digests = []
    for run, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(run)
        torch.manual_seed(run)  # prompts reseed the global generator as they like
        _train(parts, folder / "x.safetensors", seed=seed, batch_size=2)
        digests.append(hashlib.sha256((folder / "x.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_a_training_leaves_nothing_behind(parts: Parts, model: Any, tmp_path: Path):
    state = torch.get_rng_state()
    before = demo.sample(model.model)
    job = _train(parts, tmp_path / "x.safetensors")
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert torch.equal(demo.sample(model.model), before)
    assert not [t for t in threading.enumerate() if t.name.startswith("LoRA²")]
    assert not any(module._forward_hooks for module in model.model.modules())
    assert job.result is not None and job.result.path.is_file()


def test_the_copy_is_freed_with_the_job(
    parts: Parts, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At once: what a graph paints next wants the card, and Python's collector takes its time."""
    monkeypatch.setattr(job_module, "_LARGE", 1)
    config = settings(gradient_checkpointing=True, frozen_weights="fp8")
    setup = _prepare(parts, config)
    weights = [weakref.ref(weight) for weight in setup.task.model.diffusion_model.parameters()]
    gc.disable()
    try:
        job = TrainingJob(setup, tmp_path / "x.safetensors")
        del setup
        job.start()
        assert job.wait(120) and job.result is not None
        assert all(weight() is None for weight in weights), "the finished job keeps the copy"
    finally:
        gc.enable()


def test_the_files_of_both_loaders_give_the_same_weights(parts: Parts, model: Any, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    _train(parts, path, steps=6)
    check_same_through_both(model, path)


def test_mixed_ranks_and_convolutions(model: Any, tmp_path: Path):
    pattern = r"(attn2\.to_v|in_layers\.2|out_layers\.3|\.op|proj_in|skip_connection)$"
    generator = torch.Generator().manual_seed(1)
    base = model.model.diffusion_model
    components = []
    for number, target in enumerate(find_targets(base, pattern)):
        shape = base.get_submodule(target.name).weight.shape
        rank = min(1 + number % 7, target.largest_rank)
        down = torch.randn(rank, *shape[1:], generator=generator) / 10
        up = torch.randn(shape[0], rank, *([1] * (len(shape) - 2)), generator=generator) / 10
        importance = torch.linspace(1, 0.1, rank)
        components.append(Component(target.name, down, up, importance, 0.1))
    kinds = {component.lora_down.ndim for component in components}
    ranks = {component.importance.numel() for component in components}
    assert kinds == {2, 4} and len(ranks) == 7
    path = lora_file.save(tmp_path / "conv.safetensors", components, {})
    ours = check_same_through_both(model, path)
    plain = weights(model)
    for component in components:
        key = f"diffusion_model.{component.name}.weight"
        scaled = component.lora_up.flatten(1) * component.importance
        delta = (scaled @ component.lora_down.flatten(1)).view_as(plain[key])
        error = (ours[key] - plain[key] - delta).norm() / delta.norm()
        assert error < 1e-3, key  # fp16 in the file


def check_same_through_both(model: Any, path: Path) -> dict[str, torch.Tensor]:
    """Weights under our loader and the stock one, equal; and those numpy makes of the file."""
    state = lora_file.load(path).state
    ours = weights(comfy_host.apply_state(model, None, state, 1.0, 1.0, path.name)[0])
    file = comfy.utils.load_torch_file(str(path), safe_load=True)
    stock = weights(comfy.sd.load_lora_for_models(model, None, file, 1.0, 1.0)[0])
    plain = weights(model)
    keys = demo.lora_key_map(model.model)
    changed = 0
    for key, value in stock.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-7)
    for key in lora_file.component_keys(state):
        up, down = (state[f"{key}.lora_{side}.weight"].double().numpy() for side in ("up", "down"))
        scale = float(state[f"{key}.alpha"]) / down.shape[0]
        delta = scale * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        wanted = plain[keys[key]].double().numpy() + delta.reshape(plain[keys[key]].shape)
        np.testing.assert_allclose(ours[keys[key]].numpy(), wanted, rtol=1e-5, atol=1e-6)
        changed += 1
    assert changed == sum(not torch.equal(ours[key], plain[key]) for key in plain)
    return ours


def test_the_file_says_what_made_it(parts: Parts, model: Any, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    _train(parts, path, seed=4)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "1.0")
    assert len(json.loads(metadata["lora2.components"])) == 136
    assert metadata["ss_steps"] == "3"


# --- what is learnt ---------------------------------------------------------------------------


def test_the_target_of_a_noise_model_is_the_noise(parts: Parts, model: Any):
    setup = _prepare(parts, settings())
    for batch in setup.task.spread(torch.Generator().manual_seed(0), 8, 2):
        with torch.no_grad():
            said = setup.task.predict(batch)
        torch.testing.assert_close(said.target, batch.noise, rtol=1e-4, atol=1e-4)
        assert said.value.shape == said.target.shape


@pytest.mark.parametrize("name", ["EPS", "V_PREDICTION"])
def test_the_difference_is_that_of_the_network_s_own_output(parts: Parts, model: Any, name: str):
    other = _predicting(name)
    setup = _prepare((other, *parts[1:]), settings())
    sampling, raw = setup.task.model.model_sampling, []
    setup.task.model.diffusion_model.register_forward_hook(lambda *a: raw.append(a[2]))
    for batch in setup.task.spread(torch.Generator().manual_seed(0), 8, 2):
        with torch.no_grad():
            said = setup.task.predict(batch)
        sigma, noise = batch.sigma, batch.noise
        latent = torch.stack([sample.latent for sample in batch.samples])
        noised = sampling.noise_scaling(sigma, noise, latent, False)
        true = _true_output(name, sigma.view(-1, 1, 1, 1), noised, latent)
        # The reference itself: ComfyUI makes the clean latent of it.
        clean = sampling.calculate_denoised(sigma, true, noised)
        torch.testing.assert_close(clean, latent, rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(
            said.value - said.target, raw.pop() - true, rtol=1e-3, atol=2e-3, msg=f"σ = {sigma}"
        )


def test_output_scale_undoes_comfyui_s_algebra(comfyui: Path):
    sigma = torch.tensor([0.03, 0.5, 1.0, 7.0, 14.6], dtype=torch.float64)
    for name in ("EPS", "V_PREDICTION"):
        sampling = _predicting(name).model.model_sampling
        noised = torch.randn(5, 4, 2, 2, dtype=torch.float64)
        output = torch.randn(5, 4, 2, 2, dtype=torch.float64, requires_grad=True)
        clean = sampling.calculate_denoised(sigma, output, noised)
        [slope] = torch.autograd.grad(clean.sum(), output)
        scale = output_scale(name, sigma).expand_as(slope)
        torch.testing.assert_close(-slope * scale, torch.ones_like(slope))


def test_other_predictions_are_refused(parts: Parts, model: Any):
    with pytest.raises(ValueError, match="FLOW"):
        output_scale("FLOW", torch.ones(1))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_adapters_are_fp32_in_every_precision(
    parts: Parts, model: Any, tmp_path: Path, precision: str
):
    config = settings(precision=precision, steps=4)
    setup = _prepare(parts, config)
    network = setup.network
    assert {parameter.dtype for parameter in network.parameters() if parameter.requires_grad} == {
        torch.float32
    }
    before = [weight.detach().clone() for weight in network.weights()]
    job = TrainingJob(setup, tmp_path / "x.safetensors")
    job.start()
    assert job.wait(120)
    assert job.progress.error is None
    assert all(np.isfinite(event.loss) for event in job.progress.events)
    after = network.weights()
    assert {weight.dtype for weight in after} == {torch.float32}
    ups = after[len(after) // 2 :]
    assert any(bool(up.any()) for up in ups), "nothing was learnt"
    assert len(before) == len(after)


def test_bf16_learns_as_fp32_does(parts: Parts, model: Any, tmp_path: Path):
    losses = {}
    for precision in ("fp32", "bf16"):
        job = _train(parts, tmp_path / f"{precision}.safetensors", precision=precision, steps=12)
        losses[precision] = [event.loss for event in job.progress.events]
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.05)


def test_a_patched_model_is_trained_as_patched(parts: Parts, model: Any, tmp_path: Path):
    _train(parts, tmp_path / "first.safetensors", steps=6, learning_rate=0.05)
    state = lora_file.load(tmp_path / "first.safetensors").state
    patched, _ = comfy_host.apply_state(model, None, state, 1.0, 1.0, "first")
    plain = _train(parts, tmp_path / "plain.safetensors", steps=1)
    again = _train((patched, *parts[1:]), tmp_path / "again.safetensors", steps=1)
    assert again.progress.events[0].loss < plain.progress.events[0].loss - 1e-3
    made = [job.result.file.metadata for job in (plain, again) if job.result is not None]
    assert made[0]["lora2.base_model_hash"] != made[1]["lora2.base_model_hash"]


def _predicting(name: str) -> ModelPatcher:
    """A demo MODEL that puts out noise or v, as ComfyUI makes it of a checkpoint's marker key."""
    config = comfy.supported_models.SDXL(dict(UNET_CONFIG))
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = plain()
    marker = {"v_pred": torch.ones(1)} if name == "V_PREDICTION" else {}
    cpu = torch.device("cpu")
    base = config.get_model(marker, "", cpu)
    assert base.model_type.name == name
    fill_seeded(base.diffusion_model, 0)
    return ModelPatcher(base, cpu, cpu)


def _true_output(
    name: str, sigma: torch.Tensor, noised: torch.Tensor, latent: torch.Tensor
) -> torch.Tensor:
    """What the network should put out for x = x₀ + σε: ε, or v = (ε − σ x₀)/√(σ² + 1)."""
    noise = (noised - latent) / sigma
    return noise if name == "EPS" else (noise - sigma * latent) / (sigma**2 + 1).sqrt()
