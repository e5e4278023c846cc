"""Places under the sky: beach, snow, mountains, jungle, park, tower, city, water."""

from __future__ import annotations

from .mood import Mood, tones
from .palette import RGB, WHITE, hexa, mix
from .pen import Pen, box, down, linear, oval, path, polygon

FRAME = box(0, 0, 1, 1)
PETALS = tones("f06292", "ffd54f", "fafafa", "ef5350", "b98cf0", "ff9e57")


def cloud(pen: Pen, x: float, y: float, size: float, colour: RGB, alpha: float) -> None:
    """Draw a flat-bottomed cloud."""
    with pen.moved(x, y, stretch=(size, size)):
        shape = path("M-50 0 C-58 -16 -38 -26 -28 -18 C-22 -40 12 -42 18 -22 C34 -32 56 -16 48 0 Z")
        pen.fill(shape, colour, alpha)


def beach(pen: Pen, mood: Mood) -> None:
    """A low sun over the sea, sand, a palm against the sky."""
    horizon = mood.near(0.5, 0.02)
    pen.wash(down(0, horizon, *tones("69408f", "c9568c", "fb8f5f", "ffd27d")))
    sun = mood.at(mood.near(0.31, 0.03))
    pen.glow(sun, horizon - 0.04, 0.5, hexa("fff0b0"), 0.75)
    for y, x, width in ((0.13, -0.1, 0.36), (0.26, 0.32, 0.3), (0.2, -0.42, 0.24)):
        pen.fill(oval(mood.at(x), y, width / 2, 0.018), hexa("ffb59a"), 0.55)
    pen.fill(oval(sun, horizon - 0.05, 0.125), hexa("fff3c4"))
    pen.fill(box(0, horizon, 1, 0.68), down(horizon, 0.68, *tones("8a5a9e", "c9758f", "e9a08a")))
    for index, width in enumerate((0.12, 0.085, 0.055)):
        y = horizon + 0.025 + 0.042 * index
        pen.fill(box(sun - width, y, sun + width, y + 0.02, 0.01), hexa("ffe7a6"), 0.85)
    sand = path("M0 66 Q25 61 52 66 Q78 71 100 65 L100 100 L0 100 Z")
    pen.line(path("M0 66 Q25 61 52 66 Q78 71 100 65"), hexa("fff1dc"), 0.045, 0.9)
    pen.fill(sand, down(0.62, 1, *tones("f0bd83", "e2a56c", "cf8a55")))
    pen.fill(
        path("M0 84 Q30 77 62 83 Q85 87 100 82 L100 88 Q80 92 58 88 Q28 83 0 90 Z"),
        hexa("fbd7a2"),
        0.5,
    )
    with pen.moved(mood.at(-0.5), 0.0, stretch=(mood.side, 1)):
        _palm(pen, hexa("432450"))


def _palm(pen: Pen, colour: RGB) -> None:
    """Draw a palm that leans in from the left edge."""
    pen.line(path("M2 74 Q0 44 12 18"), colour, 0.042)
    for tip, bend in (
        ((42, 20), (28, 2)),
        ((36, 35), (28, 14)),
        ((-14, 26), (-4, 4)),
        ((2, 42), (2, 22)),
        ((30, 3), (22, 4)),
        ((-6, 4), (2, 6)),
    ):
        (x, y), (bend_x, bend_y) = tip, bend
        pen.fill(
            path(f"M12 14 Q{bend_x} {bend_y} {x} {y} Q{bend_x - 3} {bend_y + 12} 12 20 Z"), colour
        )


