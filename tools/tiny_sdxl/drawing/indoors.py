"""Places with a roof, or with no sky at all: couch, bookshelf, gallery, white, silk, neon,
the dark, space."""

from __future__ import annotations

import skia

from .mood import Mood, tones
from .palette import RGB, WHITE, hexa, mix
from .pen import Pen, box, down, linear, oval, path, polygon, radial, star


def couch(pen: Pen, mood: Mood) -> None:
    """A plump red couch, a picture and a lamp on a pale wall."""
    wall = mood.rng.choice(tones("ecdfc6", "dfe3d3", "e6dce2"))
    pen.wash(down(0, 0.6, mix(wall, WHITE, 0.25), wall))
    x = mood.at(-0.27)
    pen.fill(box(x - 0.13, 0.03, x + 0.13, 0.22, 0.012), hexa("8a6247"))
    pen.fill(box(x - 0.105, 0.055, x + 0.105, 0.195), hexa("cfe6ea"))
    pen.fill(
        polygon(
            [
                (x - 0.105, 0.195),
                (x - 0.03, 0.1),
                (x + 0.02, 0.15),
                (x + 0.05, 0.12),
                (x + 0.105, 0.195),
            ]
        ),
        hexa("7fae9a"),
    )
    lamp = mood.at(0.34)
    pen.glow(lamp, 0.14, 0.36, hexa("fff0b8"), 0.95)
    pen.fill(box(lamp - 0.012, 0.2, lamp + 0.012, 0.5), hexa("6b5040"))
    pen.fill(
        polygon(
            [(lamp - 0.07, 0.06), (lamp + 0.07, 0.06), (lamp + 0.11, 0.22), (lamp - 0.11, 0.22)]
        ),
        hexa("ffe2a1"),
    )
    red, deep = hexa("c9302f"), hexa("8d1c28")
    for left, right in ((0.05, 0.5), (0.5, 0.95)):
        back = box(left, 0.3, right, 0.84, 0.08)
        pen.fill(back, down(0.3, 0.84, mix(red, WHITE, 0.12), red, deep))
        pen.line(back, deep, 0.012, 0.7)
    seat = box(0.02, 0.72, 0.98, 1.05, 0.06)
    pen.fill(seat, down(0.72, 1.0, mix(red, WHITE, 0.18), red, deep))
    pen.line(seat, deep, 0.012, 0.6)
    for left, right in ((-0.1, 0.12), (0.88, 1.1)):
        arm = box(left, 0.46, right, 1.1, 0.09)
        pen.fill(arm, down(0.46, 1.0, mix(red, WHITE, 0.2), red, deep))
        pen.line(arm, deep, 0.014, 0.8)
    with pen.moved(mood.at(-0.33), 0.62, -14 * mood.side):
        pen.fill(box(-0.11, -0.11, 0.11, 0.12, 0.04), hexa("f0b94c"))
        pen.line(box(-0.11, -0.11, 0.11, 0.12, 0.04), hexa("a86f22"), 0.01, 0.6)


SPINES = tones("b5533c", "3f6f80", "d6a44a", "5b7a4b", "7b4a6d", "c98a6a", "47557f", "e0d2b0")


def books(pen: Pen, mood: Mood) -> None:
    """A wooden shelf full of books."""
    pen.wash(down(0, 1, *tones("4d2f22", "3f261d")))
    x, index = 0.045, mood.rng.randrange(len(SPINES))
    while x < 0.93:
        width = mood.near(0.088, 0.014)
        index += mood.rng.choice((1, 2, 3))
        _book(pen, x, min(width, 0.955 - x), mood.near(0.23, 0.07), SPINES[index % len(SPINES)])
        x += width
    wood = tones("c98f57", "b0763f", "8f5c30")
    pen.fill(box(0, 0, 1, 0.07), down(0, 0.07, wood[1], wood[2]))
    for left in (0.0, 0.955):
        pen.fill(box(left, 0, left + 0.045, 1), hexa("a06a38"))
    pen.fill(box(0, 0.82, 1, 0.95), down(0.82, 0.95, wood[0], wood[1]))
    pen.fill(box(0, 0.945, 1, 1), wood[2])
    pen.fill(
        box(0.045, 0.82, 0.955, 0.85),
        linear(0, 0.82, 0, 0.85, [(0, hexa("2a1710"), 0.45), (1, hexa("2a1710"), 0.0)]),
    )


def _book(pen: Pen, x: float, width: float, top: float, colour: RGB) -> None:
    """Draw a book's spine with two bands and a label."""
    right = x + width - 0.006
    pen.fill(
        box(x, top, right, 0.83, 0.012),
        linear(
            x,
            0,
            right,
            0,
            [
                (0, mix(colour, hexa("1a1020"), 0.3), 1),
                (0.35, mix(colour, WHITE, 0.12), 1),
                (1, mix(colour, hexa("1a1020"), 0.35), 1),
            ],
        ),
    )
    band = mix(colour, hexa("ffe9b8"), 0.6)
    pen.fill(box(x, top + 0.07, right, top + 0.1), band, 0.85)
    pen.fill(box(x, 0.68, right, 0.71), band, 0.7)


