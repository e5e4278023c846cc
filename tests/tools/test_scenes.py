"""The drawn world: pictures that repeat, that show what their captions say, and subjects apart."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("skia", reason="scenes need skia-python", exc_type=ImportError)

from lora2_pack.tools.tiny_sdxl.drawing.palette import COLOURS, NAMED, difference, from_oklch, oklab
from lora2_pack.tools.tiny_sdxl.drawing.patterns import BASE_PATTERNS, SUBJECT_PATTERNS
from lora2_pack.tools.tiny_sdxl.drawing.places import PLACES as PLACE_WORDS
from lora2_pack.tools.tiny_sdxl.training.autoencoder_images import training_image_for_autoencoder
from lora2_pack.tools.tiny_sdxl.world import scenes, subjects

SIZE = 96
seeds = st.integers(0, 2**32 - 1)
chosen = st.tuples(
    st.sampled_from(scenes.OBJECTS),
    st.sampled_from(scenes.PLACES),
    st.sampled_from(scenes.COLOURS),
    st.sampled_from(scenes.PATTERNS),
    seeds,
)
CENTRES = np.array([oklab(np.array(from_oklch(*NAMED[name]))) for name in COLOURS])


def scene_of(thing: str, place: str, colour: str, pattern: str, seed: int) -> scenes.Scene:
    """A scene with everything chosen but the pose and the shades."""
    rng = random.Random(seed)
    scene = scenes.random_scene(rng, (thing,), (place,))
    main = scenes.named_colour(colour, rng)
    second, accent = scenes.second_colour(colour, main, rng)
    return replace(scene, colour=colour, pattern=pattern, second=second, main=main, accent=accent)


def colours_of(scene: scenes.Scene) -> list[str]:
    """The colour words of the object's pixels, the most frequent first."""
    lab = oklab(scenes.render(scene, SIZE)[scenes.object_mask(scene, SIZE)] / 255)
    # Light and shade change lightness; what the colour is called hangs less on it.
    far = ((lab[:, None] - CENTRES) ** 2 * (0.4, 1, 1)).sum(-1)
    return [COLOURS[index] for index, _ in Counter(far.argmin(1).tolist()).most_common()]


def test_there_is_enough_to_say():
    assert len(scenes.OBJECTS) >= 12
    assert len(scenes.PLACES) >= 12
    assert len(scenes.COLOURS) >= 10
    assert len(scenes.PATTERNS) >= 5
    assert "plain" in scenes.PATTERNS


@settings(max_examples=120, deadline=None)
@given(chosen)
def test_every_scene_is_drawn_and_repeats(choice):
    scene = scene_of(*choice)
    image = scenes.render(scene, SIZE)
    assert image.shape == (SIZE, SIZE, 3)
    assert image.dtype == np.uint8
    assert image.std() > 2
    assert image.tobytes() == scenes.render(scene, SIZE).tobytes()


@pytest.mark.parametrize("size", [64, 128, 192, 256])
def test_sizes_show_the_same_picture(size: int):
    scene = scenes.random_scene(random.Random(3))
    image, reference = scenes.render(scene, size), scenes.render(scene, 512)
    assert image.shape == (size, size, 3)

    def blocks(picture: np.ndarray) -> np.ndarray:
        step = len(picture) // 8
        return picture.reshape(8, step, 8, step, 3).mean((1, 3))

    assert np.abs(blocks(image) - blocks(reference)).max() < 12


def test_random_scenes_depend_on_the_seed_alone():
    first, second = (scenes.random_scene(random.Random(11)) for _ in range(2))
    assert first == second
    assert scenes.random_scene(random.Random(12)) != first


@settings(max_examples=120, deadline=None)
@given(chosen)
def test_the_object_fills_half_to_three_quarters(choice):
    scene = scene_of(*choice)
    mask = scenes.object_mask(scene, SIZE)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    # A leaning object reaches a little further than an upright one.
    assert 0.48 <= extent / SIZE <= 0.82
    assert 0.1 <= mask.mean() <= 0.45
    assert rows[0] > 0
    assert rows[-1] < SIZE - 1
    assert columns[0] > 0
    assert columns[-1] < SIZE - 1


@settings(max_examples=60, deadline=None)
@given(chosen)
def test_the_object_stands_out_from_its_place(choice):
    scene = scene_of(*choice)
    # Nothing but the object may change with its colour, and it must be seen to.
    other = "blue" if scene.colour != "blue" else "orange"
    changed = replace(scene, main=scenes.named_colour(other, random.Random(0)))
    mask = scenes.object_mask(scene, SIZE)
    moved = np.abs(scenes.render(scene, SIZE).astype(int) - scenes.render(changed, SIZE)).sum(-1)
    assert (moved[mask] > 24).mean() > 0.25
    # A lamp lights its room; elsewhere the place does not depend on the object's colour.
    if scene.place != "dark":
        assert (moved[~mask] > 24).mean() < 0.03


