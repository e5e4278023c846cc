"""Photos and texts reach the U-Net as ComfyUI would give them, and each is encoded once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.comfy_host.encoding import Encoder
from lora2_pack.lora2_core.config.train import DataConfig
from lora2_pack.lora2_core.data.cache import TensorCache
from lora2_pack.lora2_core.data.cropping import Crop
from lora2_pack.lora2_core.data.photos import Photo
from lora2_pack.lora2_core.data.samples import Sample
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.tests.host import demo
from torch import Tensor, nn

Parts = tuple[Any, Any, Any]
LONG = "a red robot on a green hill, " * 12  # two windows of 77 tokens
TEXTS = ("", "a photo of sks cat", "a (blue:1.4) house", LONG)


def _encoder(parts: Parts, folder: Path | None = None) -> Encoder:
    model, clip, vae = parts
    return Encoder(model.model, clip, vae, TensorCache(folder))


def _crop(*shape: int, seed: int = 0, **changes: Any) -> Crop:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(*shape, 3, generator=generator)
    return Crop(pixels, **{"original_size": shape[::-1], "offset": (0, 0), **changes})


def _photo(width: int, height: int, caption: str = "sks cat", seed: int = 0) -> Photo:
    generator = torch.Generator().manual_seed(seed)
    return Photo(torch.rand(height, width, 3, generator=generator), caption)


def _prepare(
    parts: Parts, photos: Sequence[Photo], cache: Path | None = None, **changes: Any
) -> TrainingSetup:
    with torch.inference_mode():  # as nodes are
        return comfy_host.prepare_training(*parts, photos, demo.settings(**changes), cache=cache)


# --- what comes out ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_clip_text_encode_makes_of_it(parts: Parts, model: Any, text: str):
    found = _encoder(parts).text(text)
    with torch.inference_mode():
        clip = parts[1]
        [[context, rest]] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    assert torch.equal(found.context, context[0]) and torch.equal(
        found.pooled, rest["pooled_output"][0]
    )
    assert (found.context.shape[0] > 77) == (text == LONG)


def test_a_latent_is_what_comfyui_would_noise(parts: Parts, model: Any):
    crop = _crop(64, 96)
    found = _encoder(parts).sample(crop, ("one",)).latent
    with torch.inference_mode():
        wanted = model.model.process_latent_in(parts[2].encode(crop.pixels[None]))[0]
    assert found.shape == (4, 8, 12)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.parametrize("inference", [False, True])
def test_what_comes_out_may_be_learnt_through(parts: Parts, tmp_path: Path, inference: bool):
    """Also when made in a node, which runs in inference mode; and when read from disk."""
    tensors: list[Tensor] = []
    for folder in (None, tmp_path, tmp_path):
        with torch.inference_mode(inference):
            encoder = _encoder(parts, folder)
            text = encoder.text("a cat")
            sample = encoder.sample(_crop(64, 64), ("a cat",))
        tensors += [text.context, text.pooled, sample.latent]
    for tensor in tensors:
        assert not tensor.is_inference() and tensor.device.type == "cpu"
        weight = nn.Parameter(torch.ones(tensor.shape[-1]))
        (tensor * weight).sum().backward()
        assert weight.grad is not None


# --- size conditioning ------------------------------------------------------------------------


def _embedded(*numbers: float) -> Tensor:
    """SDXL's embedding written out: 128 cosines and 128 sines of each number (2307.01952, 2.2)."""
    rates = [math.exp(-math.log(10_000) * place / 128) for place in range(128)]
    rows = [
        [wave(number * rate) for wave in (math.cos, math.sin) for rate in rates]
        for number in numbers
    ]
    return torch.tensor(rows, dtype=torch.float64).flatten().float()


def _read_sizes(sample: Sample) -> Tensor:
    """(original height, width, top, left, height, width) back from an embedding of whole numbers.

    By the two waves of the highest frequency, the number itself, and the slower ones, which tell
    numbers apart that are a period away from each other.
    """
    candidates = torch.stack([_embedded(number) for number in range(700)])  # (700, 256)
    parts = sample.sizes.view(6, 256)
    return torch.cdist(parts, candidates).argmin(1)


def check_sizes(sample: Sample, *wanted: int) -> None:
    assert _read_sizes(sample).tolist() == list(wanted)
    torch.testing.assert_close(sample.sizes, _embedded(*wanted), rtol=0, atol=2e-4)


def test_sizes_are_embedded_in_sdxl_s_order(parts: Parts):
    crop = _crop(64, 96, original_size=(640, 480), offset=(17, 5))
    sample = _encoder(parts).sample(crop, ("one",))
    check_sizes(sample, 480, 640, 5, 17, 64, 96)


def test_sizes_are_those_that_the_sdxl_prompt_node_sends(parts: Parts, model: Any):
    crop = _crop(64, 96, original_size=(640, 480), offset=(17, 5))
    found = _encoder(parts).sample(crop, ("one",)).sizes
    with torch.inference_mode():
        sent = CLIPTextEncodeSDXL.execute(parts[1], 640, 480, 17, 5, 96, 64, "a", "a").result[0]
        [[_, said]] = sent
        numbers = {n: said[n] for n in ("width", "height", "crop_w", "crop_h")}
        targets = {n: said[n] for n in ("target_width", "target_height")}
        vector = model.model.encode_adm(**said | numbers | targets)
    assert torch.equal(found, vector[0, -1536:])
    assert torch.equal(_encoder(parts).text("a").pooled, said["pooled_output"][0])


