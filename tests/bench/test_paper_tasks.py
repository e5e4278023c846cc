"""Tasks of the benchmark: several subjects in a LoRA, ways of seeing one, and ranks given out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lora2_pack.bench.paper import floor, methods, painted, plan
from lora2_pack.bench.paper.bases import outside
from lora2_pack.bench.paper.bases.demo import Demo
from lora2_pack.bench.paper.plan import Plan
from lora2_pack.bench.paper.report import grids
from lora2_pack.bench.paper.runs import allocation, trial, tuning
from lora2_pack.bench.paper.runs.trial import Work
from lora2_pack.bench.paper.subjects import demo, dreambooth, scenes, several, table_a1, tasks
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.reports import scoring
from lora2_pack.tools.tiny_sdxl.pictures import to_pixels
from PIL import Image

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "paper" / "results"
FEW = Plan(steps=2, prompts=1)
METHODS = methods.methods_for(64, several=True)


@pytest.mark.parametrize("size", several.SIZES)
def test_every_subject_of_a_group_has_a_word_and_photos_of_its_own(size: int):
    study = several.group(size, 1, 4)
    assert len(study.subjects) == size and len(study.prompts) == 4 * size
    assert [view for one in study.members for view in one] == list(study.photos)
    for prompt, text in enumerate(study.prompts):
        who = study.subject_of(prompt)
        word, thing = several.WORDS[who], study.things[prompt]
        assert word in text.split() and thing in text.split()
        assert all({word, thing} < set(view.caption.split()) for view in study.subjects[who])
        assert study.own[prompt].caption == text
        assert study.places[prompt] not in {view.place for view in study.photos}
    asked = [study.places.count(place) for place in set(study.places)]
    assert max(asked) - min(asked) <= 1 + size // 4, "each place about as often"


def test_no_two_groups_share_a_subject():
    groups = [one for size in several.SIZES for one in several.tested(size, 1)]
    groups += [one for size in several.SIZES for one in several.for_sweep(size, 1)]
    first = [
        one.subjects[who][0].image.tobytes() for one in groups for who in range(len(one.members))
    ]
    assert len(set(first)) == len(first)
    assert len({one.name for one in groups}) == len(groups)


def test_words_are_one_token_each_and_new_to_the_base(base: Demo):
    from lora2_pack.tools.tiny_sdxl.training.words import Tokens, vocabulary

    tokens = Tokens(base.parts.clip.tokenizer)
    known = set(vocabulary(tokens, captions=500))
    every = [tokens.ids(word) for word in several.WORDS]
    assert all(len(one) == 1 for one in every) and len({one[0] for one in every}) == 16
    assert not known & {one[0] for one in every}


def test_a_picture_is_compared_with_whom_it_was_asked_for(base: Demo):
    study = several.group(4, 0, 2)
    pictures = to_pixels(view.image for view in study.own)
    prompts = range(len(study.prompts))
    right = base.judge(study, pictures, prompts)
    wrong = base.judge(study, pictures.roll(2, 0), prompts)  # each the next subject's
    for judge in base.parts.judges:
        assert np.mean(right[judge]["likeness"]) > np.mean(wrong[judge]["likeness"]) + 0.3
        assert np.mean(right[judge]["apart"]) >= 0.9 and np.mean(wrong[judge]["apart"]) <= 0.1
    alone = demo.drawn(203, 2, "backpack")
    told = base.judge(alone, to_pixels(view.image for view in alone.own), [0, 1])
    for judge in base.parts.judges:
        assert set(told[judge]) == {"likeness", "place", "object"}
    assert set(told[outside.NAME]) == {"outside"}, "which is in no mean"


def test_a_subject_is_seen_in_six_ways_which_differ_in_one_thing_each():
    every = {one.name: one for one in scenes.cells(2)}
    assert len(every) == 24
    one = {tuple(name.split("-")[2:]): study for name, study in every.items() if "dog-208" in name}
    for study in one.values():
        assert len(study.photos) == 6 and study.prompts == one["many", "told"].prompts
    for seen in scenes.SEEN:
        told, untold = (one[seen, how].photos for how in scenes.TOLD)
        assert [view.image.tobytes() for view in told] == [view.image.tobytes() for view in untold]
        assert {view.caption for view in untold} == {"a sks dog"}
        assert len({view.caption for view in told}) == (6 if seen == "many" else 1)
        assert len({view.image.tobytes() for view in told}) == 6
    assert len({view.place for view in one["one", "told"].photos}) == 1


def test_a_task_says_how_much_is_trained():
    assert [tasks.plan_of(task).steps for task in tasks.OF_THE_DEMO] == [300, 300, 600, 1200]
    assert len(tasks.tested("several-8", 4)) == several.TESTED
    assert tasks.for_tuning("several-8", 4)[0].name == "8-subjects-tuning"
    swept = [one.name for one in tasks.for_sweep("several-8", 4)]
    assert swept == ["8-subjects-tuning", "8-subjects-tuning-2"]


def test_complex_scenes_are_those_of_the_papers_figures(tmp_path: Path):
    for name in ("dog8", "fancy_boot", "can"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (90, 60)).save(tmp_path / name / "00.jpg")
    found = dreambooth.complex_scenes(tmp_path)
    assert [study.name for study in found] == ["dog8-complex", "fancy_boot-complex"]
    assert all(len(study.prompts) == 6 for study in found)
    assert found[1].prompts[5] == "a cat inside a sks boot, soft natural light, cozy home"
    with pytest.raises(ValueError, match="neither dog8 nor fancy_boot"):
        dreambooth.complex_scenes(_only(tmp_path / "can"))


def _only(folder: Path) -> Path:
    whole = folder.parent / "other"
    whole.mkdir()
    folder.rename(whole / folder.name)
    return whole


def test_figures_show_the_papers_prompts():
    for subject in table_a1.FIGURES:
        chosen = table_a1.shown(subject, table_a1.PROMPTS[subject])
        assert len(set(chosen)) == 5, "each of them is one of table A1's"
    assert table_a1.shown("mug-23", [""] * 64) == [0, 12, 24, 36, 48]


def test_the_protocol_of_real_weights_is_the_papers():
    any_base: Any = SimpleNamespace(settings={})
    config = {
        name: trial.training_config(METHODS[name], any_base, plan.SDXL, 0, 5e-5).steps
        for name in ("fixed-64", "balanced", "paper", "adalora")
    }
    assert config == {"fixed-64": 1000, "balanced": 500, "paper": 500, "adalora": 500}
    assert (plan.KOALA.steps, plan.KOALA.plain_steps) == (800, 1000)
    with pytest.raises(ValueError, match="plain_steps=-1"):
        plan.changed(plan.SDXL, "plain_steps=-1")


def test_a_grid_has_a_row_a_method_and_a_column_a_prompt(tmp_path: Path):
    picture = np.zeros((8, 8, 3), np.uint8)
    file = tmp_path / "grid.png"
    grids.draw(picture, ["a mug", "a cat"], {"rank 8": [picture] * 2}, file)
    with Image.open(file) as drawn:
        assert drawn.width > drawn.height
    with pytest.raises(ValueError, match="rank 8 has 1 pictures of 2 prompts"):
        grids.draw(picture, ["a mug", "a cat"], {"rank 8": [picture]}, file)


def test_the_judge_from_outside_knows_a_cat_from_a_cup():
    """As ImageNet has them: the conversion and the pictures' scale are right."""
    import skimage.data

    judge = outside.find()
    assert judge is not None, "its packages are in requirements-dev.txt"
    network: Any = judge.network
    for name, wanted in (("chelsea", range(281, 286)), ("coffee", (504, 967, 968))):
        pixels = getattr(skimage.data, name)()
        side = min(pixels.shape[:2])
        photo = to_pixels([pixels[:side, :side]])
        sized = torch.nn.functional.interpolate(photo, (224, 224), mode="bilinear", antialias=True)
        assert int(network((sized - 127 / 255) / (128 / 255)).argmax()) in wanted
        seen = judge.embed(photo)
        assert float(scoring.cosines(seen, seen)[0, 0]) == pytest.approx(1, abs=1e-5)