def test_the_named_colour_dominates():
    rng = random.Random(5)
    plain: dict[str, list[bool]] = {name: [] for name in COLOURS}
    patterned: list[bool] = []
    for _ in range(330):
        scene = scenes.random_scene(rng)
        words = colours_of(scene)
        if scene.pattern == "plain":
            plain[scene.colour].append(words[0] == scene.colour)
        else:
            patterned.append(scene.colour in words[:2])
    assert np.mean([hit for hits in plain.values() for hit in hits]) >= 0.95
    assert np.mean(patterned) >= 0.95


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("thing", scenes.OBJECTS)
def test_every_object_takes_every_colour(thing: str, colour: str):
    scene = scene_of(thing, "gallery", colour, "plain", 1)
    assert colours_of(scene)[0] == colour


@settings(max_examples=60, deadline=None)
@given(chosen)
def test_patterns_show(choice):
    scene = scene_of(*choice)
    mask = scenes.object_mask(scene, SIZE)
    other = scenes.render(replace(scene, pattern="plain"), SIZE)
    moved = np.abs(scenes.render(scene, SIZE).astype(int) - other).sum(-1)[mask] > 24
    if scene.pattern == "plain":
        assert not moved.any()
    else:
        assert moved.mean() > 0.08


@settings(max_examples=200, deadline=None)
@given(chosen)
def test_captions_say_what_is_there(choice):
    scene = scene_of(*choice)
    rng = random.Random(choice[-1])
    text = scenes.caption(scene, rng)
    assert text.startswith(("a ", "an "))
    assert text.startswith("an ") == (text.split()[1][0] in "aeiou")
    assert f" {scene.object} " in text
    assert any(text.endswith(phrase) for phrase in PLACE_WORDS[scene.place].phrases)
    assert f" {scene.colour} " in f" {text} "
    assert scene.pattern == "plain" or scene.pattern in text
    assert "  " not in text
    assert ("glowing" in text) == (scene.place == "dark")
    loose = scenes.caption(scene, rng, complete=False)
    assert scene.object in loose
    assert "  " not in loose


def test_captions_vary():
    scene = scene_of("mug", "beach", "red", "striped", 0)
    rng = random.Random(0)
    texts = {scenes.caption(scene, rng) for _ in range(60)}
    assert len(texts) >= 4
    plain = replace(scene, gloss=0.1)
    texts = {scenes.caption(plain, rng) for _ in range(60)}
    assert "a red striped mug on a sandy beach at sunset" in texts


def test_no_caption_takes_the_rare_word():
    rng = random.Random(1)
    for _ in range(300):
        assert subjects.RARE_WORD not in scenes.caption(scenes.random_scene(rng), rng).split()


def test_a_fifth_of_the_pairs_is_held_out_evenly():
    held_out = [
        (thing, place)
        for thing in scenes.OBJECTS
        for place in scenes.PLACES
        if scenes.is_held_out(thing, place)
    ]
    pairs = len(scenes.OBJECTS) * len(scenes.PLACES)
    assert 0.18 <= len(held_out) / pairs <= 0.22
    things = Counter(thing for thing, _ in held_out)
    places = Counter(place for _, place in held_out)
    assert set(things) == set(scenes.OBJECTS)
    assert set(places) == set(scenes.PLACES)
    assert max(things.values()) - min(things.values()) <= 1
    assert max(places.values()) - min(places.values()) <= 1


@pytest.mark.parametrize("held_out", [True, False])
def test_random_scenes_keep_to_their_pairs(held_out: bool):
    rng = random.Random(2)
    drawn = [scenes.random_scene(rng, held_out=held_out) for _ in range(300)]
    assert {scenes.is_held_out(scene.object, scene.place) for scene in drawn} == {held_out}
    assert {scene.object for scene in drawn} == set(scenes.OBJECTS)
    assert {scene.place for scene in drawn} == set(scenes.PLACES)


def test_random_scenes_keep_to_the_objects_and_places_asked_for():
    rng = random.Random(2)
    drawn = [scenes.random_scene(rng, ("cat", "mug"), ("snow",)) for _ in range(30)]
    assert {scene.object for scene in drawn} == {"cat", "mug"}
    assert {scene.place for scene in drawn} == {"snow"}


