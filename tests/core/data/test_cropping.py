"""Buckets: sizes that fit a photo, cuts and mirror images, and batches of one shape."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.config.train import DataConfig, TrainConfig
from lora2_pack.lora2_core.data.cropping import bucket_size, covering, crops, cut, mirrored
from lora2_pack.lora2_core.data.photos import DatasetError, Photo
from lora2_pack.lora2_core.data.samples import SampleOrder
from lora2_pack.tests.core import toy

torch.set_num_threads(1)

SIDES = st.one_of(st.integers(64, 300), st.integers(64, 5000))
RESOLUTIONS = st.sampled_from((64, 96, 128, 256, 480, 512, 768, 1024, 1536))


def photo(width: int, height: int, mask: torch.Tensor | None = None) -> Photo:
    return Photo(toy.noise(height, width, 3).sigmoid(), "a cat", mask)


def step_of(resolution: int) -> int:
    return 64 if resolution >= 512 else 32


# --- sizes ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(width=SIDES, height=SIDES, resolution=RESOLUTIONS)
def test_a_bucket_fits_the_area_the_step_and_the_photo(width, height, resolution) -> None:
    w, h = bucket_size(width, height, resolution)
    assert w % step_of(resolution) == h % step_of(resolution) == 0
    assert 0 < w * h <= resolution**2
    assert w <= width
    assert h <= height
    assert w <= 4 * h <= 16 * w


@settings(deadline=None, max_examples=300)
@given(width=SIDES, height=SIDES, resolution=RESOLUTIONS)
def test_a_bucket_is_near_the_photo_in_aspect(width, height, resolution) -> None:
    w, h = bucket_size(width, height, resolution)
    wanted = min(max(width / height, 1 / 4), 4)
    steps = min(w, h) / step_of(resolution)
    assert abs(math.log(w / h / wanted)) <= math.log(1 + 2 / steps) + 1e-9


@settings(deadline=None, max_examples=100)
@given(width=SIDES, height=SIDES, resolution=st.sampled_from((64, 256, 512, 768)))
def test_no_size_that_fills_the_limits_is_nearer(width, height, resolution) -> None:
    """Against every size there is, taken one by one."""
    step = step_of(resolution)

    def fits(w: int, h: int) -> bool:
        return w * h <= resolution**2 and w <= width and h <= height and w <= 4 * h <= 16 * w

    def error(w: int, h: int) -> float:
        return abs(math.log(w / h) - math.log(min(max(width / height, 1 / 4), 4)))

    sides = range(step, 2 * resolution + step, step)
    full = [
        (w, h)
        for w in sides
        for h in sides
        if fits(w, h) and not (fits(w + step, h) and fits(w, h + step))
    ]
    found = bucket_size(width, height, resolution)
    least = min(error(*size) for size in full)
    assert error(*found) <= least + 1e-8
    ties = [size for size in full if error(*size) <= least + 1e-10]
    assert found[0] * found[1] >= max(w * h for w, h in ties)


@settings(deadline=None, max_examples=200)
@given(width=SIDES, height=SIDES, resolution=RESOLUTIONS)
def test_a_photo_on_its_side_has_the_bucket_on_its_side(width, height, resolution) -> None:
    upright = bucket_size(width, height, resolution)
    assert bucket_size(height, width, resolution) == upright[::-1]


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((3000, 3000), 1024, (1024, 1024)),
        ((3000, 2000), 1024, (1216, 832)),
        ((1920, 1080), 1024, (1344, 768)),
        ((9000, 1000), 1024, (2048, 512)),
        ((640, 480), 1024, (576, 448)),
        ((100, 100), 1024, (64, 64)),
        ((100, 100), 256, (96, 96)),
        ((64, 4000), 512, (64, 256)),
        ((3000, 2000), 64, (64, 64)),
    ],
)
def test_known_sizes(size, resolution, expected) -> None:
    assert bucket_size(*size, resolution) == expected


def test_a_side_below_one_step_becomes_one_step() -> None:
    assert bucket_size(40, 200, 512) == (64, 192)


@pytest.mark.parametrize(("resolution", "step"), [(512, 48), (512, 16), (32, 64)])
def test_a_step_that_gives_no_size_is_refused(resolution: int, step: int) -> None:
    with pytest.raises(ValueError, match=rf"step is {step} at resolution {resolution}; .*use 32"):
        bucket_size(500, 500, resolution, step)


# --- cuts -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(64, 260),
    height=st.integers(64, 260),
    resolution=st.sampled_from((64, 128, 160)),
)
def test_a_cut_never_enlarges_and_covers_one_axis(width: int, height: int, resolution: int) -> None:
    size = bucket_size(width, height, resolution)
    found = cut(photo(width, height), size)
    assert found.pixels.shape == (size[1], size[0], 3)
    assert found.original_size == (width, height)
    scale = max(size[0] / width, size[1] / height)
    assert scale <= 1
    left_out = [side * scale - wanted for side, wanted in zip((width, height), size, strict=True)]
    assert min(left_out) == pytest.approx(0, abs=1e-9)
    for offset, rest in zip(found.offset, left_out, strict=True):
        assert abs(offset - rest / 2) <= 1
        assert offset >= 0
    assert 0 in found.offset


def test_a_cut_is_where_its_offset_says() -> None:
    """Position is brightness, so the place of the cut can be read from it."""
    ramp = torch.linspace(0, 1, 400).view(1, -1, 1).expand(200, -1, 3)
    found = cut(Photo(ramp, ""), (128, 128))  # resized to 256×128
    assert found.offset == (64, 0)
    expected = ((torch.arange(128) + found.offset[0] + 0.5) * 400 / 256 - 0.5) / 399
    torch.testing.assert_close(found.pixels[..., 0].mean(0), expected, rtol=0, atol=0.01)


# --- crops of a data set ----------------------------------------------------------------------


def config(**data: object) -> TrainConfig:
    return TrainConfig(resolution=128, data=DataConfig(**data))  # type: ignore[arg-type]


def test_without_buckets_all_cuts_are_squares() -> None:
    found = crops([photo(200, 100), photo(70, 90)], config())
    assert [tuple(c.pixels.shape) for _, c in found] == [(128, 128, 3)] * 2


def test_with_buckets_each_photo_has_its_own_size() -> None:
    photos = [photo(400, 200), photo(70, 90), photo(300, 300)]
    found = crops(photos, config(buckets=True))
    assert [tuple(c.pixels.shape[:2]) for _, c in found] == [(96, 160), (64, 64), (128, 128)]
    assert [p is given for (p, _), given in zip(found, photos, strict=True)] == [True] * 3


@settings(deadline=None, max_examples=40)
@given(width=st.integers(64, 260), height=st.integers(64, 260), bucketed=st.booleans())
def test_a_mirrored_cut_lies_where_it_would_in_the_mirrored_photo(
    width: int, height: int, bucketed: bool
) -> None:
    mask = toy.noise(height, width).sigmoid()
    whole = photo(width, height, mask)
    (_, plain), (beside, found) = crops([whole], config(buckets=bucketed, flip=True))
    assert beside is whole
    assert torch.equal(found.pixels, plain.pixels.flip(1))
    assert torch.equal(found.mask, plain.mask.flip(1))
    assert found.original_size == plain.original_size == (width, height)
    cut_width = plain.pixels.shape[1]
    resized, _ = covering((width, height), (cut_width, plain.pixels.shape[0]))
    # What the plain cut leaves out on its right, the mirrored one leaves out on its left.
    assert found.offset == (resized - plain.offset[0] - cut_width, plain.offset[1])
    assert abs(found.offset[0] - plain.offset[0]) <= 1
    again = mirrored(found)
    assert again.offset == plain.offset
    assert torch.equal(again.pixels, plain.pixels)


def test_a_mirrored_cut_needs_no_mask() -> None:
    found = crops([photo(90, 70)], config(flip=True))
    assert [c.mask for _, c in found] == [None, None]


def test_a_mask_outside_of_the_cut_is_named() -> None:
    mask = torch.zeros(100, 400)
    mask[:, :80] = 1
    photos = [photo(100, 100), photo(400, 100, mask)]
    with pytest.raises(DatasetError, match="masks: number 2 marks only what the centred cut"):
        crops(photos, config())
    (_, _), (_, found) = crops(photos, config(buckets=True))
    assert float(found.mask.mean()) == pytest.approx(0.2, abs=0.03)


# --- order ------------------------------------------------------------------------------------

SHAPES = st.lists(st.sampled_from(((4, 8, 8), (4, 8, 16), (4, 16, 8))), min_size=1, max_size=9)
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 9), sizes=SIZES)
def test_every_image_of_one_shape_comes_once_an_epoch(count: int, sizes: list[int]) -> None:
    order, generator = SampleOrder([(4, 8, 8)] * count), torch.Generator().manual_seed(0)
    drawn = [index for size in sizes for index in order.draw(generator, size)]
    assert len(drawn) == sum(sizes)
    for start in range(0, len(drawn), count):
        epoch = drawn[start : start + count]
        assert max(Counter(epoch).values()) == 1
        assert set(epoch) <= set(range(count))


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 9), sizes=SIZES)
def test_one_shape_is_shuffled_by_the_generator_and_nothing_else(count, sizes) -> None:
    """Each epoch is one permutation of the generator, taken when the last one runs short."""
    order, generator = SampleOrder([(4, 8, 8)] * count), torch.Generator().manual_seed(3)
    reference, left = torch.Generator().manual_seed(3), []
    for size in sizes:
        while len(left) < size:
            left += torch.randperm(count, generator=reference).tolist()
        assert order.draw(generator, size) == left[:size]
        left = left[size:]
        assert torch.equal(generator.get_state(), reference.get_state())


@settings(deadline=None, max_examples=100)
@given(shapes=SHAPES, sizes=SIZES)
def test_batches_are_full_and_of_one_shape_and_go_round(shapes, sizes: list[int]) -> None:
    order, generator = SampleOrder(shapes), torch.Generator().manual_seed(0)
    drawn: dict[tuple[int, ...], list[int]] = {}
    for size in sizes:
        batch = order.draw(generator, size)
        assert len(batch) == size
        (shape,) = {shapes[index] for index in batch}
        drawn.setdefault(shape, []).extend(batch)
    for shape, indices in drawn.items():
        count = shapes.count(shape)
        for start in range(0, len(indices), count):
            epoch = indices[start : start + count]
            assert max(Counter(epoch).values()) == 1


@settings(deadline=None, max_examples=100)
@given(shapes=SHAPES, size=st.integers(1, 5), rounds=st.integers(1, 4))
def test_each_sample_is_drawn_equally_often(shapes, size: int, rounds: int) -> None:
    """Exactly, not only in expectation: after as many batches as samples all have had ``size``."""
    order, generator = SampleOrder(shapes), torch.Generator().manual_seed(1)
    drawn: Counter[int] = Counter()
    for _ in range(rounds * len(shapes)):
        drawn.update(order.draw(generator, size))
    assert drawn == {index: rounds * size for index in range(len(shapes))}


def test_epochs_are_shuffled_anew_and_by_the_seed() -> None:
    def epochs(seed: int) -> list[list[int]]:
        shapes = [(4, 8, 8)] * 5 + [(4, 8, 16)] * 3
        order, generator = SampleOrder(shapes), torch.Generator().manual_seed(seed)
        return [[order.draw(generator, 1)[0] for _ in range(8)] for _ in range(3)]

    first = epochs(1)
    assert first == epochs(1) != epochs(2)
    assert len({tuple(epoch) for epoch in first}) == 3
    assert all(sorted(epoch) == list(range(8)) for epoch in first)


@settings(deadline=None, max_examples=60)
@given(shapes=SHAPES, before=SIZES, after=SIZES)
def test_an_order_goes_on_from_its_state(shapes, before: list[int], after: list[int]) -> None:
    order, generator = SampleOrder(shapes), torch.Generator().manual_seed(5)
    for size in before:
        order.draw(generator, size)
    state, place = json.dumps(order.state()), generator.get_state()
    expected = [order.draw(generator, size) for size in after]
    other = SampleOrder(shapes)
    other.draw(torch.Generator().manual_seed(9), 4)
    other.load_state(json.loads(state))
    generator.set_state(place)
    assert [other.draw(generator, size) for size in after] == expected
    assert other.state() == order.state()


def test_a_state_does_not_change_with_later_draws() -> None:
    order, generator = SampleOrder([(4, 8, 8), (4, 8, 16), (4, 8, 8)]), torch.Generator()
    order.draw(generator, 1)
    state = order.state()
    before = json.dumps(state)
    order.draw(generator, 2)
    assert json.dumps(state) == before
    order.load_state(state)
    order.draw(generator, 2)
    assert json.dumps(state) == before


@pytest.mark.parametrize(
    "state",
    [
        {"deck": [], "left": {"0": []}},
        {"deck": [], "left": {"0": [], "1": [], "2": []}},
        {"deck": [2], "left": {"0": [], "1": []}},
        {"deck": [], "left": {"0": [1], "1": []}},
    ],
)
def test_the_state_of_other_photos_is_refused(state) -> None:
    order, generator = SampleOrder([(4, 8, 8), (4, 8, 16), (4, 8, 8)]), torch.Generator()
    order.draw(generator, 1)
    before = order.state()
    with pytest.raises(ValueError, match="other photos than those given"):
        order.load_state(state)
    assert order.state() == before


def test_no_sample_is_no_order() -> None:
    with pytest.raises(ValueError, match="no sample to draw from"):
        SampleOrder([])


@settings(deadline=None, max_examples=60)
@given(shapes=SHAPES, size=st.integers(1, 5), data=st.data())
def test_each_sample_is_drawn_as_often_as_it_repeats(shapes, size: int, data) -> None:
    repeats = data.draw(st.lists(st.integers(1, 6), min_size=len(shapes), max_size=len(shapes)))
    order, generator = SampleOrder(shapes, repeats), torch.Generator().manual_seed(2)
    drawn: Counter[int] = Counter()
    for _ in range(sum(repeats)):
        drawn.update(order.draw(generator, size))
    assert drawn == {index: size * times for index, times in enumerate(repeats)}
    state = json.loads(json.dumps(order.state()))
    SampleOrder(shapes, repeats).load_state(state)


def test_one_of_each_is_drawn_as_ever() -> None:
    shapes = [(4, 8, 8)] * 3 + [(4, 8, 16)] * 2
    orders = SampleOrder(shapes), SampleOrder(shapes, [1] * 5)
    for generator in (torch.Generator().manual_seed(4),):
        start = generator.get_state()
        first = [orders[0].draw(generator, 2) for _ in range(12)]
        generator.set_state(start)
        assert [orders[1].draw(generator, 2) for _ in range(12)] == first


@pytest.mark.parametrize("repeats", [[], [1], [1, 0], [2, 1, 1]])
def test_repeats_that_do_not_fit_are_refused(repeats: list[int]) -> None:
    with pytest.raises(ValueError, match=r"repeats is .* for each of the shapes"):
        SampleOrder([(4, 8, 8)] * 2, repeats)
