"""Captions: the trigger word, and tags in changing order."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.config.checks import ConfigError
from lora2_pack.lora2_core.config.train import DataConfig
from lora2_pack.lora2_core.data.captions import as_prompt, variants, with_trigger

TAG = st.text("abc xyz", min_size=1, max_size=5).filter(lambda tag: tag == tag.strip())
TAGS = st.lists(TAG, min_size=1, max_size=7)


def shuffling(keep_tags: int = 1) -> DataConfig:
    return DataConfig(caption_shuffle=True, keep_tags=keep_tags)


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a cat", "sks", "sks, a cat"),
        ("", "sks", "sks"),
        ("  ", " sks ", "sks"),
        (" a cat ", "", "a cat"),
        ("a cat", "  ", "a cat"),
        ("a photo of sks cat", "sks", "a photo of sks cat"),
        ("a photo of SKS, cat", "sks", "a photo of SKS, cat"),
        ("sks", "sks", "sks"),
        ("a sksy cat", "sks", "sks, a sksy cat"),
        ("a cat_sks", "sks", "sks, a cat_sks"),
        ("(sks:1.2) cat", "sks", "(sks:1.2) cat"),
        ("my  sks\ncat", "sks cat", "my  sks\ncat"),
        ("sks dog, cat", "sks cat", "sks cat, sks dog, cat"),
        ("a.b", "a+b", "a+b, a.b"),
        ("un chat zoë", "Zoë", "un chat zoë"),
    ],
)
def test_the_trigger_is_put_in_front_where_it_is_missing(caption, trigger, expected) -> None:
    assert with_trigger(caption, trigger) == expected


@settings(deadline=None)
@given(caption=st.text(max_size=20), trigger=st.text("sk+.( ", min_size=1, max_size=6))
def test_a_trigger_is_put_once(caption: str, trigger: str) -> None:
    once = with_trigger(caption, trigger)
    assert with_trigger(once, trigger) == once
    assert trigger.strip().lower() in " ".join(once.lower().split()) or len(trigger.split()) > 1


@settings(deadline=None)
@given(tags=TAGS, keep=st.integers(0, 4), seed=st.integers(0, 2**63 - 1), count=st.integers(1, 30))
def test_variants_move_only_the_tags_behind_the_kept(tags, keep, seed, count) -> None:
    caption = ", ".join(tags)
    found = variants(caption, shuffling(keep), seed, count)
    moving = tags[keep:]
    possible = math.factorial(len(moving))
    for repeats in Counter(moving).values():
        possible //= math.factorial(repeats)
    assert len(found) == len(set(found)) == min(count, possible)
    for text in found:
        assert text.split(", ")[:keep] == tags[:keep]
        assert sorted(text.split(", ")) == sorted(tags)
    assert found == variants(caption, shuffling(keep), seed, count)


def test_variants_depend_on_the_seed_and_the_caption() -> None:
    def orders(names: str, seed: int) -> list[list[int]]:
        texts = variants(", ".join(names), shuffling(0), seed)
        return [[names.index(tag) for tag in text.split(", ")] for text in texts]

    assert orders("abcdefg", 0) != orders("abcdefg", 1)
    assert orders("abcdefg", 0) != orders("hijklmn", 0)


def test_known_variants_stay_the_same() -> None:
    """A run that is resumed on another machine must draw the same texts."""
    assert variants("sks, red, sitting, indoors", shuffling(), 0, 3) == (
        "sks, red, sitting, indoors",
        "sks, sitting, red, indoors",
        "sks, red, indoors, sitting",
    )


def test_every_order_of_few_tags_is_found() -> None:
    found = variants("sks,a ,b,c", shuffling(), 7)
    assert set(found) == {
        "sks, " + ", ".join(order) for order in ("abc", "acb", "bac", "bca", "cab", "cba")
    }


@pytest.mark.parametrize(
    "caption",
    ["", "a photo of a cat", "sks, red", "a,, ", "sks, red, red", "sks, (red hat, old:1.2)"],
)
def test_without_tags_to_swap_the_caption_stays_as_it_is(caption: str) -> None:
    assert variants(caption, shuffling(), 0) == (caption,)


def test_without_shuffling_the_caption_stays_as_it_is() -> None:
    assert variants("a , b,c,d", DataConfig(), 0) == ("a , b,c,d",)


def test_brackets_stay_together_and_smileys_are_no_brackets() -> None:
    found = variants("a :), (b, c:1.2), d", shuffling(0), 0)
    assert len(found) == 6
    assert all("(b, c:1.2)" in text and "a :)" in text for text in found)


@pytest.mark.parametrize("caption", [":(, a, b", as_prompt(":(, a, b")])
def test_a_lone_opening_bracket_holds_nothing_together(caption: str) -> None:
    assert len(variants(caption, shuffling(0), 0)) == 6


def test_a_name_with_brackets_stays_together() -> None:
    found = variants(as_prompt("robot (fate, stay night), red"), shuffling(0), 0)
    assert set(found) == {
        r"robot \(fate, stay night\), red",
        r"red, robot \(fate, stay night\)",
    }


def test_no_variant_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="count is 0"):
        variants("a, b", shuffling(), 0, 0)


# --- brackets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("", ""),
        ("a robot (fate)", r"a robot \(fate\)"),
        (r"a robot \(fate\)", r"a robot \(fate\)"),
        (r"a robot \(fate)", r"a robot \(fate\)"),
        ("((very:1.2) red)", r"\(\(very:1.2\) red\)"),
        (":) (", r":\) \("),
        ("ends with \\", "ends with \\"),
        (r"C:\\(x)", r"C:\\(x\)"),
        ("[red] {blue} embedding:cat", "[red] {blue} embedding:cat"),
    ],
)
def test_brackets_of_a_caption_get_their_backslash_once(text: str, prompt: str) -> None:
    assert as_prompt(text) == as_prompt(as_prompt(text)) == prompt
    assert as_prompt(text, "weights") == text


@given(text=st.text("a(\\): ", max_size=12))
def test_a_prompt_is_read_as_the_letters_of_its_text(text: str) -> None:
    """As ComfyUI's tokenizer reads: escaped brackets first, of which none may be left over."""

    def read(prompt: str) -> tuple[str, str]:
        hidden = prompt.replace("\\)", "\0\1").replace("\\(", "\0\2")
        return hidden, hidden.replace("\0\1", ")").replace("\0\2", "(")

    hidden, letters = read(as_prompt(text))
    assert not {"(", ")"} & set(hidden)
    assert letters == read(text)[1]


def test_another_reading_of_brackets_is_refused() -> None:
    with pytest.raises(ConfigError, match="brackets is 'both'; choose one of text, weights"):
        as_prompt("a (b)", "both")  # type: ignore[arg-type]
