"""Backpack, alarm clock, sneaker and robot."""

from __future__ import annotations

import math

from ..artist import INK_WIDTH, Artist
from ..palette import INDIGO, RGB, WHITE, hexa, mix
from ..pen import box, oval, path, polygon

STEEL: RGB = hexa("aeb6c4")
RUBBER: RGB = hexa("f4f1ea")


def backpack(art: Artist) -> None:
    """A school bag with a front pocket."""
    art.rod(path("M-13 -90 C-13 -104 13 -104 13 -90"), 0.045, art.deep)
    for side in (-1, 1):
        strap = (
            path("M30 -66 C46 -60 46 -20 35 -6")
            if side > 0
            else path("M-30 -66 C-46 -60 -46 -20 -35 -6")
        )
        art.rod(strap, 0.06, art.deep)
    body = path(
        "M-36 -8 L-36 -56 C-36 -82 -22 -94 0 -94 C22 -94 36 -82 36 -56 L36 -8 "
        "Q36 0 27 0 L-27 0 Q-36 0 -36 -8 Z"
    )
    art.part(body, clad=True, form="tube")
    art.crease(path("M-27 -50 C-27 -74 -18 -85 0 -85 C18 -85 27 -74 27 -50"), 0.026)
    art.mark(0, -0.63, 0.19)
    pocket = path("M-28 -38 L28 -38 L28 -9 Q28 -4 22 -4 L-22 -4 Q-28 -4 -28 -9 Z")
    # The pattern runs on over the pocket, which hides half of the bag.
    art.part(pocket, form="slab", clad=True, area=(-0.36, -0.94, 0.36, 0.0))
    art.part(path("M-30 -40 L30 -40 L30 -31 Q0 -22 -30 -31 Z"), art.look.main, form="slab")
    art.part(box(-0.045, -0.32, 0.045, -0.21, 0.02), hexa("e8c25a"), form="slab")
    art.wear(0.0, -0.93, 0.36)


def clock(art: Artist) -> None:
    """An alarm clock with two bells; the rim wears the pattern."""
    for side in (-1, 1):
        foot = (
            path("M16 -12 L28 2 L36 2 L30 -16 Z")
            if side > 0
            else path("M-16 -12 L-28 2 L-36 2 L-30 -16 Z")
        )
        art.part(foot, art.deep, form="slab")
    art.rod(path("M-11 -92 C-11 -104 11 -104 11 -92"), 0.035, STEEL)
    for side in (-1, 1):
        with art.moved(0.27 * side, -0.83, 36 * side):
            art.part(path("M-19 7 C-19 -17 19 -17 19 7 Z"))
            art.part(box(-0.02, 0.05, 0.02, 0.13), STEEL, form="slab")
    rim = oval(0, -0.43, 0.43)
    art.part(rim, clad=True)
    art.glint(0.27 * art.side, -0.7, 0.05, 0.1, 45 * art.side)
    face = oval(0, -0.43, 0.27)
    art.part(face, hexa("fbf7ec"), form="slab")
    for hour in range(0, 12, 3):
        x, y = math.sin(hour * math.pi / 6), -math.cos(hour * math.pi / 6)
        art.fill(oval(0.215 * x, -0.43 + 0.215 * y, 0.024), hexa("3a3350"))
    art.mark(0, -0.43, 0.17)
    minute = art.rng.choice((0, 10, 15, 20, 40, 50))
    hour = art.rng.choice((1, 2, 4, 8, 10))
    _hand(art, (hour + minute / 60) * 30, 0.13, 0.04, hexa("3a3350"))
    _hand(art, minute * 6, 0.195, 0.03, hexa("3a3350"))
    art.fill(oval(0, -0.43, 0.034), hexa("d8433b"))
    art.wear(0, -0.885, 0.3)


def _hand(art: Artist, angle: float, length: float, width: float, colour: RGB) -> None:
    """Draw a hand of the clock, at degrees clockwise from noon."""
    x, y = math.sin(math.radians(angle)), -math.cos(math.radians(angle))
    art.line(polygon([(0, -0.43), (length * x, -0.43 + length * y)], False), colour, width)


