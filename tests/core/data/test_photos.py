"""Photos, captions and masks: what is refused, and what is cropped how."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.data.cropping import crop
from lora2_pack.lora2_core.data.photos import DatasetError, Photo, check_photos
from lora2_pack.lora2_core.data.samples import Sample, Text, merge_tokens
from lora2_pack.tests.core import toy

torch.set_num_threads(1)

PROMPT = "a photo of sks cat"


def images(count: int, height: int = 64, width: int = 80, channels: int = 3) -> torch.Tensor:
    return toy.noise(count, height, width, channels).sigmoid()


def spoiled(value: float) -> torch.Tensor:
    batch = images(3)
    batch[1, 5, 7, 0] = value
    return batch


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "captions", "prompt", "text"),
    [
        ([], None, PROMPT, "images is empty"),
        ([images(0)], None, PROMPT, "images is empty"),
        ([images(1), spoiled(np.nan)], None, PROMPT, "images: number 3 .*not numbers"),
        ([spoiled(np.inf)], None, PROMPT, "images: number 2 .*not numbers"),
        ([images(2), images(1, 63, 900)], None, PROMPT, "number 3 is 900×63 px.*at least 64"),
        ([images(1, 900, 63)], None, PROMPT, "number 1 is 63×900 px.*larger photo"),
        ([images(3)], ["a", "b"], PROMPT, "captions has 2 entries for 3 images"),
        ([images(1)], ["a", "b"], PROMPT, "captions has 2 entries for 1 images"),
        ([images(2)], None, "  ", "instance_prompt is empty"),
        ([images(2)], ["a", " "], "", "instance_prompt is empty"),
        ([images(2)], [""], "\n", "instance_prompt is empty"),
        ([images(1)[0]], None, PROMPT, r"images holds \(64, 80, 3\)"),
        ([images(1, channels=1)], None, PROMPT, r"images holds \(1, 64, 80, 1\)"),
        (["cat.png"], None, PROMPT, "images holds str"),
    ],
)
def test_bad_photos_and_captions_are_named(batches, captions, prompt, text) -> None:
    with pytest.raises(DatasetError, match=text) as caught:
        check_photos(batches, captions, prompt)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_the_smallest_photo_is_taken() -> None:
    (photo,) = check_photos([images(1, 64, 64)], None, PROMPT)
    assert photo.pixels.shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (None, [PROMPT] * 3),
        ([], [PROMPT] * 3),
        (["one"], ["one"] * 3),
        (["a", " b\n", "c"], ["a", "b", "c"]),
        (["a", "", "c"], ["a", PROMPT, "c"]),
    ],
)
def test_captions_find_their_photos(captions, expected) -> None:
    photos = check_photos([images(2), images(1, 90, 70)], captions, f" {PROMPT} ")
    assert [photo.caption for photo in photos] == expected
    assert [tuple(photo.pixels.shape) for photo in photos] == [(64, 80, 3)] * 2 + [(90, 70, 3)]


def test_a_missing_caption_takes_the_prompt() -> None:
    photos = check_photos([images(2)], [None, "b"], PROMPT)  # type: ignore[list-item]
    assert [photo.caption for photo in photos] == [PROMPT, "b"]


def test_pixels_come_out_as_three_channels_between_zero_and_one() -> None:
    batch = images(1, channels=4).half()
    batch[0, 0, 0, 0], batch[0, 0, 1, 1] = -0.5, 1.5
    (photo,) = check_photos([batch], None, PROMPT)
    assert photo.pixels.dtype == torch.float32
    expected = batch[0, ..., :3].float()
    expected[0, 0, 0], expected[0, 1, 1] = 0, 1
    assert torch.equal(photo.pixels, expected)


# --- trigger ----------------------------------------------------------------------------------


def test_the_trigger_comes_before_captions_and_the_prompt() -> None:
    captions = ["a cat", "", "sks asleep"]
    photos = check_photos([images(3)], captions, "a photo", trigger="sks")
    assert [photo.caption for photo in photos] == ["sks, a cat", "sks, a photo", "sks asleep"]


def test_a_trigger_is_caption_enough() -> None:
    photos = check_photos([images(2)], ["", "a cat"], " ", trigger=" sks ")
    assert [photo.caption for photo in photos] == ["sks", "sks, a cat"]


@pytest.mark.parametrize(
    ("captions", "prompt", "trigger", "expected"),
    [
        (["a robot (fate)"], "x", "", r"a robot \(fate\)"),
        ([r"a robot \(fate\)"], "x", "", r"a robot \(fate\)"),
        ([""], "a (red) robot", "", r"a \(red\) robot"),
        (["a hat"], "x", "robot (fate)", r"robot \(fate\), a hat"),
        ([r"a robot \(fate\)"], "x", "robot (fate)", r"a robot \(fate\)"),
        (["a robot (fate)"], "x", r"robot \(fate\)", r"a robot \(fate\)"),
    ],
)
def test_brackets_are_letters(captions, prompt: str, trigger: str, expected: str) -> None:
    (photo,) = check_photos([images(1)], captions, prompt, trigger=trigger)
    assert photo.caption == expected


def test_brackets_may_be_weights() -> None:
    (photo,) = check_photos([images(1)], ["(a:1.2) b"], "x", trigger="(c)", brackets="weights")
    assert photo.caption == "(c), (a:1.2) b"


# --- repeats ----------------------------------------------------------------------------------


def test_what_is_the_same_memory_is_one_photo() -> None:
    """As a folder's node gives it: the same tensors again."""
    first, second, masks = images(1), images(1, 70, 70), mask_of(0.5)
    batches = [first, first, second, first]
    found = check_photos(
        batches, ["a", "a", "b", "a"], PROMPT, [masks] * 2 + [masks[:, :, :64], masks]
    )
    assert [(photo.caption, photo.repeats) for photo in found] == [("a", 3), ("b", 1)]
    assert torch.equal(found[0].pixels, first[0]) and torch.equal(found[0].mask, masks[0])


