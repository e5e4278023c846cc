"""What one LoRA of a benchmark is to learn."""

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
    things: Sequence[str] = ()  # of each prompt: what it asks for, where a judge knows the word
    own: Sequence[View] = ()  # the subject itself for each prompt, never trained on
    members: Sequence[Sequence[View]] = ()  # the photos by subject, where several share a LoRA
    asked: Sequence[int] = ()  # of each prompt: which of the members it asks for

    @property
    def subjects(self) -> Sequence[Sequence[View]]:
        """The photos of each subject."""
        return self.members or (self.photos,)

    def subject_of(self, prompt: int) -> int:
        """Which of ``subjects`` a prompt asks for."""
        return self.asked[prompt] if self.asked else 0
