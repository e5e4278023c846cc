"""Brackets in captions reach the text encoders as letters; those in prompts as weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.comfy_host.encoding import Encoder
from lora2_pack.lora2_core.comfy_host.prepare import _data_hash
from lora2_pack.lora2_core.config.train import DataConfig, SampleConfig
from lora2_pack.lora2_core.data.cache import TensorCache
from lora2_pack.lora2_core.data.captions import as_prompt
from lora2_pack.lora2_core.data.photos import Photo, check_photos
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.tests.host import demo

Parts = tuple[Any, Any, Any]
PLAIN, ESCAPED = "a robot (fate)", r"a robot \(fate\)"
PIXELS = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))


def _ids(clip: Any, text: str) -> dict[str, list[int]]:
    """What CLIP's own byte-pair encoding makes of the letters, as kohya's trainer feeds it."""
    towers = {"l": clip.tokenizer.clip_l.tokenizer, "g": clip.tokenizer.clip_g.tokenizer}
    return {name: list(bpe(text)["input_ids"]) for name, bpe in towers.items()}


def _read(clip: Any, prompt: str) -> tuple[dict[str, list[int]], set[float]]:
    """The tokens up to the end, and all weights, that ComfyUI makes of a prompt."""
    tokens = clip.tokenize(prompt)
    weights = {weight for windows in tokens.values() for window in windows for _, weight in window}
    ids = {}
    for name, windows in tokens.items():
        row = [token for window in windows for token, _ in window]
        ids[name] = row[: row.index(49_407) + 1]
    return ids, weights


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        (PLAIN, PLAIN),
        (ESCAPED, PLAIN),
        (
            "((very:1.2) red), robot (fate, stay night)",
            "((very:1.2) red), robot (fate, stay night)",
        ),
        (":) (a (b", ":) (a (b"),
        ("()", "()"),
        ("ends in a backslash \\", "ends in a backslash \\"),
        (r"two \\(backslashes)", r"two \(backslashes)"),
        ("[red] {blue} <lora:x:1> 1:2", "[red] {blue} <lora:x:1> 1:2"),
        ("Zoë (née B.), 猫 (ねこ)", "Zoë (née B.), 猫 (ねこ)"),
    ],
)
def test_tokens_of_a_caption_are_those_of_its_letters(parts: Parts, text: str, letters: str):
    ids, weights = _read(parts[1], as_prompt(text))
    assert ids == _ids(parts[1], letters)
    assert weights == {1.0}


def test_weights_are_weights_where_they_are_asked_for(parts: Parts):
    ids, weights = _read(parts[1], as_prompt("a (robot:1.5)", "weights"))
    assert ids == _ids(parts[1], "a robot") and weights == {1.0, 1.5}


def _prepared(parts: Parts, caption: str, cache: Path | None, **changes: Any) -> TrainingSetup:
    photos = check_photos([PIXELS], [caption], "x")
    with torch.inference_mode():
        return comfy_host.prepare_training(*parts, photos, demo.settings(**changes), cache=cache)


def test_both_ways_to_write_a_bracket_are_one_run(parts: Parts, model: Any, tmp_path: Path):
    plain, escaped = (_prepared(parts, text, tmp_path) for text in (PLAIN, ESCAPED))
    assert plain.data_hash == escaped.data_hash and plain.captions == escaped.captions
    (first,), (second,) = (
        setup.task.draw(torch.Generator().manual_seed(0), 1).texts for setup in (plain, escaped)
    )
    assert first == second
    # As from before captions were read so: a caption with backslashes is the same run as ever.
    (photo,) = check_photos([PIXELS], [ESCAPED], "x")
    assert _data_hash([photo], []) == _data_hash([Photo(PIXELS[0], ESCAPED)], [])


def test_a_caption_and_a_sample_prompt_of_one_spelling_are_kept_apart(
    parts: Parts, model: Any, tmp_path: Path
):
    """The prompt keeps its weights: what is painted meanwhile is what CLIPTextEncode would read."""
    samples = SampleConfig(prompts=(PLAIN,))
    setup = _prepared(parts, PLAIN, tmp_path, samples=samples, data=DataConfig())
    texts = setup.task.texts
    model_, clip, vae = parts
    with torch.inference_mode():
        [[weighted, _]] = clip.encode_from_tokens_scheduled(clip.tokenize(PLAIN))
        [[letters, _]] = clip.encode_from_tokens_scheduled(clip.tokenize(ESCAPED))
    assert not torch.equal(weighted, letters)
    batch = setup.task.draw(torch.Generator().manual_seed(0), 1)
    assert torch.equal(texts.read(batch.texts)[0].cpu(), letters)
    assert torch.equal(texts.read([PLAIN])[0].cpu(), weighted)
    # And on disk, under the tokens that were encoded.
    again = Encoder(model_.model, clip, vae, TensorCache(tmp_path))
    for text, wanted in ((PLAIN, weighted), (as_prompt(PLAIN), letters)):
        assert torch.equal(again.text(text).context, wanted[0])
    assert (again.cache.hits, again.cache.misses) == (2, 0)


def test_an_embedding_of_a_caption_is_one(parts: Parts, tmp_path: Path, monkeypatch: Any):
    """Also one whose name has brackets; a caption's own do not hide it."""
    import safetensors.torch

    _, clip, _ = parts
    rows = {"clip_l": torch.full((1, 64), 0.5), "clip_g": torch.full((1, 64), 0.25)}
    for tower in ("l", "g"):
        tokenizer = getattr(clip.tokenizer, f"clip_{tower}")
        rows[f"clip_{tower}"] = torch.full((1, tokenizer.embedding_size), 0.5)
        monkeypatch.setattr(tokenizer, "embedding_directory", [str(tmp_path)])
    for name in ("cat", "cat(1)"):
        safetensors.torch.save_file(rows, tmp_path / f"{name}.safetensors")
    for caption in ("a embedding:cat (red)", "(red) embedding:cat(1)"):
        found = clip.tokenize(as_prompt(caption))["l"][0]
        assert sum(torch.is_tensor(token) for token, _ in found) == 1, caption
        assert {weight for _, weight in found} == {1.0}
