"""The paper's prompts: table A1, ten for each of the 30 DreamBooth subjects, and its figures'."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

PROMPTS: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "prompts.json").read_text("utf-8")
)
# Figures A6 to A9: scenes that ask for more, of two subjects.
COMPLEX: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "complex.json").read_text("utf-8")
)
# Figures 3, 4, A4 and A5: a subject, and words of the prompts that are shown.
FIGURES: dict[str, tuple[str, ...]] = {
    "clock": ("kitchen counter", "pink silk", "mossy rock", "city skyline", "in the snow"),
    "backpack_dog": ("cobblestone", "glass table", "mountains and mist", "crystal clear", "neon"),
    "can": ("mossy rock", "mountains and mist", "pink silk", "in the snow", "sandy beach"),
    "teapot": ("minimalistic", "in the dark", "crystal clear", "antique table", "glass table"),
}
TUNING = "vase"  # the subject that the paper chose its settings on, and did not test
_CLASS = re.compile(r"<c> (stuffed animal|\w+)")


def class_of(subject: str) -> str:
    """The word for what a subject is: "stuffed animal" for the bear plushie."""
    found = _CLASS.search(PROMPTS[subject][0])
    assert found is not None, "every prompt names the class"
    return found[1]


def prompts_of(subject: str, word: str, among: Mapping[str, Sequence[str]] = PROMPTS) -> list[str]:
    """The prompts of a subject that goes by a rare word."""
    return [prompt.replace("<c>", word) for prompt in among[subject]]


def shown(subject: str, prompts: Sequence[str], many: int = 5) -> list[int]:
    """Which prompts of a subject a figure shows: the paper's, or some from all over the list."""
    if subject in FIGURES:
        return [
            place
            for words in FIGURES[subject]
            for place, prompt in enumerate(prompts)
            if words in prompt
        ]
    return list(range(0, len(prompts), max(1, len(prompts) // many)))[:many]
