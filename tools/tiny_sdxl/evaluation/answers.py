"""What judges say of pictures of scenes: shares of right answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from ....lora2_core.tiny_sdxl.judge_networks import ANSWERS
from ....lora2_core.tiny_sdxl.judges import Judge
from ....lora2_core.tiny_sdxl.model import SIZE
from ..pictures import to_pixels
from ..world.scenes import Scene, render
from .parts import Parts

T = TypeVar("T")

AT_ONCE = 48  # pictures in memory


def answers(parts: Parts, scenes: Sequence[Scene]) -> dict[str, dict[str, dict[str, float]]]:
    """Return each judge's share of right answers to each question, before and after the VAE."""
    before, after = Tally(parts.judges), Tally(parts.judges)
    for some in portions(scenes):
        images = pictures(some)
        before.add(some, images)
        after.add(some, parts.through_vae(images))
    return {"drawn": before.shares(), "reconstructed": after.shares()}


class Tally:
    """Right answers of judges, counted over pictures that come in portions."""

    def __init__(self, judges: Mapping[str, Judge]):
        self.judges = judges
        self.count = 0
        self.right = {name: dict.fromkeys(ANSWERS, 0) for name in judges}

    def add(self, scenes: Sequence[Scene], images: Tensor) -> None:
        """Let all judges read pictures (n, 3, h, w) that should show these scenes."""
        self.count += len(scenes)
        for name, judge in self.judges.items():
            reading = judge.read(images)
            for question in ANSWERS:
                for scene, word in zip(scenes, getattr(reading, question), strict=True):
                    self.right[name][question] += getattr(scene, question) == word

    def shares(self) -> dict[str, dict[str, float]]:
        """Return the share of right answers, by judge and question."""
        return {
            name: {question: number / self.count for question, number in right.items()}
            for name, right in self.right.items()
        }


def pictures(scenes: Iterable[Scene]) -> Tensor:
    """Return scenes as they are drawn, (n, 3, 192, 192) in 0 to 1."""
    return to_pixels(render(scene, SIZE) for scene in scenes)


def portions(items: Sequence[T]) -> Iterable[Sequence[T]]:
    """Return a sequence in parts that fit into memory as pictures."""
    return (items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE))