@pytest.mark.parametrize("kind", ["copies", "captions", "masks"])
def test_what_differs_stays_apart(kind: str) -> None:
    first = images(1)
    batches = [first, first.clone() if kind == "copies" else first]
    captions = ["a", "b"] if kind == "captions" else ["a"]
    masks = [mask_of(0.5), mask_of(0.5)] if kind == "masks" else None
    assert [p.repeats for p in check_photos(batches, captions, PROMPT, masks)] == [1, 1]


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True, 1_000_001])
def test_a_photo_repeats_a_whole_number_of_times(repeats) -> None:
    with pytest.raises(ValueError, match=r"repeats is .* from 1 to 1000000: use 1"):
        Photo(torch.zeros(64, 64, 3), "", None, repeats)


# --- masks ------------------------------------------------------------------------------------


def mask_of(*values: float, height: int = 64, width: int = 80) -> torch.Tensor:
    """One mask a value: its left half holds the value, its right half 1."""
    masks = torch.ones(len(values), height, width)
    for mask, value in zip(masks, values, strict=True):
        mask[:, : width // 2] = value
    return masks


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ([mask_of(0.5, 0.5)], "masks has 2 entries for 3 images"),
        ([mask_of(0.5, 0.5, 0.5, 0.5)], "masks has 4 entries for 3 images"),
        ([torch.ones(3, 1, 64, 80)], r"masks holds \(3, 1, 64, 80\).*connect a MASK"),
        (["mask.png"], "masks holds str"),
        ([mask_of(0.5, np.nan, 0.5)], "masks: number 2 .*not numbers"),
        ([mask_of(0.5), mask_of(0.5), mask_of(-np.inf)], "masks: number 3 .*not numbers"),
        ([mask_of(0.5, 0.5), torch.zeros(1, 64, 64)], "number 3 is 0 everywhere.*disconnect"),
        ([-mask_of(0.5, 0.5, 0.5)], "masks: number 1 is 0 everywhere"),
        ([mask_of(0.5, height=80, width=64)], "number 1 is 64×80 px .* image is 80×64 px.*2 %"),
        ([torch.ones(64, 82)], "number 1 is 82×64 px"),
    ],
)
def test_bad_masks_are_named(masks, text: str) -> None:
    with pytest.raises(DatasetError, match=text) as caught:
        check_photos([images(3)], None, PROMPT, masks)
    assert str(caught.value).endswith(".")


def test_masks_find_their_photos() -> None:
    batches = [mask_of(0.25, 0.5), mask_of(0.75)[0]]
    photos = check_photos([images(3)], None, PROMPT, batches)
    assert [float(photo.mask[0, 0]) for photo in photos] == [0.25, 0.5, 0.75]
    assert all(photo.mask.shape == (64, 80) for photo in photos)


def test_one_mask_serves_all_photos_of_its_aspect() -> None:
    photos = check_photos([images(2), images(1, 128, 160)], None, PROMPT, [mask_of(0.5)])
    assert [tuple(photo.mask.shape) for photo in photos] == [(64, 80)] * 2 + [(128, 160)]
    assert torch.equal(photos[2].mask[:, :70], torch.full((128, 70), 0.5))
    assert torch.equal(photos[2].mask[:, 90:], torch.ones(128, 70))


@pytest.mark.parametrize("masks", [None, [], [torch.ones(64, 80)], [torch.full((64, 80), 2.0)]])
def test_where_all_is_learnt_there_is_no_mask(masks) -> None:
    photos = check_photos([images(2), images(1)], None, PROMPT, masks)
    assert [photo.mask for photo in photos] == [None] * 3


def test_masks_come_out_between_zero_and_one() -> None:
    (photo,) = check_photos([images(1)], None, PROMPT, [mask_of(-3).half() * 5])
    assert torch.equal(photo.mask, mask_of(0)[0])
    assert photo.mask.dtype == torch.float32


