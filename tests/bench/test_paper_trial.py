"""The benchmark's trials on the demo base: rivals' files are what PEFT computes; nothing twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.bench.paper import methods
from lora2_pack.bench.paper.bases import outside
from lora2_pack.bench.paper.bases.demo import Demo
from lora2_pack.bench.paper.plan import Plan
from lora2_pack.bench.paper.runs import cuts, rivals, strengths, sweep, trial, working
from lora2_pack.bench.paper.runs.trial import Work
from lora2_pack.bench.paper.subjects import demo, dreambooth
from lora2_pack.bench.paper.subjects.study import Study
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.training import trainer
from lora2_pack.lora2_core.training.losses.fixed_noise import FixedNoise
from lora2_pack.tools.tiny_sdxl.evaluation.figures import write_json
from lora2_pack.tools.tiny_sdxl.pictures import read_strip

torch.set_num_threads(1)

FEW = Plan(steps=2, batch=1, prompts=2, pictures=1)
METHODS = methods.methods_for(64)
RATE = 4e-3
RATES = {name: RATE for name, method in METHODS.items() if method.trained}


@pytest.fixture(scope="module")
def study() -> Study:
    drawn = demo.drawn(41, FEW.prompts)
    return replace(drawn, photos=drawn.photos[:2])


@pytest.mark.parametrize("name", ["adalora", "dora"])
def test_a_rivals_file_is_what_peft_computes(
    base: Demo, study: Study, name: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    parts = base.parts
    config = trial.training_config(METHODS[name], base, FEW, 0, 4e-2)
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


def test_the_allocator_takes_ranks_away(base: Demo, study: Study, tmp_path: Path):
    config = trial.training_config(METHODS["adalora"], base, replace(FEW, steps=12), 0, RATE)
    file = tmp_path / "rival.safetensors"
    about = rivals.train(base.parts, study.photos, METHODS["adalora"], config, file)
    ranks = METHODS["adalora"].rank
    assert about["mean_rank"] == pytest.approx(ranks["target_r"], rel=0.05)


@pytest.fixture
def bench(base: Demo, tmp_path: Path) -> trial.Bench:
    return trial.Bench(base, tmp_path, FEW, METHODS, RATES)


def works_of(study: Study, *names: str) -> list[Work]:
    return [Work(study, name, 0, RATES.get(name)) for name in names]


def test_what_needs_a_training_that_failed_says_so(bench: trial.Bench, study: Study):
    (largest,) = works_of(study, "fixed-64")
    kept = {"settings": bench._settings(largest), "failed": "The loss is no number."}
    bench.file(largest).parent.mkdir(parents=True)
    write_json(bench.file(largest), kept)
    made: dict[str, dict[str, Any]] = {}
    works = works_of(study, "balanced", "svd-64")
    assert working.do_all(
        bench, works, float("inf"), lambda work, record, _: made.update({work.name: record})
    )
    for name in ("balanced", "svd-64"):
        assert made[name]["failed"] == "fixed-64, which it needs, failed: The loss is no number."


def test_a_record_is_made_once_and_cuts_meet_their_size(
    bench: trial.Bench, study: Study, tmp_path: Path
):
    sized = ("svd-64", "svd-16", "sv-fro-64", "balanced")
    # Before what they are cut from or sized by: the queue has to find the order by itself.
    works = works_of(study, methods.BASE, methods.OWN, *sized, "fixed-64", "fixed-16")
    made: dict[str, dict[str, Any]] = {}
    told: list[str] = []

    def tell(work: Work, record: dict[str, Any], seconds: float) -> None:
        made[work.name] = record
        told.append(work.name) if seconds else None

    assert working.do_all(bench, works, float("inf"), tell)
    assert sorted(told) == sorted(work.name for work in works)
    judges = {*bench.base.parts.judges, outside.NAME}
    assert made[methods.BASE]["scores"].keys() == judges
    for name in sized:
        assert 0.8 < made[name]["bytes"] / (made["fixed-64"]["bytes"] / methods.SHARE) <= 1
    assert made["svd-16"]["seconds"] == made["fixed-16"]["seconds"], "cutting costs nothing more"
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "records").rglob("*.*[!k]")}
    told.clear()
    assert working.do_all(bench, works, float("inf"), tell) and not told
    assert files == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "records").rglob("*.*[!k]")
    }
    for judge, scores in made[methods.OWN]["scores"].items():
        measures = {"outside"} if judge == outside.NAME else {"likeness", "place", "object"}
        assert {key: len(values) for key, values in scores.items()} == dict.fromkeys(measures, 2)
    assert set(made["balanced"]["ranks"].values()) - {64}
    learnt = made["balanced"]["learnt"]  # before the file was cut
    assert learnt.keys() >= made["balanced"]["ranks"].keys()
    assert sum(learnt.values()) > sum(made["balanced"]["ranks"].values())
    largest, work = works_of(study, "fixed-64", "balanced")
    bench.file(largest).with_suffix(".safetensors").unlink()
    bench.file(work).unlink()
    assert working.do_all(bench, [work], float("inf"), tell)
    assert told == ["balanced"], "for its bytes a record is enough"
    other = replace(bench, plan=replace(FEW, steps=1))
    assert other.found(largest) is None, "another plan is another record"
    assert other.record(largest)["settings"] != made["fixed-64"]["settings"]
    assert bench.found(largest) is None
    another = replace(bench, base=replace(bench.base, weights="another base"))
    assert bench.found(work) and another.found(work) is None, "another base, too"


@pytest.fixture(scope="module")
def learnt(base: Demo, study: Study, tmp_path_factory: pytest.TempPathFactory) -> trial.Bench:
    """A bench that has painted without a LoRA, and with one of rank 8."""
    bench = trial.Bench(base, tmp_path_factory.mktemp("learnt"), FEW, METHODS, RATES)
    for work in works_of(study, methods.BASE, "fixed-8"):
        bench.record(work)
    return bench


def test_a_lora_that_was_painted_with_is_gone_from_the_base(learnt: trial.Bench, study: Study):
    before, after = (
        read_strip(learnt.file(work).with_suffix(".png"))
        for work in works_of(study, methods.BASE, "fixed-8")
    )
    assert not torch.equal(before, after)
    again = learnt.base.paint(study.prompts, [1000, 1001], None)
    torch.testing.assert_close(again, before, rtol=0, atol=0.6 / 255)
    assert learnt.base.parts.fingerprint() == learnt.base.weights


def test_each_layer_keeps_its_share(learnt: trial.Bench, study: Study, tmp_path: Path):
    source = learnt.file(*works_of(study, "fixed-8")).with_suffix(".safetensors")
    size = source.stat().st_size / 1e6
    about = cuts.cut(source, tmp_path / "cut.safetensors", 0.6 * size, "sv_fro")
    assert about["megabytes"] <= 0.6 * size and 1 <= about["mean_rank"] < 8
    with pytest.raises(ValueError, match="rank 1 takes more"):
        cuts.cut(source, tmp_path / "cut.safetensors", 0.01, "sv_fro")


def test_a_cut_is_made_anew_when_what_it_cuts_or_fits_is_made_otherwise(
    bench: trial.Bench, study: Study
):
    names = ("svd-64", "svd-16", "balanced", "balanced-cut")
    before = {work.name: bench._settings(work) for work in works_of(study, *names)}

    def changed(name: str) -> set[str]:
        other = replace(bench, rates={**RATES, name: RATE / 2})
        works = works_of(study, *names)
        return {work.name for work in works if other._settings(work) != before[work.name]}

    assert changed("fixed-64") == {"svd-64"}, "its bytes stay the same, whatever it has learnt"
    assert changed("fixed-16") == {"svd-16"}
    assert changed("balanced") == {"balanced-cut"}
    assert changed("adalora") == {"balanced-cut"}, "its bytes are what the ranks come to"


def test_time_that_is_over_begins_nothing(bench: trial.Bench, study: Study):
    works = works_of(study, methods.BASE)
    assert not working.do_all(bench, works, -1.0, lambda *_: None)
    assert bench.found(works[0]) is None


VARIANTS = sweep.variants(METHODS[methods.IN_RANKS])


def test_every_variant_of_the_sweep_trains_otherwise(base: Demo):
    trained = [one for one in VARIANTS.values() if one.trained]
    configs = [trial.training_config(one, base, FEW, 0, RATE) for one in trained]
    assert len({repr(config.as_dict()) for config in configs}) == len(trained) == 19


def test_what_is_weakened_is_told_by_its_file_alone(base: Demo, study: Study, tmp_path: Path):
    """The loss on fixed noise of a file at a strength is that of the network it was saved from."""
    plan = replace(FEW, steps=30)
    config = trial.training_config(VARIANTS["as-it-is"], base, plan, 0, RATE)
    setup = base.parts.prepared(study.photos, config)
    list(trainer.train(setup.network, setup.task, setup.config, setup.entropy))
    file = tmp_path / "whole.safetensors"
    lora_file.save(file, setup.network.components(), {})
    judge = FixedNoise(setup.network, setup.task, config.batch_size)
    told = strengths.on_fixed_noise(base.parts, study.photos, config, file)
    for at, loss in told.items():
        with setup.network.at_strength(at):
            assert loss == pytest.approx(judge.loss(), rel=1e-4)
    assert told[1.0] < told[0.0]
    for name in ("strength-0.8", "kept-0.9"):
        weaker = tmp_path / f"{name}.safetensors"
        method = VARIANTS[name]
        about = strengths.weaken(base.parts, study.photos, config, method, file, weaker)
        ruled = judge.least_strength(0.9)
        assert about["strength"] == (0.8 if method.kept == 1 else pytest.approx(ruled, abs=0.011))
        found = strengths.on_fixed_noise(base.parts, study.photos, config, weaker)
        with setup.network.at_strength(about["strength"]):
            assert found[1.0] == pytest.approx(judge.loss(), rel=1e-4)


def test_a_weaker_lora_is_a_trial_of_its_own(bench: trial.Bench, study: Study):
    swept = replace(bench, methods=VARIANTS, rates={"as-it-is": RATE})
    whole = swept.record(Work(study, "as-it-is", 0, RATE), with_lora=True)
    record = swept.record(Work(study, "kept-0.96", 0))
    assert 0 < record["strength"] <= 1 and len(record["losses"]) == 7
    assert record["settings"]["how"]["kept"] == 0.96
    assert record["seconds"] == whole["seconds"]


def test_photographs_and_drawn_subjects_are_all_there():
    every = demo.tested(10)
    assert len(every) == 16 and len({study.name for study in every}) == 16
    assert all(len(study.prompts) == 10 for study in every)
    tuning = demo.for_tuning(10)
    assert len(tuning) == 4 and tuning[3].name == "photo-motorcycle"
    swept = demo.for_sweep(10)
    assert len({study.things[0] for study in swept[:12]}) == 12, "one of every kind"
    assert [study.name for study in swept[12:]] == ["photo-motorcycle", "photo-coins"]
    for others in (tuning, swept):
        assert not {one.name for one in others} & {one.name for one in every}
    for study in every:
        assert 5 <= len(study.photos) <= 6
        assert all(view.image.shape == (192, 192, 3) for view in study.photos)
        assert all("sks" in prompt for prompt in study.prompts)


def test_dreambooth_is_read_as_its_authors_publish_it(tmp_path: Path):
    from PIL import Image

    for name in ("backpack_dog", "bear_plushie"):
        (tmp_path / "dataset" / name).mkdir(parents=True)
        Image.new("RGB", (90, 60)).save(tmp_path / "dataset" / name / "00.jpg")
    found = dreambooth.read(tmp_path, 10)
    assert [study.name for study in found] == ["backpack_dog", "bear_plushie"]
    assert found[1].photos[0].caption == "a sks stuffed animal"
    assert found[0].prompts[0] == "a sks backpack on a cobblestone street after rain"
    with pytest.raises(ValueError, match="no subject of the DreamBooth"):
        dreambooth.read(tmp_path / "dataset" / "bear_plushie", 10)
