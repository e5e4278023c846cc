"""How much is trained and painted, the same for every method."""

from __future__ import annotations

from dataclasses import dataclass

RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # each method is tried at all of them on the tuning subject


@dataclass(frozen=True)
class Plan:
    """Equal for all methods of a run."""

    steps: int = 300
    batch: int = 1  # the paper's
    prompts: int = 10  # the paper's
    pictures: int = 3  # of each prompt, from noise of their own; the paper paints 5

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "prompts", "pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed.")


QUICK = Plan(steps=150, prompts=6, pictures=2)
