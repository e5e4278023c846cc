"""A picture painted while training is the one that ComfyUI's KSampler would paint."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import comfy.model_management as management
import comfy.sample
import pytest
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.comfy_host import painting
from lora2_pack.lora2_core.comfy_host.copies.text_encoders import TextEncoders
from lora2_pack.lora2_core.comfy_host.painting import Painter
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.tests.core import toy
from lora2_pack.tests.host import demo
from torch import Tensor

Parts = tuple[Any, Any, Any]
PROMPTS = ("a red robot on a green hill", "two (blue:1.4) houses at night")
LONG = "a red robot on a green hill, " * 12  # two windows of 77 tokens
STEPS, GUIDANCE, SEED = 6, 4.0, 11


@pytest.fixture(scope="module")
def trained(comfyui: Any) -> Parts:
    """MODEL, CLIP and VAE of the demo as people get them: they really paint."""
    return demo.build(None)


@pytest.fixture
def painter(trained: Parts) -> Painter:
    return _painter(trained)


def _painter(parts: Parts, precision: str = "fp32") -> Painter:
    model, clip, vae = parts
    with torch.inference_mode():  # as nodes are
        with torch.inference_mode(False):
            private = comfy_host.private_copy(model, precision)
        return Painter(private, vae, TextEncoders(clip))


def _of_ksampler(
    parts: Parts, prompt: str, size: tuple[int, int], guidance: float = GUIDANCE
) -> Tensor:
    """What the nodes CLIPTextEncode, EmptyLatentImage, KSampler and VAEDecode make."""
    model, clip, vae = parts
    with torch.inference_mode():
        latent = torch.zeros(1, 4, size[1] // 8, size[0] // 8)
        samples = comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, SEED),
            STEPS,
            guidance,
            "dpmpp_2m",
            "karras",
            clip.encode_from_tokens_scheduled(clip.tokenize(prompt)),
            clip.encode_from_tokens_scheduled(clip.tokenize("")),
            latent,
            disable_pbar=True,
            seed=SEED,
        )
        return vae.decode(samples)


def check_same_picture(found: Tensor, wanted: Tensor, tolerance: float = 2e-3) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def _paint(painter: Painter, prompts: Sequence[str] = PROMPTS, **changes: Any) -> Tensor:
    settings = {"seed": SEED, "size": (192, 192), "steps": STEPS, "guidance": GUIDANCE}
    return painter.paint(prompts, **{**settings, **changes})


# --- the same picture -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(192, 192), (128, 208)])
def test_it_paints_as_ksampler_does(trained: Parts, painter: Painter, size: tuple[int, int]):
    found = _paint(painter, size=size)
    assert found.shape == (2, size[1], size[0], 3) and found.dtype == torch.float32
    assert 0 <= float(found.min()) < 0.3 < 0.7 < float(found.max()) <= 1
    for picture, prompt in zip(found, PROMPTS, strict=True):
        check_same_picture(picture[None], _of_ksampler(trained, prompt, size))


@pytest.mark.parametrize(("prompt", "guidance"), [(LONG, 4.0), (PROMPTS[0], 1.0), ("", 3.0)])
def test_long_prompts_and_no_guidance(
    trained: Parts, painter: Painter, prompt: str, guidance: float
):
    found = _paint(painter, [prompt], guidance=guidance)
    check_same_picture(found, _of_ksampler(trained, prompt, (192, 192), guidance))


def test_adapters_whose_b_is_zero_do_not_show(trained: Parts, painter: Painter):
    network = _adapted(painter)
    wanted = _of_ksampler(trained, PROMPTS[0], (192, 192))
    changed = _paint(painter, PROMPTS[:1])
    assert (changed - wanted).abs().max() > 0.1, "the adapters do nothing"
    toy.silence(network)
    check_same_picture(_paint(painter, PROMPTS[:1]), wanted)


def test_bf16_paints_nearly_the_same(trained: Parts):
    found = _paint(_painter(trained, "bf16"), PROMPTS[:1])
    wanted = _of_ksampler(trained, PROMPTS[0], (192, 192))
    assert (found - wanted).abs().mean() < 0.03


def test_a_picture_does_not_depend_on_its_neighbours(painter: Painter):
    together = _paint(painter)
    assert torch.equal(together[1:], _paint(painter, PROMPTS[1:]))
    assert not torch.equal(together, _paint(painter, seed=SEED + 1))


def test_no_prompt_gives_no_picture(painter: Painter):
    assert _paint(painter, []).shape == (0, 192, 192, 3)


@pytest.mark.parametrize("size", [(190, 192), (192, 4), (0, 0)])
def test_a_size_without_latent_is_named(painter: Painter, size: tuple[int, int]):
    with pytest.raises(ValueError, match=rf"{size[0]}×{size[1]}.*multiples of 8"):
        _paint(painter, size=size)


def test_a_picture_too_large_for_the_memory_is_decoded_in_tiles(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
):
    wanted = _paint(painter, PROMPTS[:1], size=(640, 640), steps=1)
    decode, sizes = painter._decoder._network.decode, []

    def with_little_memory(latent: Tensor) -> Tensor:
        if latent.shape[-1] > 64:
            raise management.OOM_EXCEPTION
        sizes.append(latent.shape[-1])
        return decode(latent)

    monkeypatch.setattr(painter._decoder._network, "decode", with_little_memory)
    found = _paint(painter, PROMPTS[:1], size=(640, 640), steps=1)
    assert len(sizes) > 1
    assert (found - wanted).abs().mean() < 0.02, "seams show"


def test_a_vae_that_overflows_is_named(trained: Parts, painter: Painter):
    for parameter in painter._decoder._network.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(comfy_host.HostError, match=r"vae.*not finite.*fp32-vae"):
        _paint(painter, PROMPTS[:1])
    with torch.inference_mode():
        own = trained[2].decode(torch.zeros(1, 4, 8, 8))
    assert own.isfinite().all(), "the user's own"


# --- nothing else notices ---------------------------------------------------------------------


def _adapted(painter: Painter) -> AdaptiveRankNetwork:
    unet = painter.model.diffusion_model
    config = RankConfig.balanced(target_rank=2.0, max_rank=4)
    network = AdaptiveRankNetwork(unet, find_targets(unet), config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in network.layers:
            layer.lora_up.copy_(torch.randn(layer.lora_up.shape, generator=generator) / 10)
    network.refresh()
    return network


def test_the_adapters_can_be_trained_on_afterwards(painter: Painter):
    network = _adapted(painter)
    network.refresh()
    before = [weight.detach().clone() for weight in network.weights()]
    _paint(painter, PROMPTS[:1])
    assert all(map(torch.equal, before, network.weights()))
    config = painter.model.model_config.unet_config
    random = torch.Generator().manual_seed(3)  # words that are all alike give q and k no gradient
    prediction = painter.model.apply_model(
        torch.randn(1, 4, 8, 8, generator=random),
        torch.tensor([2.0]),
        c_crossattn=torch.randn(1, 77, config["context_dim"], generator=random),
        y=torch.ones(1, config["adm_in_channels"]),
    )
    gradients = torch.autograd.grad(prediction.square().mean(), [*network.weights()])
    assert all(bool(gradient.any()) for gradient in gradients)


def test_nothing_global_is_touched(trained: Parts, painter: Painter):
    management.unload_all_models()
    state = torch.get_rng_state()
    loaded = list(management.current_loaded_models)
    _paint(painter)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert management.current_loaded_models == loaded == []
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_it_shares_no_weight_with_the_user_s_vae(trained: Parts, painter: Painter):
    def storages(module: torch.nn.Module) -> set[int]:
        return {p.untyped_storage().data_ptr() for p in module.parameters()}

    assert not storages(painter._decoder._network) & storages(trained[2].first_stage_model)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_guarded_thread_paints_through_a_cancel(painter: Painter, guarded: bool):
    results: list[Any] = []

    def work() -> None:
        try:
            if guarded:
                with comfy_host.deaf_to_cancel():
                    results.append(_paint(painter, PROMPTS[:1]))
            else:
                results.append(_paint(painter, PROMPTS[:1]))
        except management.InterruptProcessingException as error:
            results.append(error)

    management.interrupt_current_processing(True)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        wanted = Tensor if guarded else management.InterruptProcessingException
        assert isinstance(results[0], wanted)
        assert management.processing_interrupted() == guarded, "whose Cancel it was"
    finally:
        management.interrupt_current_processing(False)


def test_sampler_and_schedule_are_comfyui_s():
    assert painting.SAMPLER in comfy.samplers.SAMPLER_NAMES
    assert painting.SCHEDULER in comfy.samplers.SCHEDULER_NAMES