def test_alpha_is_the_mask_unless_one_is_given() -> None:
    batch = images(2, channels=4)
    batch[0, ..., 3], batch[1, ..., 3] = mask_of(0.25)[0], 1
    half, opaque = check_photos([batch], None, PROMPT)
    assert torch.equal(half.mask, mask_of(0.25)[0])
    assert opaque.mask is None
    given = check_photos([batch], None, PROMPT, [mask_of(0.5)])
    assert all(torch.equal(photo.mask, mask_of(0.5)[0]) for photo in given)


def test_an_image_without_anything_opaque_is_refused() -> None:
    batch = images(2, channels=4)
    batch[1, ..., 3] = 0
    with pytest.raises(DatasetError, match="masks: number 2 is 0 everywhere"):
        check_photos([batch], None, PROMPT)


@settings(deadline=None, max_examples=30)
@given(height=st.integers(64, 200), width=st.integers(64, 200))
def test_a_mask_is_cut_like_its_photo(height: int, width: int) -> None:
    """A photo that is its own mask: they stay the same through resizing, but for the filter."""
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    mask = (rows + columns) / 2
    cut = crop(Photo(mask[..., None].expand(-1, -1, 3), "", mask), 96)
    assert cut.mask.shape == (96, 96)
    torch.testing.assert_close(cut.mask, cut.pixels[..., 0], rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", [(80, 64), (1, 64, 80), (64, 80, 1)])
def test_a_photo_takes_no_mask_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(DatasetError, match=r"mask has shape .* beside pixels of \(64, 80, 3\)"):
        Photo(torch.zeros(64, 80, 3), "", torch.ones(shape))


# --- samples ----------------------------------------------------------------------------------


def test_a_sample_has_a_text_and_a_mask_of_its_latents_size() -> None:
    latent, sizes = torch.zeros(4, 8, 12), torch.zeros(1536)
    assert Sample(latent, sizes, ("",), torch.ones(1, 8, 12)).captions == ("",)
    with pytest.raises(DatasetError, match="captions is empty"):
        Sample(latent, sizes, ())
    for shape in ((8, 12), (1, 12, 8), (4, 8, 12)):
        with pytest.raises(
            DatasetError, match=r"mask has shape .* beside a latent of \(4, 8, 12\)"
        ):
            Sample(latent, sizes, ("",), torch.ones(shape))


# --- texts ------------------------------------------------------------------------------------


def test_short_texts_are_repeated_to_the_length_of_long_ones() -> None:
    texts = [Text(toy.noise(tokens, 5), toy.noise(3)) for tokens in (2, 3, 6)]
    contexts, pooled = merge_tokens(texts)
    assert contexts.shape == (3, 6, 5)
    assert torch.equal(contexts[0], torch.cat([texts[0].context] * 3))
    assert torch.equal(contexts[1], torch.cat([texts[1].context] * 2))
    assert torch.equal(contexts[2], texts[2].context)
    assert torch.equal(pooled, torch.stack([text.pooled for text in texts]))


def test_texts_of_one_length_stay_as_they_are() -> None:
    texts = [Text(toy.noise(4, 5), toy.noise(3)) for _ in range(2)]
    assert torch.equal(merge_tokens(texts)[0], torch.stack([t.context for t in texts]))


# --- crops ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(64, 300),
    width=st.integers(64, 300),
    resolution=st.sampled_from((64, 96, 128, 256)),
)
def test_a_crop_is_the_centre_at_the_resolution(height: int, width: int, resolution: int) -> None:
    cut = crop(Photo(torch.zeros(height, width, 3), ""), resolution)
    assert cut.pixels.shape == (resolution, resolution, 3)
    assert cut.pixels.dtype == torch.float32
    assert cut.original_size == (width, height)
    short = min(height, width)
    for offset, side in zip(cut.offset, (width, height), strict=True):
        # The resized photo is side·resolution/short px long, to the pixel.
        assert abs(offset - (side * resolution / short - resolution) / 2) <= 1
        assert offset == 0 if side == short else offset >= 0


@pytest.mark.parametrize(("height", "width", "axis"), [(96, 288, 1), (288, 96, 0)])
def test_a_crop_keeps_the_aspect_and_the_place(height: int, width: int, axis: int) -> None:
    """A photo whose brightness is its position: what is where can be read from the crop."""
    ramp = torch.linspace(0, 1, 288)
    pixels = ramp.view(-1, 1, 1) if axis == 0 else ramp.view(1, -1, 1)
    cut = crop(Photo(pixels.expand(height, width, 3), ""), 64)
    line = cut.pixels[..., 0].mean(1 - axis)
    expected = ((torch.arange(64) + 64.5) * 1.5 - 0.5) / 287  # centres of 64 of 192 pixels
    torch.testing.assert_close(line, expected, rtol=0, atol=0.01)
    assert cut.offset == ((64, 0) if axis == 1 else (0, 64))


def test_a_crop_of_the_right_size_is_the_photo() -> None:
    pixels = (images(1, 64, 64)[0] * 255).round() / 255
    cut = crop(Photo(pixels, ""), 64)
    torch.testing.assert_close(cut.pixels, pixels, rtol=0, atol=1e-6)
    assert cut.offset == (0, 0)