def test_without_its_packages_there_is_no_judge_from_outside(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outside, "_CODE", "no_such_package")
    assert outside.find() is None


def test_our_judges_see_nothing_of_a_subject_that_is_painted_over(base: Demo):
    study = demo.drawn(203, 4, "backpack")
    told = floor.measured(base, [study])
    for judge in base.parts.judges:
        assert told[judge]["itself"] > told[judge]["greyed"] + 0.3
    assert told["patches"]["greyed"] == told["patches"]["most"] < 0.2
    kept = json.loads((RESULTS / "floor.json").read_text("utf-8"))
    text = " ".join((ROOT / "docs" / "benchmark.md").read_text("utf-8").split())
    for judge, figures in kept.items():
        assert f"{judge} {figures['itself']} and {figures['greyed']} ({figures['most']}" in text


@pytest.fixture
def bench(base: Demo, tmp_path: Path) -> trial.Bench:
    rates = {name: 4e-3 for name, method in METHODS.items() if method.trained}
    return trial.Bench(base, tmp_path, FEW, METHODS, rates)


def test_ranks_that_are_given_are_those_of_the_file(bench: trial.Bench):
    study = several.group(4, 0, 1)

    def done(name: str) -> dict[str, Any]:
        return bench.record(Work(study, name, 0, 4e-3))

    limit = done("fixed-64")["bytes"] / methods.SHARE
    balanced, frozen = done("balanced"), done("frozen")
    assert frozen["ranks"] == balanced["ranks"] and len(set(frozen["ranks"].values())) > 1
    gradient = done("gradient")
    assert 0.97 * limit < gradient["bytes"] <= limit
    assert len(set(gradient["ranks"].values())) > 3, "a spectrum is no uniform rank"
    assert methods.uniform(METHODS) == "fixed-8"
    assert done("fixed-8")["bytes"] == pytest.approx(limit, rel=5e-3)
    assert frozen["settings"]["how"]["of_how"]["mode"] == "balanced"
    kept = bench.record(Work(study, "balanced-kept", 0))
    assert 0 < kept["strength"] <= 1 and kept["ranks"] == balanced["ranks"]
    shown = painted.draw(bench, [study], bench.folder / "report")
    with Image.open(shown[study.name]) as grid:
        assert grid.height > 3 * 100, "two fixed ranks, ours, and ours as it is saved"


