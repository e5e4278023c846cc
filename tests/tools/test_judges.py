"""The judges: what they may learn from, that they learn, and what is read from their files."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("skia", reason="scenes need skia-python", exc_type=ImportError)

from lora2_pack.lora2_core.reports import vision
from lora2_pack.lora2_core.tiny_sdxl.judge_networks import ANSWERS, NETWORKS
from lora2_pack.lora2_core.tiny_sdxl.judges import AT_ONCE, Judge, likeness_judges, load_judges
from lora2_pack.tools.tiny_sdxl.pictures import to_pictures
from lora2_pack.tools.tiny_sdxl.training import judges, run
from lora2_pack.tools.tiny_sdxl.training.judges import UNKNOWN, Recipe, architecture_of
from lora2_pack.tools.tiny_sdxl.training.run import Schedule, read_average
from lora2_pack.tools.tiny_sdxl.world import scenes
from lora2_pack.tools.tiny_sdxl.world.scenes import OBJECTS, PLACES, random_scene
from lora2_pack.tools.tiny_sdxl.world.subjects import (
    JUDGE_SEEDS,
    SUBJECT_SEEDS,
    make_subject,
    subject_views,
)

torch.set_num_threads(1)

RECIPE = Recipe(scenes=4, kinds=1, of_a_kind=3, views=2, size=112)
architectures = pytest.mark.parametrize("name", tuple(NETWORKS))


class Stop(Exception):
    """The machine went away."""


def pictures(count: int, size: int = 112, seed: int = 0) -> torch.Tensor:
    """Scenes as samples come."""
    rng = random.Random(seed)
    return judges.to_pixels(judges.render(random_scene(rng), size) for _ in range(count))


def judge_of(name: str) -> Judge:
    """A judge that has learnt nothing."""
    return Judge(judges.new_network(name), name)


def judge_of_run(file: Path) -> Judge:
    """What a run's averaged weights come to."""
    average = read_average(file)
    name = architecture_of(average)
    network = judges.new_network(name)
    network.load_state_dict(average)
    return Judge(network, name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each architecture."""
    folder = tmp_path_factory.mktemp("runs")
    files = {name: folder / f"{name}.safetensors" for name in NETWORKS}
    for name, file in files.items():
        judges.train(name, file, Schedule(steps=3, learning_rate=1e-3, warm_up=1), RECIPE)
    return files


# --- what they learn from ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", [*SUBJECT_SEEDS, JUDGE_SEEDS.stop, 0])
def test_no_judge_learns_from_what_it_will_judge(seed: int):
    with pytest.raises(ValueError, match=str(seed)):
        judges.judges_subject(seed, "mug")
    assert judges.judges_subject(JUDGE_SEEDS[0], "mug") == make_subject(JUDGE_SEEDS[0], "mug")


def test_batches_ask_only_the_judges_subjects(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def spy(seed: int, object: str | None = None) -> object:
        asked.append(seed)
        return make_subject(seed, object)

    monkeypatch.setattr(judges, "make_subject", spy)
    for step in range(5):
        judges.training_batch(step, RECIPE)
    assert asked
    assert set(asked) <= set(JUDGE_SEEDS)
    assert not set(asked) & set(SUBJECT_SEEDS)


def test_a_batch_depends_on_its_step_and_seed_alone():
    first, again = (judges.training_batch(7, RECIPE) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.grid, again.grid)
    for other in (
        judges.training_batch(8, RECIPE),
        judges.training_batch(7, replace(RECIPE, seed=1)),
    ):
        assert not torch.equal(first.images, other.images)


def test_a_batch_says_what_it_shows():
    batch = judges.training_batch(0, RECIPE)
    views = RECIPE.kinds * RECIPE.of_a_kind * RECIPE.views
    assert batch.images.shape == (RECIPE.scenes + views, 3, RECIPE.side, RECIPE.side)
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1
    # Scenes stand alone; every subject has its views.
    counts = batch.subjects.bincount().tolist()
    assert counts == [1] * RECIPE.scenes + [RECIPE.views] * (RECIPE.kinds * RECIPE.of_a_kind)
    for question in ("object", "place"):
        assert (batch.answers[question] != UNKNOWN).all()
    assert (batch.answers["colour"][: RECIPE.scenes] != UNKNOWN).all()
    assert (batch.answers["colour"][RECIPE.scenes :] == UNKNOWN).all()
    # The subjects of a kind stand in the same places.
    places = batch.answers["place"][RECIPE.scenes :].view(-1, RECIPE.views)
    assert (places == places[0]).all()
    for grid, thing in zip(batch.grid, batch.answers["object"], strict=True):
        assert set(grid.unique().tolist()) == {0, thing.item() + 1}


def test_looks_of_a_kind_differ_but_share_traits():
    rng = random.Random(0)
    shared = 0
    for _ in range(40):
        looks = judges.looks_of_a_kind(rng, "mug", 4)
        assert len({repr(look) for look in looks}) == 4
        shared += sum(
            look.main == looks[0].main
            or look.pattern == looks[0].pattern
            or (look.decor and looks[0].decor and look.decor.mark == looks[0].decor.mark) is True
            for look in looks[1:]
        )
    assert shared > 60


def test_softened_pictures_keep_their_colours():
    images = pictures(24)
    soft = judges.soften(images, random.Random(0), torch.Generator().manual_seed(0))
    assert soft.shape == images.shape
    assert not torch.equal(soft, images)
    off = (soft.mean((2, 3)) - images.mean((2, 3))).abs()  # (24, 3)
    assert off.mean() < 0.03
    assert off.max() < 0.12


def test_contrast_wants_views_together_and_others_apart():
    subjects = torch.tensor([0, 0, 1, 1, 2])
    corners = torch.eye(3)
    apart = judges.contrast(corners[[0, 0, 1, 1, 2]], subjects, 0.1)
    mixed = judges.contrast(corners[[0, 1, 0, 1, 2]], subjects, 0.1)
    alike = judges.contrast(corners[[0, 0, 0, 0, 0]], subjects, 0.1)
    assert apart < alike < mixed
    assert apart < 0.01


# --- how they learn ---------------------------------------------------------------------------


@architectures
def test_a_network_is_small_and_always_starts_the_same(name: str):
    first, again = judges.new_network(name), judges.new_network(name)
    assert sum(p.numel() for p in first.parameters()) <= 1_000_000
    # A run stores parameters alone.
    assert not list(first.buffers())
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@architectures
def test_a_few_steps_lower_the_loss(name: str):
    network = judges.new_network(name)
    batch = judges.training_batch(0, RECIPE)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = judges.loss_of(network, batch, RECIPE)
        loss.backward()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@architectures
def test_a_stopped_run_ends_like_one_that_was_not_stopped(
    name: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    batch_of = judges.training_batch

    def until(step: int, recipe: Recipe) -> judges.Batch:
        if step == 2:
            raise Stop
        return batch_of(step, recipe)

    file = tmp_path / "run.safetensors"
    schedule = Schedule(steps=3, learning_rate=1e-3, warm_up=1)
    monkeypatch.setattr(run, "SAVE_SECONDS", -1)
    monkeypatch.setattr(judges, "training_batch", until)
    with pytest.raises(Stop):
        judges.train(name, file, schedule, RECIPE)
    monkeypatch.setattr(judges, "training_batch", batch_of)
    judges.train(name, file, schedule, RECIPE)
    assert file.read_bytes() == runs[name].read_bytes()


# --- what they say ----------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("size", [(112, 112), (192, 192), (96, 160)])
def test_judges_read_pictures_of_any_size(name: str, size: tuple[int, int]):
    judge = judge_of(name)
    reading = judge.read(torch.rand(3, 3, *size))
    for question, words in ANSWERS.items():
        found = getattr(reading, question)
        assert len(found) == 3
        assert set(found) <= set(words)


@architectures
def test_embeddings_are_normalised_and_do_not_hang_on_company(name: str):
    judge, images = judge_of(name), pictures(AT_ONCE + 2)
    embedding = judge.embed(images)
    assert embedding.shape == (AT_ONCE + 2, 64)
    assert not embedding.requires_grad
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(images)))
    alone = judge.embed(images[5:6])
    torch.testing.assert_close(alone, embedding[5:6], atol=1e-4, rtol=0)


@architectures
def test_a_picture_is_most_like_itself(name: str):
    judge, images = judge_of(name), pictures(3)
    one = judge.likeness(images, images[:1])
    assert one.shape == (3,)
    assert one[0].item() == pytest.approx(1, abs=1e-5)
    assert (one[1:] < one[0]).all()
    assert judge.likeness(images[:1].repeat(2, 1, 1, 1), images[:1]).tolist() == (
        pytest.approx([1, 1], abs=1e-5)
    )


# --- their files ------------------------------------------------------------------------------


@architectures
def test_an_exported_judge_answers_as_the_run_does(
    name: str, runs: dict[str, Path], tmp_path: Path
):
    small = tmp_path / "judges" / f"{name}.safetensors"
    judges.export(runs[name], small)
    assert small.stat().st_size < 2.1e6
    assert [file.name for file in small.parent.iterdir()] == [small.name]
    judge, from_run = Judge.load(small), judge_of_run(runs[name])
    assert (judge.architecture, from_run.architecture) == (name, name)
    assert judge.side == judges.SIDE
    average = read_average(runs[name])
    for key, value in judge.network.state_dict().items():
        assert torch.equal(value, average[key].half().float()), key
        assert torch.equal(from_run.network.state_dict()[key], average[key])
    images = pictures(4)
    torch.testing.assert_close(judge.embed(images), from_run.embed(images), atol=5e-3, rtol=0)


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    file = tmp_path / "other.safetensors"
    run.save_file({"average.weight": torch.zeros(3)}, file, {"step": "1"})
    with pytest.raises(ValueError, match="judge"):
        Judge.load(file)
    with pytest.raises(ValueError, match="judge"):
        judges.export(file, tmp_path / "out.safetensors")


def test_judges_know_every_word():
    assert ANSWERS["object"] == OBJECTS
    assert ANSWERS["place"] == PLACES


def test_the_packs_words_are_those_of_the_drawn_world():
    """The networks' answers are numbers of words: an order that changed would tell lies."""
    assert ANSWERS == {
        "object": OBJECTS, "place": PLACES, "colour": scenes.COLOURS, "pattern": scenes.PATTERNS,
    }  # fmt: skip


def test_the_packs_judges_are_those_of_the_benchmark():
    views = [pixels_of_view(*one) for one in ((41, 0), (41, 1), (23, 0))]
    drawn = to_pictures(torch.stack(views))
    for judge in likeness_judges():
        network = load_judges(judge.name)
        embedded = network.embed(judges.resized(torch.stack(views), judges.SIDE))
        assert torch.allclose(judge.embed(drawn), embedded, atol=1e-4)
        same, other = (embedded[0] @ embedded[n] for n in (1, 2))
        assert same > other + 0.3, "it tells subjects apart"


def pixels_of_view(seed: int, number: int = 0) -> torch.Tensor:
    """A view of a subject, (3, 192, 192)."""
    return judges.to_pixels([subject_views(make_subject(seed))[number].image])[0]


def test_a_judge_without_weights_is_named(tmp_path: Path):
    with pytest.raises(vision.JudgeError, match="'residual' has no weights"):
        load_judges("residual", tmp_path)
