"""The demo model as people get it: its file, what it is loaded into, what it knows."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core.tiny_sdxl.model import WEIGHTS, DemoModelError, read_weights
from lora2_pack.tests.host import demo
from safetensors.torch import load_file, save_file

Parts = tuple[Any, Any, Any]


@pytest.fixture(scope="module")
def trained() -> Parts:
    return demo.build(None)


def test_every_weight_comes_from_the_file(trained: Parts):
    model, clip, vae = trained
    stored = load_file(WEIGHTS)
    seen = set()
    for name, weight in model.model.diffusion_model.named_parameters():
        assert torch.equal(weight, stored[f"unet.{name}"].float()), name
        seen.add(f"unet.{name}")
    for name, weight in vae.first_stage_model.named_parameters():
        if name in ("vae_scale", "vae_shift"):
            continue
        assert torch.equal(weight.float(), stored[f"vae.{name}"].float()), name
        seen.add(f"vae.{name}")
    for tower in ("clip_l", "clip_g"):
        transformer = getattr(clip.cond_stage_model, tower).transformer
        for name, weight in transformer.named_parameters():
            if "token_embedding" in name:
                rows = stored[tower.replace("clip", "rows")].float()
                assert torch.equal(weight[stored["words"].long()], rows)
                continue
            assert torch.equal(weight, stored[f"{tower}.{name}"].float()), name
            seen.add(f"{tower}.{name}")
    assert seen == stored.keys() - {"words", "rows_l", "rows_g"}


def test_words_that_were_never_learnt_are_free_and_always_the_same(trained: Parts):
    _, clip, _ = trained
    _, untrained, _ = demo.build(0)
    (sks,) = [t for t, _ in clip.tokenizer.clip_l.tokenize_with_weights("sks")[0][1:2]]
    assert sks not in load_file(WEIGHTS)["words"].tolist()
    for tower in ("clip_l", "clip_g"):
        row, seeded = (
            getattr(c.cond_stage_model, tower).transformer.get_input_embeddings().weight[sks]
            for c in (clip, untrained)
        )
        assert torch.equal(row, seeded)


def test_the_pack_carries_at_most_24_megabytes_and_its_judges_4():
    judges = WEIGHTS.parent / "judge_weights"
    assert WEIGHTS.stat().st_size <= 24e6
    assert sum(file.stat().st_size for file in judges.iterdir()) <= 4e6


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DemoModelError, match=r"missing: .*gone\.safetensors.*Install the pack"):
        read_weights(tmp_path / "gone.safetensors")


def test_a_file_with_one_changed_byte_is_refused(tmp_path: Path):
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(WEIGHTS.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DemoModelError, match=r"damaged\.safetensors has SHA-256 .*Install"):
        read_weights(damaged)


def test_a_damaged_file_gives_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_file({"words": torch.zeros(1)}, tmp_path / "other.safetensors")
    monkeypatch.setattr(read_weights, "__defaults__", (tmp_path / "other.safetensors",))
    with pytest.raises(DemoModelError, match="damaged"):
        demo.build(None)


def test_photos_survive_the_autoencoder(trained: Parts):
    """A drawn scene that it never saw comes back at 22 dB or more."""
    pytest.importorskip("skia", reason="scenes need skia-python", exc_type=ImportError)
    import random

    from lora2_pack.tools.tiny_sdxl.pictures import to_pixels
    from lora2_pack.tools.tiny_sdxl.world.scenes import random_scene, render

    rng = random.Random("demo model")
    pixels = to_pixels(render(random_scene(rng)) for _ in range(4)).permute(0, 2, 3, 1)
    with torch.inference_mode():
        back = trained[2].decode(trained[2].encode(pixels))
    error = (back - pixels).square().mean(dim=(1, 2, 3))
    assert (10 * torch.log10(1 / error)).min() > 22


def test_it_is_made_anew_for_whoever_wants_one_of_its_own():
    """ComfyUI's trainer, compiling and hooks ask so, of MODEL and CLIP; several cards of all."""
    model, clip, vae = demo.build()
    for patcher in (model, clip.patcher, vae.patcher):
        if "force_deepcopy" not in inspect.signature(patcher.clone).parameters:
            pytest.skip("this ComfyUI makes no model anew")
        other = patcher.clone(force_deepcopy=True)
        assert other.model is not patcher.model
        mine, same = patcher.model.state_dict(), other.model.state_dict()
        assert mine.keys() == same.keys()
        assert all(torch.equal(mine[name], same[name]) for name in mine)
        storage = {value.untyped_storage().data_ptr() for value in mine.values() if value.numel()}
        assert not storage & {v.untyped_storage().data_ptr() for v in same.values() if v.numel()}
    for patcher in (model, clip.patcher):
        assert not patcher.clone(disable_dynamic=True).is_dynamic()
