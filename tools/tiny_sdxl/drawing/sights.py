"""Places people go to: city park, skyline, Eiffel Tower, clear water."""

from __future__ import annotations

from .mood import Mood, tones
from .outdoors import PETALS, _flower, cloud
from .palette import RGB, WHITE, hexa, mix
from .pen import Pen, box, down, linear, oval, path, polygon


def park(pen: Pen, mood: Mood) -> None:
    """A lawn, round trees, a lamp, and houses far off."""
    pen.wash(down(0, 0.5, *tones("79c3f2", "bfe4f8", "eef8f2")))
    cloud(pen, mood.near(0.5, 0.1), 0.15, 0.34, WHITE, 0.9)
    for x, top, width in ((0.3, 0.26, 0.1), (0.42, 0.2, 0.1), (0.56, 0.28, 0.12)):
        pen.fill(box(x, top, x + width, 0.6), hexa("b7c3de"))
    for x, y, radius, code in (
        (0.06, 0.33, 0.2, "58a84c"),
        (0.93, 0.3, 0.21, "4d9d4a"),
        (0.28, 0.48, 0.12, "74bb57"),
        (0.74, 0.47, 0.13, "6ab453"),
    ):
        _tree(pen, x, mood.near(y, 0.015), radius, hexa(code))
    pen.fill(box(0, 0.56, 1, 1), down(0.56, 1, *tones("9ad465", "7cc255", "5aa848")))
    pen.fill(path("M36 56 L48 56 Q60 74 86 100 L24 100 Q44 74 36 56 Z"), hexa("ecdcb4"), 0.75)
    _bed(pen, mood, ((0.07, 0.64), (0.22, 0.61), (0.78, 0.61), (0.93, 0.64)), 0.06)


def _tree(pen: Pen, x: float, y: float, radius: float, colour: RGB) -> None:
    """Draw a tree with a round crown."""
    pen.fill(box(x - 0.13 * radius, y, x + 0.13 * radius, y + 2 * radius), hexa("7a5a45"))
    pen.fill(oval(x, y, radius), colour)
    pen.fill(oval(x - 0.3 * radius, y - 0.32 * radius, 0.5 * radius), mix(colour, WHITE, 0.25), 0.6)


def _bed(pen: Pen, mood: Mood, places: tuple[tuple[float, float], ...], radius: float) -> None:
    """Plant flowers on stems."""
    start = mood.rng.randrange(len(PETALS))
    for index, (x, y) in enumerate(places):
        x = mood.near(x, 0.015)
        petal = PETALS[(start + index) % len(PETALS)]
        pen.line(polygon([(x, y), (x, y + 0.13)], False), hexa("3b8a3f"), 0.018)
        pen.fill(oval(x + 0.035, y + 0.1, 0.036, 0.017), hexa("3b8a3f"))
        eye = hexa("f7a531") if petal == PETALS[2] else hexa("fff2b8")
        _flower(pen, x, y, radius, petal, eye)


def park_flowers(pen: Pen, mood: Mood) -> None:
    """Flowers before the thing, along the lower edge."""
    _bed(
        pen,
        mood,
        ((0.06, 0.84), (0.15, 0.94), (0.31, 0.97), (0.69, 0.97), (0.85, 0.94), (0.94, 0.84)),
        0.07,
    )