def test_subjects_are_none_that_the_base_knows():
    assert not set(SUBJECT_PATTERNS) & set(BASE_PATTERNS)
    rng = random.Random(0)
    assert all(scenes.random_scene(rng).decor is None for _ in range(200))
    for seed in (*subjects.SUBJECT_SEEDS, *subjects.JUDGE_SEEDS[:50]):
        subject = subjects.make_subject(seed)
        assert subject == subjects.make_subject(seed)
        assert subject.pattern in SUBJECT_PATTERNS
        assert all(
            scene.decor == subject.decor for scene in subjects.subject_scenes(subject, "train")
        )


def test_subjects_differ_from_each_other():
    assert len(set(subjects.SUBJECT_SEEDS)) == len(subjects.SUBJECT_SEEDS) >= 8
    assert not set(subjects.SUBJECT_SEEDS) & set(subjects.JUDGE_SEEDS)
    all_of_them = [subjects.make_subject(seed) for seed in subjects.SUBJECT_SEEDS]
    assert len({subject.object for subject in all_of_them}) >= 8
    for first, second in combinations(all_of_them, 2):
        apart = difference(first.main, second.main) + difference(first.accent, second.accent)
        assert apart > 0.1 or first.pattern != second.pattern
        assert first.object != second.object or apart > 0.2


def test_subjects_of_a_kind_look_different():
    # In one pose and place, so that nothing but the subject can differ.
    scene = scenes.random_scene(random.Random(4), ("mug",), ("white",))
    looks = []
    for seed in subjects.JUDGE_SEEDS[:12]:
        mug = subjects.make_subject(seed, "mug")
        changed = replace(
            scene, main=mug.main, accent=mug.accent, pattern=mug.pattern, decor=mug.decor
        )
        looks.append(scenes.render(changed, SIZE).astype(int))
    mask = scenes.object_mask(scene, SIZE)
    for first, second in combinations(looks, 2):
        assert np.abs(first - second)[mask].mean() > 12


@pytest.mark.parametrize("seed", subjects.SUBJECT_SEEDS[:3])
def test_views_of_a_subject(seed: int):
    subject = subjects.make_subject(seed)
    train = subjects.subject_views(subject, "train", SIZE)
    held_out = subjects.subject_views(subject, "held_out", SIZE)
    assert (len(train), len(held_out)) == (6, 12)
    assert len({view.place for view in train}) == 6
    assert not {view.place for view in train} & {view.place for view in held_out}
    for view in (*train, *held_out):
        assert view.image.shape == (SIZE, SIZE, 3)
        assert view.caption.split().count(subjects.RARE_WORD) == 1
        assert f"{subjects.RARE_WORD} {subject.object}" in view.caption
        assert PLACE_WORDS[view.place].phrases[0] in view.caption
    again = subjects.subject_views(subject, "train", SIZE)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(train, again, strict=True))
    images = [view.image for view in (*train, *held_out)]
    assert all(not np.array_equal(a, b) for a, b in combinations(images, 2))


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(scenes.OBJECTS), st.sampled_from(["train", "held_out"]))
def test_subjects_stay_in_the_picture(seed, thing, kind):
    for scene in subjects.subject_scenes(subjects.make_subject(seed, thing), kind)[:4]:
        mask = scenes.object_mask(scene, SIZE)
        assert not mask[0].any()
        assert not mask[:, 0].any()
        assert not mask[:, -1].any()


def test_the_autoencoder_sees_every_colour():
    rng = random.Random(0)
    images = [training_image_for_autoencoder(rng, 64) for _ in range(400)]
    assert {(image.shape, image.dtype) for image in images} == {((64, 64, 3), np.dtype("uint8"))}
    lab = oklab(np.stack(images)[:, ::2, ::2] / 255).reshape(-1, 3)
    chroma, hue = np.hypot(lab[:, 1], lab[:, 2]), np.degrees(np.arctan2(lab[:, 2], lab[:, 1])) % 360
    strong = np.histogram(hue[chroma > 0.08], bins=24, range=(0, 360))[0]
    # None of 24 hues has less than a quarter of its share, teal among them.
    assert strong.min() > strong.mean() / 4
    tones = np.histogram(lab[:, 0], bins=8, range=(0, 1))[0]
    assert tones[1:].min() > tones.mean() / 8


def test_autoencoder_images_depend_on_the_seed_alone():
    first, second = (training_image_for_autoencoder(random.Random(9), SIZE) for _ in range(2))
    assert np.array_equal(first, second)
