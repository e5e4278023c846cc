"""The benchmark's trials on the demo base: rivals' files are what PEFT computes; nothing twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.bench.paper import cuts, methods, rivals, subjects, trial
from lora2_pack.bench.paper.plan import Plan
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.tools.tiny_sdxl.evaluation import load_parts

torch.set_num_threads(1)

FEW = Plan(steps=3, batch=1, prompts=2, pictures=1)
METHODS = methods.methods_for(64)


@pytest.fixture(scope="module")
def parts(runtime: Any) -> Any:
    found = load_parts()
    return replace(found, sampling=replace(found.sampling, steps=2))


@pytest.fixture(scope="module")
def study() -> subjects.Study:
    return subjects.drawn(41, FEW.prompts)


@pytest.mark.parametrize("name", ["adalora", "dora"])
def test_a_rivals_file_is_what_peft_computes(
    parts: Any, study: subjects.Study, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = trial.training_config(METHODS[name], FEW, 0, 4e-2)
    kept: list[Any] = []
    original = rivals.clean_task

    def keeping(*arguments: Any) -> Any:
        kept.append(original(*arguments))
        return kept[-1]

    monkeypatch.setattr(rivals, "clean_task", keeping)
    file = tmp_path / "rival.safetensors"
    about = rivals.train(parts, study.photos, METHODS[name], config, file)
    assert about["megabytes"] == file.stat().st_size / 1e6 and about["mean_rank"] > 1
    unet = kept[0][1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 24, 24, generator=generator)
    context = torch.randn(1, 77, 192, generator=generator)
    wanted = _asked(unet, x, context)
    state = lora_file.load(file).state
    model, _ = comfy_host.apply_state(parts.model, parts.clip, state, 1.0, 1.0, file.name)
    private = comfy_host.private_copy(model, "fp32")
    plain = comfy_host.private_copy(parts.model, "fp32")
    off = (_asked(private.diffusion_model, x, context) - wanted).norm()
    changed = (_asked(plain.diffusion_model, x, context) - wanted).norm()
    assert changed > 0, "it has learnt something"
    assert off < 0.01 * changed


@torch.no_grad()
def _asked(unet: Any, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    width = unet.label_emb[0][0].in_features
    return unet(x, torch.tensor([400.0]), context=context, y=torch.zeros(1, width))


def test_the_allocator_takes_ranks_away(parts: Any, study: subjects.Study, tmp_path: Path):
    config = trial.training_config(METHODS["adalora"], replace(FEW, steps=20), 0, 4e-3)
    file = tmp_path / "rival.safetensors"
    about = rivals.train(parts, study.photos, METHODS["adalora"], config, file)
    ranks = METHODS["adalora"].rank
    assert about["mean_rank"] == pytest.approx(ranks["target_r"], rel=0.05)


def test_a_record_is_made_once_and_cuts_meet_their_size(
    parts: Any, study: subjects.Study, tmp_path: Path
):
    bench = trial.Bench(parts, "weights", tmp_path, FEW, METHODS)
    assert bench.record(study, trial.BASE, 0)["scores"].keys() == parts.judges.keys()
    own = bench.record(study, trial.OWN, 0)["scores"]
    made = {name: bench.record(study, name, 0, 4e-3) for name in ("fixed-64", "balanced")}
    for name in ("svd-largest", "sv-fro-largest"):
        made[name] = bench.record(study, name, 0)
        assert 0.8 < made[name]["bytes"] / made["balanced"]["bytes"] <= 1
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "records").rglob("*")}
    assert bench.record(study, "balanced", 0, 4e-3) == made["balanced"]
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "records").rglob("*")}
    for scores in own.values():
        assert {key: len(values) for key, values in scores.items()} == {
            "likeness": 2, "place": 2, "object": 2,
        }  # fmt: skip
    assert set(made["balanced"]["ranks"].values()) - {64}
    other = replace(bench, plan=replace(FEW, steps=2))
    again = other.record(study, "balanced", 0, 4e-3)
    assert again["settings"] != made["balanced"]["settings"], "another plan is another record"


def test_a_cut_needs_what_it_cuts(parts: Any, study: subjects.Study, tmp_path: Path):
    bench = trial.Bench(parts, "weights", tmp_path, FEW, METHODS)
    with pytest.raises(ValueError, match=r"fixed-64 .* must be run before"):
        bench.record(study, "svd-largest", 0)


def test_each_layer_keeps_its_share(parts: Any, study: subjects.Study, tmp_path: Path):
    bench = trial.Bench(parts, "weights", tmp_path, FEW, METHODS)
    bench.record(study, "fixed-8", 0, 4e-3)
    (source,) = (tmp_path / "records").rglob("fixed-8-*.safetensors")
    size = source.stat().st_size / 1e6
    about = cuts.cut(source, tmp_path / "cut.safetensors", 0.6 * size, "sv_fro")
    assert about["megabytes"] <= 0.6 * size and 1 <= about["mean_rank"] < 8
    with pytest.raises(ValueError, match="rank 1 takes more"):
        cuts.cut(source, tmp_path / "cut.safetensors", 0.01, "sv_fro")


def test_photographs_and_drawn_subjects_are_all_there():
    every = subjects.of_demo(10)
    assert len(every) == 16 and len({study.name for study in every}) == 16
    assert all(len(study.prompts) == 10 for study in every)
    assert subjects.tuning_of_demo(10).name not in {study.name for study in every}
    for study in every:
        assert 5 <= len(study.photos) <= 6
        assert all(view.image.shape == (192, 192, 3) for view in study.photos)
        assert all("sks" in prompt for prompt in study.prompts)


def test_dreambooth_is_read_as_its_authors_publish_it(tmp_path: Path):
    from PIL import Image

    for name in ("backpack_dog", "bear_plushie"):
        (tmp_path / "dataset" / name).mkdir(parents=True)
        Image.new("RGB", (90, 60)).save(tmp_path / "dataset" / name / "00.jpg")
    found = subjects.dreambooth(tmp_path, 10)
    assert [study.name for study in found] == ["backpack_dog", "bear_plushie"]
    assert found[1].photos[0].caption == "a sks stuffed animal"
    assert found[0].prompts[0] == "a sks backpack on a cobblestone street after rain"
    with pytest.raises(ValueError, match="no subject of the DreamBooth"):
        subjects.dreambooth(tmp_path / "dataset" / "bear_plushie", 10)