def snow(pen: Pen, mood: Mood) -> None:
    """Hills under snow, firs, a warm low sun."""
    pen.wash(down(0, 0.6, *tones("8fbfee", "c5def3", "fdeed6")))
    pen.glow(mood.at(0.34), 0.3, 0.42, hexa("fff3cf"), 0.95)
    pen.fill(path("M0 52 Q22 36 46 48 Q72 60 100 42 L100 70 L0 70 Z"), hexa("cfdff2"))
    for x, ground, height in ((-0.43, 0.66, 0.54), (-0.2, 0.6, 0.34), (0.45, 0.66, 0.46)):
        _fir(pen, mood.at(x) + mood.near(0, 0.015), ground, height * mood.near(1, 0.06))
    pen.fill(
        path("M0 62 Q28 54 55 61 Q80 67 100 60 L100 100 L0 100 Z"),
        down(0.56, 1, *tones("ffffff", "eaf1fa", "cfdef2")),
    )
    pen.fill(path("M0 84 Q26 74 58 80 Q82 84 100 78 L100 100 L0 100 Z"), hexa("f8fbff"), 0.8)
    for x, y in ((0.12, 0.1), (0.36, 0.06), (0.64, 0.12), (0.92, 0.2), (0.3, 0.26), (0.8, 0.05)):
        pen.fill(oval(mood.near(x, 0.02), mood.near(y, 0.02), 0.022), WHITE, 0.9)


def _fir(pen: Pen, x: float, ground: float, height: float) -> None:
    """Draw a fir with snow on it."""
    with pen.moved(x, ground, stretch=(height, height)):
        pen.fill(box(-0.05, -0.16, 0.05, 0.05), hexa("6b4a3e"))
        for y, width in ((-0.08, 0.36), (-0.34, 0.29), (-0.6, 0.21)):
            pen.fill(polygon([(-width, y), (0, y - 0.42), (width, y)]), hexa("5d938b"))
            pen.fill(
                polygon(
                    [
                        (-width * 0.55, y - 0.19),
                        (0, y - 0.42),
                        (width * 0.55, y - 0.19),
                        (width * 0.2, y - 0.12),
                        (0, y - 0.19),
                        (-width * 0.25, y - 0.12),
                    ]
                ),
                hexa("f6fafe"),
            )


def snowdrift(pen: Pen, mood: Mood) -> None:
    """A drift before the thing, so that it stands in the snow and not on it."""
    drift = path("M0 93 Q20 87 40 91 Q62 94 80 89 Q92 87 100 91 L100 100 L0 100 Z")
    pen.fill(drift, down(0.86, 1, *tones("ffffff", "dde8f6")))


def mountains(pen: Pen, mood: Mood) -> None:
    """Peaks with snow on them, one behind the other, and mist between."""
    pen.wash(down(0, 0.65, *tones("9cc0e4", "cfdff0", "f9e6dc")))
    shift = mood.near(0, 3)
    _range(
        pen,
        [(-20, 56), (14 + shift, 14), (38, 42), (48, 36), (80 + shift, 8), (122, 52)],
        hexa("8fa3c8"),
        True,
    )
    pen.fill(
        box(0, 0.36, 1, 0.62),
        linear(0, 0.36, 0, 0.62, [(0, WHITE, 0.0), (0.7, WHITE, 0.8), (1, WHITE, 0.2)]),
    )
    _range(
        pen,
        [(-20, 60), (2 + shift, 42), (24, 57), (46, 52), (74, 58), (98 + shift, 38), (124, 60)],
        hexa("5f7fa6"),
        False,
    )
    pen.fill(
        box(0, 0.55, 1, 0.78),
        linear(0, 0.55, 0, 0.78, [(0, WHITE, 0.0), (0.75, WHITE, 0.85), (1, WHITE, 0.1)]),
    )
    for x, y, width in ((0.12, 0.6, 0.24), (0.86, 0.54, 0.26), (0.5, 0.64, 0.3)):
        pen.glow(mood.near(x, 0.04), y, width, WHITE, 0.9, 0.22)
    pen.fill(
        path("M0 78 Q30 70 60 75 Q85 79 100 74 L100 100 L0 100 Z"),
        down(0.72, 1, *tones("a9c08e", "84a271", "6c8c62")),
    )