def test_ranks_from_the_gradient_go_where_it_is_large(base: Demo):
    photos = demo.drawn(203, 1, "backpack").photos[:1]
    config = trial.training_config(METHODS["gradient"], base, FEW, 0, 4e-3)
    few, many = (allocation.by_gradient(base.parts, photos, config, at) for at in (0.2, 0.6))
    assert all(1 <= few[key] <= many[key] for key in many)
    assert sum(few.values()) < 0.6 * sum(many.values())
    keys = [key for key in many if key.endswith("attn2_to_k")]
    assert keys and set(few) == set(many)


def test_a_rank_that_a_layer_cannot_have_is_refused(base: Demo):
    config = trial.training_config(METHODS["fixed-8"], base, FEW, 0, 4e-3)
    photos = demo.drawn(203, 1, "backpack").photos[:1]
    network = base.parts.prepared(photos, config).network
    with pytest.raises(ValueError, match="rank that it was given"):
        allocation.give(network, [1000] * len(network.ranks))


def test_given_ranks_take_the_rate_of_uniform_ones(base: Demo, monkeypatch: pytest.MonkeyPatch):
    kept = {"fixed-8": {"rate": 1.0}, "balanced": {"rate": 2.0}, "adalora": {"rate": 3.0}}
    monkeypatch.setattr(tuning, "_known", lambda: {"demo, several": kept})
    found = tuning.rates(base, "demo, several", METHODS)
    wanted = {"frozen": 1.0, "gradient": 1.0, "balanced-in-ranks": 2.0, "adalora": 3.0}
    assert wanted.items() <= found.items()


def test_a_lora_with_room_for_the_largest_rank_is_plain(base: Demo):
    config = trial.training_config(METHODS["gradient"], base, FEW, 0, 4e-3)
    held = allocation.holding(config, {"a": 3, "b": 11})
    assert held.rank == RankConfig.fixed(target_rank=11.0, max_rank=11, hysteresis=False)
