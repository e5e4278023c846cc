"""Patterns of strangers: they find what Python's own find, and never take long."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.adapters.targets import PRESETS, find_targets
from lora2_pack.lora2_core.config.patterns import MOST_CHARACTERS, Pattern, PatternError
from lora2_pack.tests.core import toy

SECONDS = 1.0  # of this thread's time, for all names together
NAMES = [
    f"{half}.{n % 12}.1.transformer_blocks.{n % 10}.attn{1 + n % 2}.{layer}"
    for half in ("input_blocks", "middle_block", "output_blocks")
    for n in range(60)
    for layer in ("to_q", "to_out.0", "ff.net.0.proj", "in_layers.2", "conv")
]
LONG = [f"{name}.{n}." + "aab_1." * 30 for n, name in enumerate((NAMES * 3)[:2000])]

_ATOMS = st.sampled_from(
    [
        *(*"abt_q.1-^$", r"\.", r"\d", r"\w", r"\W", "[a-c]", "[^.]", "[12]", r"\b", r"\B"),
        *("attn", "to_", "blocks", "(?:)"),
    ]
)
_SIGNS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{,2}", "{2,}", "{}", "{"]


def _joined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        inner.map(lambda text: f"({text})"),
        st.tuples(inner, st.sampled_from(_SIGNS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


PATTERNS = st.recursive(_ATOMS, _joined, max_leaves=8)


@settings(max_examples=300, deadline=None)
# No empty names: in those, versions of Python differ on \B.
@given(PATTERNS, st.lists(st.text("abt_q.1- é", min_size=1, max_size=8), max_size=10))
def test_what_python_finds_is_found(text: str, names: list[str]) -> None:
    own, python = Pattern(text), re.compile(text)
    for name in (*names, *NAMES[::97]):
        assert own.search(name) == (python.search(name) is not None), name


@pytest.mark.parametrize(
    "text", [*PRESETS.values(), "attn1.*to_q", r"^\d", r"(in|out)put_blocks\.[4-8]\.", "to_[qk]$"]
)
def test_presets_and_usual_patterns_find_the_same(text: str) -> None:
    own, python = Pattern(text), re.compile(text)
    assert [own.search(name) for name in NAMES] == [bool(python.search(name)) for name in NAMES]


def _spent(text: str) -> float:
    """The time that a pattern takes of this thread on 2,000 long names, or until it is refused."""
    start = time.thread_time()
    try:
        with warnings.catch_warnings(action="ignore"):
            pattern = Pattern(text)
        for name in LONG:
            pattern.search(name)
    except PatternError as error:
        assert 20 < len(str(error)) < 400
    return time.thread_time() - start


@settings(max_examples=60, deadline=None)
@given(PATTERNS | st.text(r"ab.\w()[]{},*+?|^$123:=!<>P", max_size=40) | st.text(max_size=600))
def test_no_pattern_takes_long(text: str) -> None:
    assert _spent(text) < SECONDS


@pytest.mark.parametrize(
    "text",
    [
        r"(\w+\.?)+\|", "(a|a)*$b", "(a*)*!", "(.*)*!", r"((((\w*)*)*)*)*!", ".*.*.*.*.*.*!",
        "(a|b)*a(a|b){200}!", r"(\w*?\w*?)*?!", r"(?:\w?){100}\w{100}!", "(?:a?){60000}",
        "(?:(?:a?){60000}){60000}", "(?:(?:(?:){9999}){9999}){9999}", "(?:" * 90 + "a" + ")+" * 90,
        "(" * 240 + ")" * 240, r"(.*)(.*)\1\2!", r"(?=(\w+\.?)+\|)", r"(?i)(\w+\.?)+\|",
        r"\w*" * 160, "(?:a|" * 90 + ")" * 90, r"(?>\w+)+!", r"(?:\w+)++!", "[^a]*" * 90 + "!",
        "a{4294967296}", "x" * (MOST_CHARACTERS + 1), "(\\w*|" * 19 + "a" + ")*" * 19,
    ],
)  # fmt: skip
def test_patterns_that_are_known_to_take_for_ever_do_not(text: str) -> None:
    assert _spent(text) < SECONDS


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (r"(a)\1", r"uses \1, which is not allowed"),
        ("(?=a)b", "uses (?=, which is not allowed"),
        ("(?i)a", "uses (?i, which is not allowed"),
        ("a*+", "uses a + behind a repetition, which is not allowed"),
        ("a{3000}", "grows beyond 2000 states; use smaller numbers"),
        ("a" * 501, "has 501 characters; 500 are allowed: shorten it"),
        ("(" * 21 + ")" * 21, "more than 20 groups in each other; make it simpler"),
        ("a{4294967296}", "is not a regular expression"),
    ],
)
def test_a_refusal_names_what_is_not_allowed(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        find_targets(toy.Transformer(), text)
    assert str(caught.value).startswith(f"targets {text[:500]!r}")
