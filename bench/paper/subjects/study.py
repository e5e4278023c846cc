"""One subject of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....tools.tiny_sdxl.world.subjects import View


@dataclass(frozen=True)
class Study:
    """What is learnt, how it is asked for, and what it really looks like there."""

    name: str
    photos: Sequence[View]  # with the captions that they are trained on
    prompts: Sequence[str]
    places: Sequence[str] = ()  # of each prompt, where a judge knows the word for it
    thing: str = ""  # what it is, where a judge knows the word
    own: Sequence[View] = ()  # the subject itself for each prompt, never trained on
