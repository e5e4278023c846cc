"""Captions: brackets, the trigger word in front, and tags in changing order."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from typing import Literal

from ..config import checks
from ..config.train import DataConfig

Brackets = Literal["text", "weights"]
BRACKETS: tuple[Brackets, ...] = ("text", "weights")
_BARE = re.compile(r"(?<!\\)[()]")  # no backslash before it; two are ComfyUI's one and a letter


def as_prompt(text: str, brackets: Brackets = "text") -> str:
    """The prompt by which ComfyUI's tokenizer reads a text of a data set as it is meant.

    ``brackets``: with "text" they are letters, as kohya's trainer reads them; those that bear a
    backslash out of habit stay as they are and mean the same. With "weights" the text is a prompt
    already. Raises ConfigError for another word.
    """
    checks.choice("brackets", brackets, BRACKETS)
    return _BARE.sub(lambda found: "\\" + found[0], text) if brackets == "text" else text


def with_trigger(caption: str, trigger: str) -> str:
    """``caption`` with ``trigger`` and a comma before it, unless it holds it as whole words.

    Case does not count, as CLIP reads lower case only. An empty caption becomes the trigger.
    """
    caption, trigger = caption.strip(), trigger.strip()
    words = r"\s+".join(re.escape(word) for word in trigger.split())
    if not trigger or re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def variants(caption: str, data: DataConfig, seed: int, count: int = 8) -> tuple[str, ...]:
    """The texts that ``caption`` may be drawn with: up to ``count`` different orders of its tags.

    The first ``data.keep_tags`` stay in front. Equal caption and seed give equal variants. Only
    the caption itself when ``data.caption_shuffle`` is off or it has no two tags to swap. Raises
    ValueError for a ``count`` below 1. Source: field (kohya's shuffle_caption and keep_tokens).
    """
    if count < 1:
        raise ValueError(f"count is {count}; a caption has at least one variant: use 8.")
    tags = _tags(caption) if data.caption_shuffle else []
    kept, moving = tags[: data.keep_tags], tags[data.keep_tags :]
    possible = math.factorial(len(moving))
    for repeats in Counter(moving).values():
        possible //= math.factorial(repeats)
    if possible == 1:
        return (caption,)
    digest = hashlib.sha256(f"{seed} {caption}".encode()).digest()
    chance = random.Random(int.from_bytes(digest, "big"))
    found: dict[str, None] = {}  # keeps the order of finding
    while len(found) < min(count, possible):
        chance.shuffle(moving)
        found[", ".join(kept + moving)] = None
    return tuple(found)


def _tags(caption: str) -> list[str]:
    """Parts between commas; those in brackets belong together: ``(red hat, old:1.2)`` is one."""
    parts, depth = [""], 0
    for letter in caption:
        if letter == "," and not depth:
            parts.append("")
            continue
        # A lone closing bracket is a smiley, not an end.
        depth = max(0, depth + (letter == "(") - (letter == ")"))
        parts[-1] += letter
    if depth:  # as is a lone opening one, which would hold all tags behind it
        parts = [*parts[:-1], *parts[-1].split(",")]
    return [part.strip() for part in parts if part.strip()]