def _range(pen: Pen, points: list[tuple[float, float]], colour: RGB, snowy: bool) -> None:
    """Draw peaks through points in hundredths; every second one is a summit."""
    line = [(x / 100, y / 100) for x, y in points]
    pen.fill(
        polygon([*line, (1.3, 1), (-0.3, 1)]),
        down(0.05, 0.72, colour, mix(colour, WHITE, 0.15), mix(colour, WHITE, 0.85)),
    )
    for index in range(1, len(line) - 1):
        x, y = line[index]
        if not snowy or y > min(line[index - 1][1], line[index + 1][1]):
            continue
        (left, left_y), (right, right_y) = line[index - 1], line[index + 1]

        def down_to(share: float, to_x: float, to_y: float, x: float = x, y: float = y):
            return x + (to_x - x) * share, y + (to_y - y) * share

        pen.fill(
            polygon(
                [
                    (x, y),
                    down_to(0.42, right, right_y),
                    (x + 0.05, y + 0.13),
                    (x + 0.005, y + 0.21),
                    (x - 0.05, y + 0.12),
                    down_to(0.42, left, left_y),
                ]
            ),
            hexa("fdfdff"),
        )


def jungle(pen: Pen, mood: Mood) -> None:
    """Deep green, a shaft of light, large leaves on all sides."""
    pen.wash(down(0, 1, *tones("2f7d52", "1f6446", "16503c", "0f3d33")))
    pen.glow(mood.at(0.12), 0.2, 0.62, hexa("d3ee9a"), 0.7)
    for x, width in ((0.16, 0.07), (0.8, 0.085)):
        pen.fill(box(x, 0, x + width, 0.86), hexa("2c4a38"), 0.8)
    pen.line(path("M30 -2 Q34 30 26 44"), hexa("3d7f45"), 0.02)
    pen.line(path("M70 -2 Q64 22 71 36"), hexa("3d7f45"), 0.02)
    for x, y, turn, size, code in (
        (-0.04, 0.55, 62, 0.48, "2f8f4e"),
        (1.04, 0.52, -60, 0.48, "379a52"),
        (0.28, -0.06, 196, 0.4, "3fa556"),
        (0.7, -0.08, 168, 0.42, "2f8f4e"),
    ):
        _leaf(pen, x, y, turn + mood.near(0, 6), size, hexa(code))
    pen.fill(
        path("M0 82 Q30 74 60 80 Q85 84 100 78 L100 100 L0 100 Z"),
        down(0.75, 1, *tones("4a8a46", "2c6238")),
    )


def _leaf(pen: Pen, x: float, y: float, turn: float, size: float, colour: RGB) -> None:
    """Draw a split leaf that grows up from a point, then turned."""
    with pen.moved(x, y, turn, (size, size)):
        leaf = path("M0 0 C-44 -20 -42 -70 0 -104 C42 -70 44 -20 0 0 Z")
        pen.fill(
            leaf,
            linear(
                -0.4,
                0,
                0.4,
                0,
                [
                    (0, mix(colour, WHITE, 0.12), 1),
                    (0.5, colour, 1),
                    (1, mix(colour, hexa("0b2f2a"), 0.4), 1),
                ],
            ),
        )
        pen.line(path("M0 0 L0 -96"), mix(colour, hexa("e5ffb0"), 0.5), 0.045)
        for at in (-0.28, -0.52):
            for side in (-1, 1):
                pen.line(
                    polygon([(0, at), (side * 0.27, at - 0.17)], False),
                    mix(colour, hexa("e5ffb0"), 0.35),
                    0.035,
                )


def jungle_leaves(pen: Pen, mood: Mood) -> None:
    """Leaves before the thing, in the lower corners, and a flower."""
    for x, turn, size, code in (
        (-0.03, 24, 0.36, "3fae5a"),
        (1.03, -26, 0.38, "36a053"),
        (-0.04, 66, 0.28, "2f8f4e"),
        (1.05, -68, 0.27, "58b860"),
    ):
        _leaf(pen, x, 1.04, turn + mood.near(0, 4), size, hexa(code))
    _flower(pen, mood.at(0.4), 0.9, 0.062, hexa("ff7a59"), hexa("ffd75e"))


def _flower(pen: Pen, x: float, y: float, radius: float, petal: RGB, eye: RGB) -> None:
    """Draw a flower from above."""
    for across, along in ((0, -1), (0.95, -0.31), (0.59, 0.81), (-0.59, 0.81), (-0.95, -0.31)):
        pen.fill(oval(x + 0.55 * radius * across, y + 0.55 * radius * along, 0.5 * radius), petal)
    pen.fill(oval(x, y, 0.36 * radius), eye)
