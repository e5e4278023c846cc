"""Captions: the trigger word in front, and tags in changing order."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter

from ..config.train import DataConfig


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
    return [part.strip() for part in parts if part.strip()]
