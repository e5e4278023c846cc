"""Table A1 of the paper: ten prompts for each of the 30 DreamBooth subjects."""

from __future__ import annotations

import json
import re
from pathlib import Path

PROMPTS: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "prompts.json").read_text("utf-8")
)
TUNING = "vase"  # the subject that the paper chose its settings on, and did not test
_CLASS = re.compile(r"<c> (stuffed animal|\w+)")


def class_of(subject: str) -> str:
    """The word for what a subject is: "stuffed animal" for the bear plushie."""
    found = _CLASS.search(PROMPTS[subject][0])
    assert found is not None, "every prompt names the class"
    return found[1]


def prompts_of(subject: str, word: str) -> list[str]:
    """The prompts of a subject that goes by a rare word."""
    return [prompt.replace("<c>", word) for prompt in PROMPTS[subject]]
