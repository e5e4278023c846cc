"""Photos and texts are encoded once, and known by all that they are made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.comfy_host.encoding import Encoder
from lora2_pack.lora2_core.comfy_host.prepare import _data_hash
from lora2_pack.lora2_core.config.train import DataConfig, SampleConfig
from lora2_pack.lora2_core.data.cache import TensorCache, content_key
from lora2_pack.lora2_core.data.cropping import Crop
from lora2_pack.lora2_core.data.photos import Photo
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.tests.host import demo
from torch import Tensor

Parts = tuple[Any, Any, Any]


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


# --- once -------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: Any) -> Counter[str]:
    return Counter()


def _counted(parts: Parts, monkeypatch: Any, calls: Counter[str]) -> Parts:
    """The same CLIP and VAE, whose real methods are counted."""
    for owner, name in ((parts[1], "encode_from_tokens"), (parts[2], "encode")):
        method = getattr(owner, name)

        def call(*args: Any, _name: str = name, _method: Any = method, **kwargs: Any) -> Any:
            calls[_name] += 1
            return _method(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)
    return parts


DATA = DataConfig(buckets=True, flip=True, caption_shuffle=True, caption_dropout=0.1)
PHOTOS = [_photo(96, 64, "sks cat, red, old", 1), _photo(64, 96, "sks cat", 2)]


def _whole(setup: TrainingSetup) -> list[Tensor]:
    samples = setup.task.samples
    texts = sorted({text for sample in samples for text in sample.captions} | {""})
    return (
        [s.latent for s in samples] + [s.sizes for s in samples] + [*setup.task.texts.read(texts)]
    )


def test_a_second_run_encodes_nothing(parts: Parts, monkeypatch: Any, calls: Any, tmp_path: Path):
    """Not even after a restart, with a model that was loaded anew."""
    samples = SampleConfig(prompts=("a cat in the snow",))
    first = _prepare(
        _counted(parts, monkeypatch, calls), PHOTOS, tmp_path, data=DATA, samples=samples
    )
    assert calls == {"encode": 4, "encode_from_tokens": 5}  # 2 + 1 captions, "", the sample's
    calls.clear()
    anew = _counted(demo.build(), monkeypatch, calls)
    second = _prepare(anew, PHOTOS, tmp_path, data=DATA, samples=samples, seed=1, steps=7)
    assert not calls
    assert all(map(torch.equal, _whole(first), _whole(second)))
    assert (first.base_hash, first.data_hash) == (second.base_hash, second.data_hash)


def test_equal_photos_and_texts_are_encoded_once_within_a_run(
    parts: Parts, monkeypatch: Any, calls: Any
):
    """Texts even without a folder to keep them in."""
    photos = [PHOTOS[0], Photo(PHOTOS[0].pixels.clone(), PHOTOS[0].caption)]
    _prepare(_counted(parts, monkeypatch, calls), photos)
    assert calls["encode_from_tokens"] == 2  # the caption and the empty one


def _encode(encoder: Encoder, crops: Sequence[Crop], texts: Sequence[str]) -> None:
    for crop in crops:
        encoder.sample(crop, ("one",))
    for text in texts:
        encoder.text(text)


@pytest.mark.parametrize("changed", ["photo", "text", "vae", "clip", "layer", "lora"])
def test_only_what_changed_is_encoded_anew(
    parts: Parts, monkeypatch: Any, calls: Any, tmp_path: Path, changed: str
):
    crops, texts = [_crop(64, 64), _crop(64, 64, seed=1)], ["a cat", "", "a dog"]
    first = _encoder(parts, tmp_path)
    _encode(first, crops, texts)
    model, clip, vae = demo.build()
    if changed == "photo":
        crops[1] = _crop(64, 64, seed=2)
    elif changed == "text":
        texts[1] = "a cow"
    elif changed == "vae":
        with torch.inference_mode():
            next(vae.first_stage_model.parameters()).mul_(1.5)
    elif changed == "clip":
        clip = demo.build(5)[1]
    elif changed == "layer":
        clip = clip.clone()
        clip.clip_layer(-1)
    else:
        clip = _patched(clip)
    second = _encoder(_counted((model, clip, vae), monkeypatch, calls), tmp_path)
    _encode(second, crops, texts)
    wanted = {"photo": (1, 0), "text": (0, 1), "vae": (2, 0)}.get(changed, (0, 3))
    assert (calls["encode"], calls["encode_from_tokens"]) == wanted
    assert (first.identity == second.identity) == (changed in ("photo", "text"))


def _patched(clip: Any) -> Any:
    """The CLIP with a change of one weight on top, as a LoRA loader makes it."""
    other = clip.clone()
    name = "clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    weight = clip.patcher.model_state_dict()[name]
    with torch.inference_mode():
        assert other.add_patches({name: ("diff", (torch.ones_like(weight),))}, 0.5)
    return other


def test_a_patched_clip_is_known_again_and_leaves_no_trace(parts: Parts, tmp_path: Path):
    """A LoRA that was loaded anew, after a restart, is the same LoRA: a run can be resumed. And
    a CLIP is itself whether or not a patched clone of it was used just before."""
    _, clip, vae = parts
    plain = _encoder(parts)
    patched = [Encoder(parts[0].model, _patched(clip), vae, TensorCache(None)) for _ in range(2)]
    texts = [encoder.text("a cat").context for encoder in (plain, *patched)]
    assert torch.equal(texts[1], texts[2]) and not torch.equal(texts[0], texts[1])
    assert patched[0].identity == patched[1].identity != plain.identity
    assert _encoder(parts).identity == plain.identity  # while the patched one is loaded
    assert torch.equal(_encoder(parts).text("a cat").context, texts[0])


def test_weights_in_parentheses_are_part_of_a_text(parts: Parts, tmp_path: Path):
    """Its words are the same; what is kept on disk is not mistaken for it."""
    texts = ("a blue house", "a (blue:1.4) house", "a (blue:0.6) house")
    _encode(_encoder(parts, tmp_path), [], texts)
    contexts = [_encoder(parts, tmp_path).text(text).context for text in texts]
    wanted = [_encoder(parts).text(text).context for text in texts]
    assert all(map(torch.equal, contexts, wanted))
    assert not torch.equal(contexts[0], contexts[1]) and not torch.equal(contexts[1], contexts[2])


def test_a_learnt_embedding_is_part_of_a_text(parts: Parts, tmp_path: Path, monkeypatch: Any):
    """Another file of the same name is another text."""
    clip, found = parts[1], []
    monkeypatch.setattr(clip.tokenizer.clip_l, "embedding_directory", str(tmp_path))
    monkeypatch.setattr(clip.tokenizer.clip_g, "embedding_directory", str(tmp_path))
    cache = tmp_path / "cache"
    for seed in (0, 1, 0):
        generator = torch.Generator().manual_seed(seed)
        widths = {"clip_l": 64, "clip_g": 128}
        learnt = {n: torch.randn(2, w, generator=generator) for n, w in widths.items()}
        safetensors.torch.save_file(learnt, tmp_path / "mine.safetensors")
        found.append(_encoder(parts, cache).text("a photo of embedding:mine").context)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    plain = _encoder(parts, cache).text("a photo of mine").context
    assert not any(torch.equal(plain, context) for context in found)


# --- the hash of the data ---------------------------------------------------------------------


def test_the_data_hash_changes_with_everything_that_is_learnt_from():
    first, second, third = (_photo(64, 64, seed=n) for n in range(3))
    mask = torch.ones(64, 64)
    mask[:8] = 0
    other = mask.clone()
    other[0, 0] = 1
    brighter = first.pixels.clone()
    brighter[0, 0, 0] += 1 / 255
    cases: dict[str, tuple[list[Photo], list[Photo]]] = {
        "plain": ([first, second], []),
        "a pixel": ([Photo(brighter, first.caption), second], []),
        "a caption": ([Photo(first.pixels, "sks dog"), second], []),
        "a mask": ([Photo(first.pixels, first.caption, mask), second], []),
        "another mask": ([Photo(first.pixels, first.caption, other), second], []),
        "one more": ([first, second, third], []),
        "one less": ([first], []),
        "another order": ([second, first], []),
        "a class image": ([first, second], [third]),
        "another class image": ([first, second], [Photo(brighter, "sks cat")]),
        "a photo as class image": ([first], [second]),
        "repeats": ([replace(first, repeats=5), second], []),
        "repeats of the other": ([first, replace(second, repeats=5)], []),
    }
    hashes = {name: _data_hash(*case) for name, case in cases.items()}
    copies = [Photo(photo.pixels.clone(), photo.caption) for photo in (first, second)]
    assert _data_hash(copies, []) == hashes["plain"]
    assert len(set(hashes.values())) == len(hashes), hashes


def test_a_run_from_before_there_were_repeats_goes_on():
    photo = _photo(64, 64)
    assert _data_hash([photo], []) == content_key(1, photo.pixels, photo.caption, "")


def test_a_run_on_other_data_has_another_hash(parts: Parts, model: Any, tmp_path: Path):
    """As it is told to whoever looks for a run to go on with."""
    data = DataConfig(class_prompt="a cat")
    changed = [PHOTOS[0], Photo(PHOTOS[1].pixels, "sks dog")]
    hashes = []
    for photos, given in ((PHOTOS, []), (PHOTOS, []), (changed, []), (PHOTOS, [_photo(64, 64)])):
        with torch.inference_mode():
            setup = comfy_host.prepare_training(
                *parts, photos, demo.settings(data=data), given, cache=tmp_path
            )
        hashes.append(setup.data_hash)
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
