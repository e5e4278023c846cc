"""The tiny base in training reads prompts and latents just as ComfyUI will."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("skia", reason="scenes need skia-python", exc_type=ImportError)

PROMPTS = ["a red striped mug on a sandy beach at sunset", "", "a photo of sks robot in the snow"]


@pytest.fixture(scope="module")
def base(comfyui: Any) -> Any:
    """The base at its start."""
    import comfy.clip_model
    from lora2_pack.tools.tiny_sdxl.training.base import Base

    original = comfy.clip_model.CLIPLayer.forward
    yield Base()
    comfy.clip_model.CLIPLayer.forward = original


@pytest.fixture(scope="module")
def clip(comfyui: Any) -> Any:
    """The same text encoders as ComfyUI uses them."""
    from lora2_pack.tests.host.demo import build

    return build()[1]


def test_tokens_are_the_real_tokenizer_s(base: Any, clip: Any) -> None:
    for prompt in PROMPTS:
        real = clip.tokenizer.tokenize_with_weights(prompt)
        for tower in ("l", "g"):
            ids, lengths = base.tokens.rows([prompt], tower)
            assert ids[0].tolist() == [token for token, _ in real[tower][0]]
            assert lengths[0] == ids[0].tolist().index(49407) + 1


def test_rare_words_have_no_row_and_words_of_captions_do(base: Any) -> None:
    (rare,) = base.tokens.ids("sks")[:1]
    assert rare not in base.place_of
    assert all(token in base.place_of for token in base.tokens.ids(PROMPTS[0]))


def test_prompts_are_read_as_comfyui_reads_them(base: Any, clip: Any) -> None:
    texts = PROMPTS[:2]
    with torch.no_grad():
        context, pooled = base.read(texts)
        for number, text in enumerate(texts):
            real, real_pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
            torch.testing.assert_close(context[number], real[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pooled[number], real_pooled[0], rtol=1e-4, atol=1e-5)


def test_the_size_is_told_as_comfyui_tells_it(base: Any) -> None:
    pooled = torch.randn(1, base.towers["g"].transformer.text_projection.weight.shape[0])
    ours = base.describe(pooled, torch.tensor([[192.0, 128.0, 0.0, 0.0, 192.0, 128.0]]))
    real = base.model.encode_adm(pooled_output=pooled, width=128, height=192, device="cpu")
    torch.testing.assert_close(ours, real)


def test_every_weight_that_a_picture_depends_on_learns(base: Any) -> None:
    from lora2_pack.tools.tiny_sdxl.training.base import Denoising, Recipe

    weights = base.weights()
    task = Denoising(base, torch.randn(8, 4, 24, 24).half(), Recipe(batch=2))
    assert task.loss(0).item() == pytest.approx(task.loss(0).item())  # the step says it all
    # Branches start silent, so what lies behind them learns from the second step on.
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        task.loss(step).backward()
        optimizer.step()
    still = {n for n, p in weights.items() if p.grad is None or not p.grad.abs().sum() > 0}
    # SDXL reads the first tower before its last layer.
    unread = ("layers.2.", "final_layer_norm", "text_projection")
    assert {
        n for n in still if not (n.startswith("clip_l") and any(u in n for u in unread))
    } == set()


def test_the_autoencoder_learns_and_encodes(comfyui: Any, tmp_path: Path) -> None:
    from lora2_pack.tools.tiny_sdxl.training import autoencoder, latents
    from lora2_pack.tools.tiny_sdxl.training.run import Schedule, read_average

    recipe = autoencoder.Recipe(batch=1, crop=32)
    file = tmp_path / "autoencoder.safetensors"
    autoencoder.train(file, Schedule(steps=12, learning_rate=1e-3, warm_up=2), recipe)
    trained = autoencoder.trained_autoencoder(read_average(file))
    made = latents.make_latents(trained, tmp_path / "latents", 3, chunk=2)
    assert made.shape == (3, 4, 24, 24)
    again = latents.make_latents(trained, tmp_path / "latents", 4, chunk=2)  # no chunk is new
    assert torch.equal(again[:3], made)
    picture = latents.decode(trained, made[:1].float())
    assert picture.shape == (1, 3, 192, 192)
    assert picture.min() >= 0 and picture.max() <= 1


def test_a_run_becomes_the_file_that_the_pack_loads(base: Any, tmp_path: Path) -> None:
    """The same names, shapes and words as the file in the pack, so training again replaces it."""
    from lora2_pack.lora2_core.tiny_sdxl.model import WEIGHTS
    from lora2_pack.tools.tiny_sdxl.training import autoencoder, exporting
    from lora2_pack.tools.tiny_sdxl.training.run import Run, Schedule

    run = tmp_path / "base.safetensors"
    Run(base.weights(), Schedule(steps=1, learning_rate=1e-3), run).save()
    encoder = dict(autoencoder.new_autoencoder().named_parameters())
    encoder = {n: p.detach() for n, p in encoder.items() if not n.startswith("vae_")}
    out = tmp_path / "pack" / "tiny.safetensors"
    digest = exporting.export(run, encoder, out)
    assert digest == hashlib.sha256(out.read_bytes()).hexdigest()
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    made, shipped = load_file(out), load_file(WEIGHTS)
    kinds = [{n: (v.dtype, v.shape) for n, v in tensors.items()} for tensors in (made, shipped)]
    assert kinds[0] == kinds[1]
    assert torch.equal(made["words"], shipped["words"])
    weight = base.weights()["unet.out.2.weight"]
    assert torch.equal(made["unet.out.2.weight"], weight.detach().half())


def test_refining_begins_where_the_pack_is(comfyui: Any, tmp_path: Path) -> None:
    from lora2_pack.tools.tiny_sdxl.training import base
    from lora2_pack.tools.tiny_sdxl.training.run import Schedule

    start = base.weights_of_the_pack()
    one = Schedule(steps=1, learning_rate=1e-6, warm_up=1)
    latents = torch.randn(4, 4, 24, 24).half()
    base.train(tmp_path / "base.safetensors", latents, one, base.Recipe(batch=1), start)
    with safe_open(tmp_path / "base.safetensors", "pt") as stored:
        for name, value in start.items():
            assert torch.allclose(stored.get_tensor(f"weight.{name}"), value.float(), atol=2e-6)


def test_painting_many_prompts_at_once_is_what_ksampler_paints(comfyui: Any) -> None:
    import comfy.sample
    from lora2_pack.tests.host.demo import build
    from lora2_pack.tools.tiny_sdxl.evaluation.painting import Painter, Sampling

    model, clip, vae = build()
    sampling = Sampling(steps=4)
    ours = Painter(model, clip, vae, sampling).paint(PROMPTS[::2], [3, 4])

    def condition(prompt: str) -> Any:
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

    noise = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(4))
    latent = comfy.sample.sample(
        *(model, noise, sampling.steps, sampling.guidance, sampling.sampler, sampling.scheduler),
        *(condition(PROMPTS[2]), condition(""), torch.zeros(1, 4, 24, 24)),
        **{"denoise": 1.0, "disable_pbar": True, "seed": 4},
    )
    with torch.inference_mode():
        theirs = vae.decode(latent).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours[1:], theirs, rtol=0, atol=2e-3)