# --- buckets from end to end ------------------------------------------------------------------

WIDE, TALL, SQUARE = (200, 100), (100, 200), (130, 130)


def test_photos_keep_their_aspect_ratio(parts: Parts, model: Any):
    """At 128 px in steps of 32: of 200×100 px, made 192×96, the middle 160×96 are learnt."""
    photos = [_photo(*size, seed=n) for n, size in enumerate((WIDE, TALL, SQUARE))]
    setup = _prepare(parts, photos, resolution=128, data=DataConfig(buckets=True))
    wide, tall, square = setup.task.samples
    assert [tuple(s.latent.shape) for s in (wide, tall, square)] == [
        (4, 12, 20),
        (4, 20, 12),
        (4, 16, 16),
    ]
    check_sizes(wide, 100, 200, 0, 16, 96, 160)
    check_sizes(tall, 200, 100, 16, 0, 160, 96)
    check_sizes(square, 130, 130, 0, 0, 128, 128)
    plain = _prepare(parts, photos, resolution=128)
    assert {tuple(s.latent.shape) for s in plain.task.samples} == {(4, 16, 16)}
    check_sizes(plain.task.samples[0], 100, 200, 0, 64, 128, 128)
    check_sizes(plain.task.samples[1], 200, 100, 64, 0, 128, 128)


def test_a_cut_says_where_it_was_cut_and_its_mirror_image_too(parts: Parts, model: Any):
    """What the U-Net sees is the middle of the photo, not the photo squeezed."""
    photo = _photo(231, 128)  # cut to 224×64… of what covers it
    data = DataConfig(buckets=True, flip=True)
    setup = _prepare(parts, [photo], resolution=128, data=data)
    plain, mirror = setup.task.samples
    height, width = (8 * side for side in plain.latent.shape[1:])
    scale = max(width / 231, height / 128)
    resized = round(231 * scale), round(128 * scale)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    assert left + top > 0, "nothing was cut"
    check_sizes(plain, 128, 231, top, left, height, width)
    check_sizes(mirror, 128, 231, top, resized[0] - width - left, height, width)
    assert not torch.equal(plain.latent, mirror.latent)


def test_batches_never_mix_sizes(parts: Parts, model: Any):
    photos = [_photo(*size, seed=n) for n, size in enumerate((WIDE, TALL, SQUARE, WIDE, TALL))]
    data = DataConfig(buckets=True, flip=True)
    task = _prepare(parts, photos, resolution=128, data=data).task
    generator, seen = torch.Generator().manual_seed(0), Counter[tuple[int, ...]]()
    for _ in range(30):
        batch = task.draw(generator, 2)
        [shape] = {tuple(sample.latent.shape) for sample in batch.samples}
        seen[shape] += 1
    said = task.predict(batch)
    assert tuple(said.value.shape) == (2, *shape) == tuple(said.target.shape)
    assert seen == {(4, 12, 20): 12, (4, 20, 12): 12, (4, 16, 16): 6}  # as the photos come
    for batch in task.spread(generator, 12, 4):
        assert len({sample.latent.shape for sample in batch.samples}) == 1


def test_a_mask_arrives_at_the_latent_s_size_and_mirrored(parts: Parts, model: Any):
    photo = _photo(128, 96)
    mask = torch.zeros(96, 128)
    mask[:, 64:] = 1
    mask[40:44, :64] = 1  # half of the rows of one row of the latent
    data = DataConfig(buckets=True, flip=True)
    setup = _prepare(parts, [Photo(photo.pixels, "x", mask)], resolution=128, data=data)
    plain, mirror = setup.task.samples
    wanted = torch.zeros(1, 12, 16)
    wanted[..., 8:] = 1
    wanted[:, 5, :8] = 0.5
    assert plain.mask is not None and mirror.mask is not None
    torch.testing.assert_close(plain.mask, wanted)
    torch.testing.assert_close(mirror.mask, wanted.flip(2))


# --- what is refused --------------------------------------------------------------------------


def test_a_clip_of_another_family_is_refused(parts: Parts):
    clip = parts[1].clone()
    whole = clip.encode_from_tokens
    clip.encode_from_tokens = lambda *a, **k: tuple(t[..., :96] for t in whole(*a, **k))
    encoder = Encoder(parts[0].model, clip, parts[2], TensorCache(None))
    with pytest.raises(
        comfy_host.HostError, match="width 96 and 96 where the model takes 192 and 128"
    ):
        encoder.text("a cat")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda latent: latent.repeat(1, 4, 1, 1), "shape .1, 16, 8, 8. where SDXL takes 4"),
        (lambda latent: latent * math.inf, "not finite.*--fp32-vae"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused(
    parts: Parts, monkeypatch: Any, tmp_path: Path, spoil: Any, message: str
):
    """And nothing of it is kept: the next try with a good one is right."""
    vae, good = parts[2], parts[2].encode
    monkeypatch.setattr(vae, "encode", lambda pixels: spoil(good(pixels)))
    with pytest.raises(comfy_host.HostError, match=message):
        _encoder(parts, tmp_path).sample(_crop(64, 64), ("one",))
    monkeypatch.setattr(vae, "encode", good)
    assert _encoder(parts, tmp_path).sample(_crop(64, 64), ("one",)).latent.isfinite().all()