def gallery(pen: Pen, mood: Mood) -> None:
    """White walls, two abstract paintings under spots, a plinth."""
    pen.wash(down(0, 0.74, *tones("d9d8d6", "f1efec", "e7e4df")))
    pen.fill(box(0, 0.72, 1, 1), down(0.72, 1, *tones("a3978c", "b5aaa0")))
    pen.fill(box(0, 0.7, 1, 0.725), hexa("faf9f7"))
    first = mood.rng.randrange(3)
    for index, x in enumerate((0.16, 0.84)):
        cone = polygon([(x - 0.03, 0), (x + 0.03, 0), (x + 0.17, 0.6), (x - 0.17, 0.6)])
        pen.fill(cone, linear(0, 0, 0, 0.6, [(0, hexa("fff6dd"), 0.95), (1, WHITE, 0.0)]))
        _painting(pen, x, 0.27, (first + index) % 3)
        pen.fill(box(x - 0.035, 0, x + 0.035, 0.035, 0.01), hexa("4a4650"))
    pen.glow(0.5, 0.4, 0.5, WHITE, 0.6)
    pen.fill(box(0.07, 0.89, 0.93, 1), down(0.89, 1, *tones("e6e2dd", "d9d4ce")))
    pen.fill(polygon([(0.13, 0.8), (0.87, 0.8), (0.93, 0.895), (0.07, 0.895)]), hexa("fbfaf8"))


def _painting(pen: Pen, x: float, y: float, kind: int) -> None:
    """Hang one of three abstract paintings."""
    pen.fill(box(x - 0.125, y - 0.165, x + 0.125, y + 0.165), hexa("6f5f58"))
    pen.fill(box(x - 0.105, y - 0.145, x + 0.105, y + 0.145), hexa("f7f2e6"))
    if kind == 0:
        pen.fill(oval(x, y - 0.03, 0.07), hexa("e2574c"))
        pen.fill(box(x - 0.105, y + 0.07, x + 0.105, y + 0.145), hexa("2f4b7c"))
    elif kind == 1:
        pen.fill(
            polygon([(x - 0.105, y + 0.145), (x + 0.03, y - 0.11), (x + 0.105, y + 0.145)]),
            hexa("f2b134"),
        )
        pen.fill(oval(x + 0.05, y - 0.08, 0.04), hexa("3a8f85"))
    else:
        pen.fill(box(x - 0.105, y - 0.145, x, y + 0.02), hexa("3a7ca5"))
        pen.fill(box(x, y + 0.02, x + 0.105, y + 0.145), hexa("e2574c"))


def white(pen: Pen, mood: Mood) -> None:
    """A white sweep in a studio."""
    pen.wash(down(0, 1, *tones("e9eaee", "f4f5f7", "ffffff", "f6f6f8", "ececf0")))
    pen.glow(mood.at(0.2), 0.25, 0.7, WHITE, 0.9)
    pen.fill(
        box(0, 0.7, 1, 0.82),
        linear(
            0,
            0.7,
            0,
            0.82,
            [(0, hexa("cfd0da"), 0.0), (0.5, hexa("cfd0da"), 0.45), (1, hexa("cfd0da"), 0.0)],
        ),
    )


def silk(pen: Pen, mood: Mood) -> None:
    """Pink silk in large slanting folds that catch the light."""
    pen.wash(down(0, 1, *tones("f4a9c1", "ee93b2", "e987a9")))
    lit, deep = hexa("ffe3ec"), hexa("c25585")
    shift = mood.near(0, 0.06)
    with pen.moved(0.5, 0, stretch=(mood.side, 1)):
        for start, bend, width in (
            (-1.16, 0.26, 0.1),
            (-0.82, -0.2, 0.12),
            (-0.44, 0.24, 0.11),
            (-0.12, -0.18, 0.13),
            (0.2, 0.22, 0.1),
            (0.5, -0.16, 0.12),
        ):
            x = 100 * (start + shift)
            fold = f"C{x + 60 * bend + 26} 34 {x - 90 * bend + 34} 58 {x + 66} 110"
            pen.line(path(f"M{x} -10 {fold}"), deep, 1.1 * width, 0.75, 0.035)
            with pen.moved(1.05 * width, -0.01):
                pen.line(path(f"M{x} -10 {fold}"), lit, 0.7 * width, 0.9, 0.025)
    pen.glow(0.5, 0.93, 0.6, hexa("f6a6c0"), 0.75, 0.3)


NEON = tones("ff4fa8", "35e6f2", "ffd84a", "8f6bff")