def city(pen: Pen, mood: Mood) -> None:
    """A skyline in the morning across the water, seen from a terrace."""
    pen.wash(down(0, 0.7, *tones("8ec5f0", "c4e0f4", "fdeedd")))
    cloud(pen, mood.near(0.22, 0.05), 0.12, 0.3, WHITE, 0.85)
    for x, width, top in (
        (-2, 14, 38),
        (14, 10, 30),
        (28, 12, 40),
        (42, 14, 26),
        (60, 10, 36),
        (72, 13, 30),
        (88, 14, 40),
    ):
        pen.fill(box(x / 100, top / 100, (x + width) / 100, 0.72), hexa("b3c4de"))
    towers = (
        (-3, 16, 22, "flat"),
        (15, 11, 44, "flat"),
        (27, 10, 32, "step"),
        (62, 11, 46, "flat"),
        (74, 12, 18, "spire"),
        (88, 15, 34, "slant"),
    )
    for x, width, top, roof in towers:
        left = x / 100 if mood.side > 0 else 1 - (x + width) / 100
        _tower(pen, left, width / 100, top / 100, roof)
    pen.fill(box(0, 0.66, 1, 0.76), down(0.66, 0.76, *tones("7fa3cf", "a9c6e4")))
    pen.fill(box(0, 0.74, 1, 1), down(0.74, 1, *tones("e6dfd6", "cfc7bf", "b9b1ac")))
    pen.fill(box(0, 0.73, 1, 0.765), hexa("f3eee6"))


def _tower(pen: Pen, left: float, width: float, top: float, roof: str) -> None:
    """Draw a building with rows of windows."""
    right, colour = left + width, hexa("6d83b4")
    if roof == "spire":
        middle = left + width / 2
        pen.fill(
            polygon([(middle - 0.012, top), (middle, top - 0.15), (middle + 0.012, top)]), colour
        )
        pen.fill(box(left + width * 0.22, top, right - width * 0.22, top + 0.1), colour)
        top += 0.08
    elif roof == "step":
        pen.fill(box(left + width * 0.25, top - 0.06, right - width * 0.25, top + 0.02), colour)
    elif roof == "slant":
        pen.fill(polygon([(left, top + 0.01), (right, top - 0.07), (right, top + 0.01)]), colour)
    pen.fill(box(left, top, right, 0.72), down(top, 0.72, colour, mix(colour, WHITE, 0.3)))
    columns = 2 if width < 0.13 else 3
    step = width / columns
    for column in range(columns):
        x = left + (column + 0.26) * step
        for row in range(round((0.6 - top) / 0.075)):
            y = top + 0.04 + row * 0.075
            pen.fill(box(x, y, x + 0.48 * step, y + 0.04), hexa("dfe9fa"), 0.62)


def eiffel(pen: Pen, mood: Mood) -> None:
    """The Eiffel Tower at the end of its lawn, on a rosy day."""
    pen.wash(down(0, 0.66, *tones("a5cdf2", "dbe4f4", "fde3d3")))
    cloud(pen, mood.at(-0.28), 0.17, 0.34, WHITE, 0.85)
    for x in (0.02, 0.2, 0.4, 0.62, 0.82, 1.0):
        pen.fill(oval(x, 0.64, 0.13, 0.075), hexa("7fae7a"))
    with pen.moved(mood.at(0.31), 0.66, stretch=(0.62, 0.62)):
        _iron(pen, hexa("8a6450"))
    pen.fill(box(0, 0.65, 1, 1), down(0.65, 1, *tones("9ccb74", "7db55f")))
    pen.fill(
        polygon(
            [(mood.at(0.28), 0.65), (mood.at(0.34), 0.65), (mood.at(0.3), 1), (mood.at(-0.34), 1)]
        ),
        hexa("f0e2c4"),
        0.85,
    )
    for x in (0.0, 1.0):
        pen.fill(oval(x, 0.7, 0.17, 0.085), hexa("4f8f52"))


