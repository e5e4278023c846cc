"""What every base can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ....tools.tiny_sdxl.evaluation.parts import Parts
from ..plan import Plan
from ..subjects.study import Study

Scores = dict[str, dict[str, list[float]]]  # judge → measure → by picture


class Base(Protocol):
    """A model that can be personalised, painted with and judged."""

    @property
    def name(self) -> str:
        """In tables."""
        ...

    @property
    def parts(self) -> Parts: ...

    @property
    def weights(self) -> str:
        """A fingerprint."""
        ...

    @property
    def width(self) -> int:
        """Of the narrowest attention."""
        ...

    @property
    def rates(self) -> tuple[float, ...]:
        """That every method is tried at."""
        ...

    @property
    def plan(self) -> Plan:
        """How much is usually trained on it."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of its TrainConfig, the same for all methods."""
        ...

    def paint(self, prompts: Sequence[str], seeds: Sequence[int], lora: Path | None) -> Tensor:
        """A picture of each prompt: (n, 3, height, width), 0 to 1."""
        ...

    def judge(self, study: Study, images: Tensor, prompts: Sequence[int]) -> Scores:
        """What each judge says of each picture; ``prompts`` says which prompt it is of."""
        ...
