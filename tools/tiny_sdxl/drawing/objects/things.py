"""Every object: how it is drawn, how much room it takes, what it may wear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..artist import Artist
from . import creatures, vessels, wares

HATS = ("crown", "party hat", "top hat", "bow", "bloom", "sprout")
TRINKETS = ("bow", "bloom")


@dataclass(frozen=True)
class Thing:
    """An object; `width` and `height` are its extent when its larger one is about 1."""

    draw: Callable[[Artist], None]
    width: float
    height: float
    # Half the width of what touches the ground, and where its middle is.
    foot: float
    foot_at: float = 0.0
    wears: tuple[str, ...] = TRINKETS
    # Whether a face may take the place of the emblem.
    takes_face: bool = True


THINGS: dict[str, Thing] = {
    "mug": Thing(vessels.mug, 0.96, 0.86, 0.34, -0.08),
    "teapot": Thing(vessels.teapot, 1.0, 0.81, 0.24, 0.02, ("bow", "crown", "party hat", "sprout")),
    "backpack": Thing(wares.backpack, 0.86, 1.0, 0.36, 0.0, HATS),
    "clock": Thing(
        wares.clock, 0.88, 1.0, 0.34, 0.0, ("bow", "bloom", "party hat", "crown"), False
    ),
    "sneaker": Thing(wares.sneaker, 1.0, 0.66, 0.5),
    "robot": Thing(wares.robot, 1.0, 1.0, 0.28, 0.0, HATS, False),
    "cat": Thing(creatures.cat, 0.86, 1.0, 0.33, 0.0, HATS, False),
    "dog": Thing(creatures.dog, 0.94, 1.0, 0.34, 0.0, HATS, False),
    "candle": Thing(vessels.candle, 0.8, 1.0, 0.36),
    "can": Thing(vessels.can, 0.54, 1.0, 0.24),
    "bowl": Thing(vessels.bowl, 1.0, 0.62, 0.22),
    "vase": Thing(vessels.vase, 0.6, 1.0, 0.2),
}
OBJECTS = tuple(THINGS)