def sneaker(art: Artist) -> None:
    """A high trainer with a thick white sole, its toe to the right."""
    tongue = path("M-16 -52 C-12 -68 2 -70 8 -60 L14 -44 L-6 -36 Z")
    art.part(tongue, art.light, form="slab")
    upper = path(
        "M-47 -10 L-48 -54 Q-48 -61 -40 -61 Q-28 -55 -17 -60 Q-9 -62 -6 -55 "
        "C4 -40 14 -33 30 -29 C44 -25 50 -20 49 -10 Z"
    )
    art.part(upper, clad=True, form="slab")
    toe = path("M29 -10 C28 -20 32 -28 37 -27 C46 -24 51 -18 49 -10 Z")
    art.part(toe, RUBBER, form="ball")
    art.part(path("M-47 -10 L-48 -38 C-38 -36 -31 -26 -30 -10 Z"), art.deep, form="slab")
    for x, y in ((-3, -53), (5, -43), (14, -35.5)):
        art.line(path(f"M{x} {y} L{x - 13} {y + 8}"), art.ink_of(RUBBER), 0.062)
        art.line(path(f"M{x} {y} L{x - 13} {y + 8}"), RUBBER, 0.04)
    sole = path("M-49 -13 L50 -13 C53 -6 50 1 43 1 L-43 1 C-51 1 -52 -6 -49 -13 Z")
    art.part(sole, RUBBER, form="slab")
    art.line(path("M-48 -4.5 L49 -4.5"), art.look.main, 0.032)
    art.mark(-0.14, -0.275, 0.155)
    art.glint(0.22, -0.265, 0.075, 0.018, 16)
    art.wear(-0.34, -0.585, 0.24)


def robot(art: Artist) -> None:
    """A toy robot with round eyes, an antenna and a lamp in its chest."""
    wave = art.rng.choice((-1, 1))
    for side in (-1, 1):
        hand = (46, -58) if side == wave else (45, -22)
        arm = path(f"M{24 * side} -42 Q{42 * side} -42 {hand[0] * side} {hand[1]}")
        art.rod(arm, 0.085, mix(STEEL, INDIGO, 0.12))
        art.part(oval(hand[0] / 100 * side, hand[1] / 100, 0.07), form="ball")
        leg = box(0.09 * side - 0.06 + 0.05 * side, -0.2, 0.09 * side + 0.06 + 0.05 * side, -0.04)
        art.part(leg, mix(STEEL, INDIGO, 0.12), form="tube")
        foot = (
            path("M4 0 C4 -12 27 -12 28 0 Z") if side > 0 else path("M-4 0 C-4 -12 -27 -12 -28 0 Z")
        )
        art.part(foot, form="ball")
    art.line(path("M0 -88 L0 -95"), art.ink, 0.03)
    art.part(oval(0, -0.955, 0.042), hexa("f2c14b"))
    art.part(box(-0.1, -0.6, 0.1, -0.48), STEEL, form="tube")
    torso = box(-0.285, -0.535, 0.285, -0.15, 0.08)
    art.part(torso, clad=True, form="tube")
    if art.look.decor is None:
        art.part(oval(0, -0.34, 0.085), hexa("ffe9a8"), form="ball")
    for side in (-1, 1):
        art.part(box(0.29 * side - 0.04, -0.79, 0.29 * side + 0.04, -0.67, 0.03), STEEL, "slab")
    head = box(-0.27, -0.89, 0.27, -0.58, 0.1)
    art.part(head, form="slab", clad=True, area=(-0.285, -0.96, 0.285, -0.51))
    visor = box(-0.21, -0.84, 0.21, -0.645, 0.08)
    art.part(visor, hexa("26304a"), form="slab")
    for x in (-0.1, 0.1):
        art.fill(oval(x + 0.02 * art.look.yaw, -0.755, 0.056), hexa("7ff2f0"))
        art.fill(oval(x + 0.02 * art.look.yaw - 0.016, -0.772, 0.02), WHITE)
    art.line(path("M-6 -69 Q0 -66 6 -69"), hexa("7ff2f0"), INK_WIDTH * 1.4)
    art.mark(0, -0.345, 0.17)
    art.wear(0, -0.885, 0.42)
