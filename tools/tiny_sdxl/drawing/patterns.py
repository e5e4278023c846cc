"""Two-tone patterns: the part of a surface that the second colour covers.

A pattern is a function of the box of the surface and returns one path. Sizes are in widths of the
object and large on purpose: at 192 px a stripe is 11 px or more, so that an autoencoder with
eight pixels to the latent keeps it. `sag` bends rows down in the middle, as on a round body.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import skia

from .pen import Box, oval, polygon, star

Point = tuple[float, float]
Pattern = Callable[[Box, float], skia.Path]

PERIOD = 0.22


def _centre(box: Box) -> Point:
    """Return the middle of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _bent(box: Box, sag: float, points: Iterable[Point]) -> list[Point]:
    """Move points down by up to `sag`, most in the middle of the box."""
    middle, half = _centre(box)[0], max((box[2] - box[0]) / 2, 1e-6)
    return [(x, y + sag * (1 - min(((x - middle) / half) ** 2, 1.0))) for x, y in points]


def _steps(start: float, stop: float, step: float) -> list[float]:
    """Return evenly spaced numbers from start to past the stop."""
    return [start + index * step for index in range(math.ceil((stop - start) / step) + 1)]


def _united(shapes: Iterable[skia.Path]) -> skia.Path:
    """Return all shapes as one."""
    result = skia.Path()
    for shape in shapes:
        result.addPath(shape)
    return result


def _band(box: Box, sag: float, edge: Callable[[float], float], height: float) -> skia.Path:
    """Return a band across the box whose upper edge is a function of x."""
    across = [box[0] + (box[2] - box[0]) * index / 16 for index in range(17)]
    upper = [(x, edge(x)) for x in across]
    lower = [(x, edge(x) + height) for x in reversed(across)]
    return polygon(_bent(box, sag, upper + lower))


def _rows(box: Box, sag: float, period: float = PERIOD) -> list[float]:
    """Return where rows begin, placed evenly about the middle."""
    middle = _centre(box)[1] - sag / 2
    count = math.ceil((box[3] - box[1] + 2 * sag) / period / 2)
    return [middle + (index - 0.25) * period for index in range(-count, count + 1)]


def plain(box: Box, sag: float) -> skia.Path:
    """Nothing."""
    return skia.Path()


def striped(box: Box, sag: float) -> skia.Path:
    """Bands across."""
    return _united(_band(box, sag, lambda x, y=y: y, PERIOD * 0.46) for y in _rows(box, sag))


def polka_dot(box: Box, sag: float) -> skia.Path:
    """Discs in staggered rows."""
    middle, gap = _centre(box)[0], 0.215
    rows = _rows(box, sag, gap * 0.8)
    return _united(
        oval(*_bent(box, sag, [(x, y)])[0], 0.062)
        for index, y in enumerate(rows)
        for x in _steps(middle - 4 * gap + gap / 2 * (index % 2), middle + 4 * gap, gap)
    )


def checkered(box: Box, sag: float) -> skia.Path:
    """A chess board."""
    cell, middle = 0.13, _centre(box)[0]
    rows = _rows(box, sag, cell)
    columns = _steps(middle - 5 * cell, middle + 5 * cell, cell)
    return _united(
        polygon(_bent(box, sag, [(x, y), (x + cell, y), (x + cell, y + cell), (x, y + cell)]))
        for row, y in enumerate(rows)
        for column, x in enumerate(columns)
        if (row + column) % 2
    )


def zigzag(box: Box, sag: float) -> skia.Path:
    """Bands of teeth."""
    tooth, middle = 0.2, _centre(box)[0]
    across = _steps(middle - 3.5 * tooth, middle + 3.5 * tooth, tooth / 2)

    def band(y: float) -> skia.Path:
        upper = [(x, y + 0.1 * (index % 2)) for index, x in enumerate(across)]
        lower = [(x, y + 0.105) for x, y in reversed(upper)]
        return polygon(_bent(box, sag, upper + lower))

    return _united(band(y - 0.05) for y in _rows(box, sag, 0.23))


def two_tone(box: Box, sag: float) -> skia.Path:
    """The lower part, as if dipped into paint."""
    edge = box[1] + 0.58 * (box[3] - box[1])
    return _band(box, sag, lambda x: edge, box[3] - edge + 0.1)