def _iron(pen: Pen, colour: RGB) -> None:
    """Draw the tower, 1 high on its feet."""
    for side in (-1, 1):
        with pen.moved(stretch=(side, 1)):
            pen.fill(path("M8 -34 Q12 -14 29 0 L15 0 Q8 -14 0 -17 L0 -34 Z"), colour)
            pen.fill(path("M0 -86 L2.5 -86 Q4 -58 9 -34 L0 -34 Z"), colour)
    pen.fill(
        path("M-15 0 Q-10 -20 0 -20 Q10 -20 15 0 L9 0 Q6 -11 0 -11 Q-6 -11 -9 0 Z"),
        mix(colour, WHITE, 0.2),
    )
    pen.fill(path("M-5 -28 L0 -36 L5 -28 L0 -24 Z"), mix(colour, WHITE, 0.5))
    pen.fill(path("M-2.4 -42 L0 -56 L2.4 -42 Z"), mix(colour, WHITE, 0.5))
    pen.fill(box(-0.14, -0.23, 0.14, -0.195), mix(colour, hexa("3a2a2a"), 0.3))
    pen.fill(box(-0.095, -0.405, 0.095, -0.37), mix(colour, hexa("3a2a2a"), 0.3))
    pen.fill(box(-0.042, -0.885, 0.042, -0.85), mix(colour, hexa("3a2a2a"), 0.3))
    pen.line(path("M0 -86 L0 -102"), colour, 0.022)


SURFACE = 0.46


def _surface(y: float = SURFACE) -> str:
    """Return the waving line of the water, in hundredths."""
    y *= 100
    crest, trough = y - 3.5, y + 3.5
    return f"M-2 {y} Q10 {crest} 22 {y} Q36 {trough} 50 {y} Q64 {crest} 78 {y} Q90 {trough} 102 {y}"


def water(pen: Pen, mood: Mood) -> None:
    """The sea, cut open: sky above, and below a clear depth with light, bubbles and sand."""
    pen.wash(down(0, SURFACE, *tones("7cc8f5", "c6e9fb", "f3fbfd")))
    cloud(pen, mood.at(0.28), 0.24, 0.36, WHITE, 0.95)
    cloud(pen, mood.at(-0.33), 0.15, 0.26, WHITE, 0.8)
    depth = path(_surface() + " L102 100 L-2 100 Z")
    pen.fill(depth, down(SURFACE, 1, *tones("86e4e6", "38bdd0", "1a92b8", "177fa8")))
    with pen.clip(depth):
        for x, spread in ((0.06, -0.1), (0.3, -0.04), (0.68, 0.05), (0.92, 0.1)):
            ray = polygon(
                [(x - 0.035, 0.4), (x + 0.035, 0.4), (x + spread + 0.09, 1), (x + spread - 0.09, 1)]
            )
            pen.fill(ray, linear(0, 0.45, 0, 0.95, [(0, WHITE, 0.36), (1, WHITE, 0.0)]))
        pen.fill(path("M0 94 Q26 87 54 92 Q80 96 100 90 L100 100 L0 100 Z"), hexa("cfe3bd"), 0.8)
        for x, y, radius in (
            (0.09, 0.7, 0.028),
            (0.14, 0.6, 0.019),
            (0.9, 0.76, 0.026),
            (0.86, 0.64, 0.018),
        ):
            x = mood.near(x, 0.02)
            pen.fill(oval(x, y, radius), WHITE, 0.3)
            pen.line(oval(x, y, radius), WHITE, 0.009, 0.8)
        _fish(pen, mood)


def _fish(pen: Pen, mood: Mood) -> None:
    """Draw a fish that keeps to the side."""
    with pen.moved(mood.at(0.4), 0.85, stretch=(mood.side, 1)):
        pen.fill(path("M-7 0 L-13 -5 L-13 5 Z"), hexa("ff9f45"))
        pen.fill(oval(0, 0, 0.085, 0.05), hexa("ffb152"))
        pen.fill(oval(0.04, -0.01, 0.014), hexa("3a2618"))


def water_before(pen: Pen, mood: Mood) -> None:
    """The water before the thing: it dips in, tinted only so far that its colours stay."""
    depth = path(_surface() + " L102 100 L-2 100 Z")
    pen.fill(depth, linear(0, SURFACE, 0, 1, [(0, hexa("a5f0ee"), 0.14), (1, hexa("2aa3c4"), 0.2)]))
    pen.line(path(_surface()), WHITE, 0.018, 0.9)
    pen.line(path(_surface(SURFACE + 0.028)), hexa("bff6f4"), 0.02, 0.5)
