"""What a place is drawn with: its accidents, its light and how a thing stands in it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from .palette import INDIGO, RGB, WHITE, hexa
from .pen import Pen


@dataclass
class Mood:
    """One occasion of a place. `side` is where its light and its landmark are, -1 left, 1 right."""

    seed: int
    side: float
    # The colour of what stands there, for places lit by it.
    glow: RGB
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def near(self, value: float, spread: float) -> float:
        """Return about this value."""
        return value + self.rng.uniform(-spread, spread)

    def at(self, distance: float) -> float:
        """Return the x at a distance from the middle, on the side of the landmark."""
        return 0.5 + self.side * distance


@dataclass(frozen=True)
class Light:
    """How a place lights a thing: a key light from its side, shade, coloured edges, a shadow."""

    key: RGB = WHITE
    key_strength: float = 0.12
    shade: RGB = INDIGO
    shade_strength: float = 0.14
    # Coloured light that grazes the left and the right edge.
    edges: tuple[RGB, RGB] | None = None
    edge_strength: float = 0.35
    shadow: RGB = INDIGO
    shadow_strength: float = 0.42


Draw = Callable[[Pen, Mood], None]


@dataclass(frozen=True)
class Place:
    """A place: what lies behind and before a thing in it, and where the thing goes."""

    phrases: tuple[str, ...]
    back: Draw
    light: Light
    front: Draw | None = None
    # Where the thing stands, as a share of the height; None: it floats about the middle.
    ground: float | None = 0.88
    # The largest extent of the thing, so that the place stays in view beside it.
    most: float = 0.73
    # How far a thing may lean, in degrees.
    lean: float = 5.0
    # How far the thing moves away from the place's landmark.
    aside: float = 0.0
    # Words before the thing that belong to the place: "glowing".
    adjectives: tuple[str, ...] = ("",)
    # Whether the thing lights up its surroundings.
    halo: bool = False


def tones(*codes: str) -> tuple[RGB, ...]:
    """Return colours by their codes."""
    return tuple(hexa(code) for code in codes)