def diagonal(box: Box, sag: float) -> skia.Path:
    """Slanting bands."""
    top, bottom = box[1] - 0.1, box[3] + 0.1
    slant = bottom - top
    return _united(
        polygon([(x, bottom), (x + 0.13, bottom), (x + 0.13 + slant, top), (x + slant, top)])
        for x in _steps(box[0] - slant - 0.1, box[2], 0.27)
    )


def harlequin(box: Box, sag: float) -> skia.Path:
    """Tall diamonds."""
    middle = _centre(box)[0]
    return _united(
        polygon(_bent(box, sag, [(x, y - 0.16), (x + 0.11, y), (x, y + 0.16), (x - 0.11, y)]))
        for y in _rows(box, sag, 0.32)
        for x in _steps(middle - 0.66, middle + 0.66, 0.22)
    )


def waves(box: Box, sag: float) -> skia.Path:
    """Rolling bands."""
    return _united(
        _band(box, sag, lambda x, y=y: y + 0.035 * math.sin(x * 2 * math.pi / 0.3), 0.12)
        for y in _rows(box, sag, 0.25)
    )


def patches(box: Box, sag: float) -> skia.Path:
    """The patches of a cow."""
    width, height = box[2] - box[0], box[3] - box[1]
    spots = ((0.14, 0.2, 0.15), (0.62, 0.1, 0.13), (0.9, 0.45, 0.15), (0.38, 0.55, 0.14))
    spots += ((0.1, 0.8, 0.13), (0.7, 0.88, 0.15))

    def patch(x: float, y: float, radius: float) -> skia.Path:
        turns = [index * math.pi / 8 for index in range(16)]
        return polygon(
            [
                (
                    x + radius * (1 + 0.22 * math.sin(3 * turn + 9 * x)) * math.cos(turn),
                    y + radius * (0.85 + 0.2 * math.cos(2 * turn + 7 * y)) * math.sin(turn),
                )
                for turn in turns
            ]
        )

    return _united(patch(box[0] + x * width, box[1] + y * height, r) for x, y, r in spots)


def sunburst(box: Box, sag: float) -> skia.Path:
    """Rays from the middle of the lower edge."""
    x, y = _centre(box)[0], box[3] + 0.05
    rays = [index * math.pi / 11 for index in range(0, 12, 2)]
    return _united(
        polygon(
            [
                (x, y),
                (x - 2 * math.cos(ray), y - 2 * math.sin(ray)),
                (x - 2 * math.cos(ray + math.pi / 11), y - 2 * math.sin(ray + math.pi / 11)),
            ]
        )
        for ray in rays
    )


def rings(box: Box, sag: float) -> skia.Path:
    """A target."""
    x, y = _centre(box)
    result = _united(oval(x, y, radius) for radius in (0.56, 0.44, 0.32, 0.2))
    result.setFillType(skia.PathFillType.kEvenOdd)
    return result


def halves(box: Box, sag: float) -> skia.Path:
    """One side."""
    middle = _centre(box)[0]
    return polygon([(middle, box[1]), (box[2], box[1]), (box[2], box[3]), (middle, box[3])])


def columns(box: Box, sag: float) -> skia.Path:
    """Upright bands."""
    middle = _centre(box)[0] - 0.06
    top, bottom = box[1] - 0.1, box[3] + 0.1
    return _united(
        polygon([(x, top), (x + 0.12, top), (x + 0.12, bottom), (x, bottom)])
        for x in _steps(middle - 4 * 0.25, middle + 4 * 0.25, 0.25)
    )


def starry(box: Box, sag: float) -> skia.Path:
    """Stars in staggered rows."""
    middle, gap = _centre(box)[0], 0.28
    rows = _rows(box, sag, gap * 0.75)
    return _united(
        star(*_bent(box, sag, [(x, y)])[0], 0.105, waist=0.5)
        for index, y in enumerate(rows)
        for x in _steps(middle - 3 * gap + gap / 2 * (index % 2), middle + 3 * gap, gap)
    )


# What prompts can name, and what only subjects wear.
BASE_PATTERNS: dict[str, Pattern] = {
    "plain": plain,
    "striped": striped,
    "polka-dot": polka_dot,
    "checkered": checkered,
    "zigzag": zigzag,
    "two-tone": two_tone,
}
SUBJECT_PATTERNS: dict[str, Pattern] = {
    "diagonal": diagonal,
    "harlequin": harlequin,
    "waves": waves,
    "patches": patches,
    "sunburst": sunburst,
    "rings": rings,
    "halves": halves,
    "columns": columns,
    "starry": starry,
}
PATTERNS = BASE_PATTERNS | SUBJECT_PATTERNS