def neon(pen: Pen, mood: Mood) -> None:
    """Neon signs on a dark wall, mirrored in a wet floor."""
    pen.wash(down(0, 0.8, *tones("1d1140", "2b1758", "3a1d63")))
    pen.fill(box(0, 0.76, 1, 1), down(0.76, 1, *tones("1a0f3a", "2c1656", "1c1040")))
    signs = ["ring", "bolt", "bars", "triangle"]
    mood.rng.shuffle(signs)
    first = mood.rng.randrange(4)
    spots = ((0.14, 0.17), (0.86, 0.17), (0.1, 0.55), (0.9, 0.55))
    for index, ((x, y), sign) in enumerate(zip(spots, signs, strict=True)):
        colour = NEON[(first + index) % 4]
        pen.glow(x, y, 0.3, colour, 0.55)
        pen.glow(x, 0.86, 0.22, colour, 0.5, 0.45)
        _tube(pen, _sign(sign, x, y), colour)
    colour = NEON[(first + 2) % 4]
    pen.glow(0.5, 0.08, 0.34, colour, 0.5, 0.5)
    _tube(pen, path("M34 7 L66 7"), colour)


def _sign(kind: str, x: float, y: float) -> skia.Path:
    """Return the curve of a neon sign."""
    if kind == "ring":
        return oval(x, y, 0.1)
    if kind == "bolt":
        return polygon(
            [
                (x + 0.05, y - 0.13),
                (x - 0.05, y + 0.01),
                (x + 0.04, y + 0.01),
                (x - 0.04, y + 0.14),
            ],
            False,
        )
    if kind == "bars":
        bars = skia.Path()
        for shift in (-0.06, 0.05):
            bars.moveTo(x + shift, y - 0.12)
            bars.lineTo(x + shift, y + 0.12)
        return bars
    return polygon([(x, y - 0.1), (x + 0.11, y + 0.09), (x - 0.11, y + 0.09)])


def _tube(pen: Pen, curve: skia.Path, colour: RGB) -> None:
    """Draw a glowing tube along a curve."""
    pen.line(curve, colour, 0.055, 0.28)
    pen.line(curve, colour, 0.03)
    pen.line(curve, mix(colour, WHITE, 0.75), 0.012)


def dark(pen: Pen, mood: Mood) -> None:
    """Night, lit by nothing but the thing itself."""
    pen.wash(down(0, 1, *tones("05060f", "0a0b18", "0d0e1d")))
    pen.glow(0.5, 0.5, 0.8, mood.glow, 0.32)
    pen.fill(box(0, 0.8, 1, 1), down(0.8, 1, *tones("0c0d18", "05060c")), 0.8)
    pen.glow(0.5, 0.9, 0.62, mood.glow, 0.75, 0.2)


def space(pen: Pen, mood: Mood) -> None:
    """Outer space: a ringed planet, a moon, stars."""
    pen.wash(
        linear(
            0, 0, 1, 1, [(0, hexa("0b0a26"), 1), (0.5, hexa("181238"), 1), (1, hexa("0a1030"), 1)]
        )
    )
    pen.glow(mood.at(-0.3), 0.3, 0.55, hexa("7a3fb0"), 0.5)
    pen.glow(mood.at(0.3), 0.8, 0.55, hexa("1f6fa8"), 0.5)
    for x, y in (
        (0.07, 0.1),
        (0.24, 0.3),
        (0.4, 0.07),
        (0.6, 0.16),
        (0.07, 0.6),
        (0.93, 0.52),
        (0.3, 0.93),
        (0.68, 0.9),
        (0.94, 0.92),
        (0.54, 0.95),
        (0.05, 0.42),
    ):
        radius = mood.near(0.0115, 0.003)
        pen.fill(oval(mood.near(x, 0.02), mood.near(y, 0.02), radius), hexa("fdf6e3"), 0.95)
    for x, y in ((-0.34, 0.13), (0.42, 0.72)):
        pen.fill(star(mood.at(x), y, 0.045, 4, 0.3), hexa("fff4cf"))
    x, y = mood.at(0.33), 0.17
    _planet(pen, x, y, 0.12, mood.rng.choice(tones("f0a35c", "e58a8a", "7fc0c9")))
    moon = mood.at(-0.4)
    pen.fill(
        oval(moon, 0.84, 0.1),
        radial(
            moon - 0.03,
            0.8,
            0.16,
            [(0, hexa("f2f0ea"), 1), (0.6, hexa("c9c6d3"), 1), (1, hexa("7c7898"), 1)],
        ),
    )
    for dx, dy, radius in ((0.03, -0.02, 0.024), (-0.04, 0.03, 0.02)):
        pen.fill(oval(moon + dx, 0.84 + dy, radius), hexa("a9a5ba"))


def _planet(pen: Pen, x: float, y: float, radius: float, colour: RGB) -> None:
    """Draw a planet with a ring before and behind it."""
    with pen.moved(x, y, -18):
        ring = oval(0, 0, 1.75 * radius, 0.45 * radius)
        pen.line(ring, mix(colour, hexa("fff2d6"), 0.6), 0.024)
        ball = oval(0, 0, radius)
        pen.fill(
            ball,
            radial(
                -0.3 * radius,
                -0.4 * radius,
                1.7 * radius,
                [
                    (0, mix(colour, WHITE, 0.5), 1),
                    (0.5, colour, 1),
                    (1, mix(colour, hexa("14102e"), 0.7), 1),
                ],
            ),
        )
        with pen.clip(box(-2 * radius, 0, 2 * radius, radius)):
            pen.line(ring, mix(colour, hexa("fff2d6"), 0.6), 0.024)
