"""Drawing primitives of the reports: an anti-aliased canvas, its colours, and curve panels.

Pillow and numpy only, both of which ComfyUI ships. Everything is measured in the pixels of the
finished picture; :class:`Canvas` draws at twice that size and shrinks at the end.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Point = tuple[float, float]

BACKGROUND: Colour = (0x1E, 0x1E, 0x22)
SURFACE: Colour = (0x26, 0x26, 0x2B)
HAIRLINE: Colour = (0x38, 0x38, 0x40)
OUTLINE: Colour = (0x4E, 0x4E, 0x58)
FAINT: Colour = (0x8E, 0x8E, 0x9A)
MUTED: Colour = (0xB0, 0xB0, 0xBC)
TEXT: Colour = (0xEC, 0xEC, 0xF1)

_SCALE = 2
# Cividis (Nuñez, Anderton and Renslow 2018), which looks nearly the same to every kind of colour
# vision: every 28th of the 256 colours that matplotlib has of it under CC0. Its first eighth is
# left out, because that blue sinks into the dark background. web/lib/colours.mjs has the same.
CIVIDIS: tuple[Colour, ...] = (
    (24, 55, 111),
    (62, 75, 108),
    (89, 94, 110),
    (114, 114, 116),
    (139, 135, 120),
    (166, 156, 116),
    (195, 179, 105),
    (225, 204, 85),
    (254, 232, 56),
)
_INKS: tuple[Colour, Colour] = ((0x04, 0x04, 0x06), (0xFF, 0xFF, 0xFF))


def cividis(position: float) -> Colour:
    """The colour at ``position`` of the scale, 0 (low) to 1 (high)."""
    place = min(max(position, 0.0), 1.0) * (len(CIVIDIS) - 1)
    index = min(int(place), len(CIVIDIS) - 2)
    return mix(CIVIDIS[index], CIVIDIS[index + 1], place - index)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """``first`` with ``share`` (0 to 1) of ``second`` in it."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def contrast(first: Colour, second: Colour) -> float:
    """How well one reads on the other, 1 to 21 (WCAG 2); text wants 4.5."""
    low, high = sorted(map(_luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Colour) -> float:
    shares = [c / 255 for c in colour]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink_on(fill: Colour) -> Colour:
    """Nearly black or white, whichever reads better on ``fill``."""
    return max(_INKS, key=lambda ink: contrast(ink, fill))


def drawable(text: str) -> str:
    """``text`` in the glyphs of Pillow's bundled font: ASCII, "…", "·" and a raised "²"."""
    swaps = {0x2013: "-", 0x2014: "-", 0x2212: "-", 0xD7: "x", 0x2019: "'", 0x0A: " "}
    result = []
    for char in text.translate(swaps):
        if char in "…·²" or " " <= char <= "~":
            result.append(char)
            continue
        plain = unicodedata.normalize("NFKD", char)
        plain = "".join(c for c in plain if not unicodedata.combining(c))
        result.append(plain if plain.isascii() and plain.isprintable() else "?")
    return "".join(result)


@cache
def _font(pixels: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=pixels)


def _runs(text: str, size: float) -> Iterator[tuple[str, float, bool]]:
    """The pieces of ``text`` with their font sizes; True marks a raised "2"."""
    for index, piece in enumerate(drawable(text).split("²")):
        if index:
            yield "2", size * 0.62, True
        if piece:
            yield piece, size, False


def text_width(text: str, size: float) -> float:
    """How wide :meth:`Canvas.text` draws ``text``."""
    return sum(_font(s * _SCALE).getlength(piece) for piece, s, _ in _runs(text, size)) / _SCALE


def fitted(text: str, size: float, width: float) -> str:
    """``text``, its end replaced by an ellipsis when it is wider than ``width``."""
    text = drawable(text)
    if text_width(text, size) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if text_width(text[:middle].rstrip() + "…", size) <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "…"


class Canvas:
    """An RGB picture of ``width`` by ``height`` pixels, drawn at twice the size."""

    def __init__(self, width: int, height: int) -> None:
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), BACKGROUND)
        self._draw = ImageDraw.Draw(self._image)

    def finish(self) -> Image.Image:
        """The picture at its real size."""
        width, height = self._image.size
        return self._image.resize((width // _SCALE, height // _SCALE), Image.Resampling.LANCZOS)

    def text(
        self, at: Point, text: str, size: float, colour: Colour = TEXT, align: str = "left"
    ) -> None:
        """One line of text; ``at`` is on the baseline, at its left, centre or right."""
        shift = {"left": 0.0, "centre": 0.5, "right": 1.0}[align]
        x = (at[0] - text_width(text, size) * shift) * _SCALE
        for piece, piece_size, raised in _runs(text, size):
            font = _font(piece_size * _SCALE)
            lift = size * 0.33 if raised else 0.0
            self._draw.text((x, (at[1] - lift) * _SCALE), piece, colour, font, anchor="ls")
            x += font.getlength(piece)

    def box(
        self, box: Box, fill: Colour | None = None, outline: Colour | None = None, radius: float = 0
    ) -> None:
        """A rectangle; the right and bottom edges of ``box`` lie just outside it."""
        left, top, right, bottom = (value * _SCALE for value in box)
        edges = (left, top, max(right - 1, left), max(bottom - 1, top))
        self._draw.rounded_rectangle(edges, radius * _SCALE, fill, outline, _SCALE)

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1) -> None:
        """A line through ``points``."""
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, colour, round(width * _SCALE), joint="curve")

    def dashes(self, start: Point, end: Point, colour: Colour) -> None:
        """A horizontal dashed line."""
        for x in np.arange(start[0], end[0], 9.0):
            self.line([(float(x), start[1]), (min(float(x) + 5, end[0]), start[1])], colour)

    def dot(self, at: Point, radius: float, colour: Colour) -> None:
        """A filled circle."""
        x, y, r = (value * _SCALE for value in (*at, radius))
        self._draw.ellipse((x - r, y - r, x + r, y + r), colour)

    @contextmanager
    def clipped(self, box: Box) -> Iterator[None]:
        """What is drawn inside the ``with`` block shows in ``box`` only."""
        before, self._image = self._image, self._image.copy()
        self._draw = ImageDraw.Draw(self._image)
        yield
        area = (
            round(box[0] * _SCALE),
            round(box[1] * _SCALE),
            round(box[2] * _SCALE),
            round(box[3] * _SCALE),
        )
        before.paste(self._image.crop(area), area[:2])
        self._image, self._draw = before, ImageDraw.Draw(before)


@dataclass(frozen=True)
class Curve:
    """One line of a panel. Points that are not finite are dropped when it is made."""

    label: str
    points: tuple[Point, ...]
    colour: Colour
    width: float = 1.0
    dots: bool = False
    robust: bool = False  # its outliers do not set the panel's range

    @classmethod
    def of(cls, label: str, xs: Iterable[float], ys: Iterable[float], **look) -> Curve:
        """From two series; the longer one is cut."""
        pairs = zip(xs, ys, strict=False)
        return cls(label, tuple((x, y) for x, y in pairs if _plottable(x, y)), **look)


def _plottable(*values: float) -> bool:
    # Beyond 1e30 a range or a tick could overflow; no real loss or rank comes near.
    return all(math.isfinite(value) and abs(value) < 1e30 for value in values)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    rough = (high - low) / max(count, 1)
    if not rough > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / rough)))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The numbers as text, with just the decimals that tell them apart."""
    step = abs(values[1] - values[0]) if len(values) > 1 else 1.0
    if values and (max(abs(v) for v in values) >= 1e6 or step < 1e-5):
        return [f"{value:.3g}" for value in values]
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    return [f"{value + 0.0:.{decimals}f}" for value in values]


def value_range(curves: Sequence[Curve], extra: Sequence[float] = ()) -> tuple[float, float]:
    """The y range of a panel: all curves and ``extra``, without the outliers of robust curves."""
    values = list(extra)
    for curve in curves:
        ys = np.array([y for _, y in curve.points])
        if curve.robust and len(ys) >= 20:
            values += [float(v) for v in np.percentile(ys, (0.5, 98))]
        elif len(ys):
            values += [float(ys.min()), float(ys.max())]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    flat = high - low <= 1e-9 * max(abs(low), abs(high))
    pad = (abs(high) * 0.1 or 1.0) if flat else (high - low) * 0.08
    return (max(low - pad, 0.0) if low >= 0 else low - pad), high + pad


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """``wanted`` moved as little as needed to lie ``gap`` apart between ``low`` and ``high``."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = list(wanted)
    floor = low
    for index in order:
        placed[index] = floor = max(wanted[index], floor)
        floor += gap
    ceiling = high
    for index in reversed(order):
        placed[index] = ceiling = min(placed[index], ceiling)
        ceiling -= gap
    return placed


def draw_plot(
    canvas: Canvas,
    box: Box,
    title: str,
    curves: Sequence[Curve],
    target: float | None = None,
) -> None:
    """A panel of curves over steps, each named at its end; ``target`` is a dashed level."""
    canvas.box(box, SURFACE, radius=6)
    canvas.text((box[0] + 18, box[1] + 27), title, 15)
    inner = (box[0] + 58, box[1] + 46, box[2] - 122, box[3] - 44)
    curves = [curve for curve in curves if curve.points]
    if not curves:
        centre = ((box[0] + box[2]) / 2, (inner[1] + inner[3]) / 2)
        canvas.text(centre, "no steps recorded yet", 13, FAINT, "centre")
        return
    xs = [x for curve in curves for x, _ in curve.points]
    levels = [target] if target is not None and _plottable(target) else []
    across, up = (min(xs), max(xs)), value_range(curves, levels)
    _draw_axes(canvas, inner, across, up)

    def place(point: Point) -> Point:
        share = (point[0] - across[0]) / (across[1] - across[0]) if across[1] > across[0] else 0.5
        rise = (point[1] - up[0]) / (up[1] - up[0])
        return inner[0] + share * (inner[2] - inner[0]), inner[3] - rise * (inner[3] - inner[1])

    for level in levels:
        y = place((across[0], level))[1]
        canvas.dashes((inner[0], y), (inner[2], y), MUTED)
    with canvas.clipped((inner[0] - 4, inner[1], inner[2] + 4, inner[3])):
        for curve in curves:
            _draw_curve(canvas, curve, [place(point) for point in curve.points])
    _draw_names(canvas, inner, curves, levels, lambda y: place((across[0], y))[1])


def _draw_names(
    canvas: Canvas,
    inner: Box,
    curves: Sequence[Curve],
    levels: Sequence[float],
    height: Callable[[float], float],
) -> None:
    """Each curve's name and last value beside its end; a noisy curve's last value says nothing."""
    names = []
    for curve in curves:
        last = curve.points[-1][1]
        text = curve.label if curve.robust else f"{curve.label} {last:.4g}"
        names.append((text, last, mix(curve.colour, TEXT, 0.3 if curve.robust else 0.1)))
    names += [(f"target {level:.4g}", level, MUTED) for level in levels]
    places = spread([height(last) + 4 for _, last, _ in names], 16, inner[1] + 8, inner[3])
    for (text, _, colour), y in zip(names, places, strict=True):
        canvas.text((inner[2] + 12, y), text, 12, colour)


def _draw_axes(canvas: Canvas, inner: Box, across: Point, up: Point) -> None:
    left, top, right, bottom = inner
    values = ticks(up[0], up[1], 5)
    for value, label in zip(values, tick_labels(values), strict=True):
        y = round(bottom - (value - up[0]) / (up[1] - up[0]) * (bottom - top))
        canvas.line([(left, y), (right, y)], HAIRLINE)
        canvas.text((left - 10, y + 4), label, 11, FAINT, "right")
    steps = ticks(across[0], across[1], 6, whole=True)
    for value, label in zip(steps, tick_labels(steps), strict=True):
        share = (value - across[0]) / (across[1] - across[0]) if across[1] > across[0] else 0.5
        canvas.text((left + share * (right - left), bottom + 19), label, 11, FAINT, "centre")
    canvas.text((right + 22, bottom + 19), "steps", 11, FAINT)


def _draw_curve(canvas: Canvas, curve: Curve, points: Sequence[Point]) -> None:
    if len(points) > 1:
        # Thousands of noisy steps would fill the panel: the thinner line keeps it a background.
        canvas.line(
            points, curve.colour, 0.5 if len(points) > 600 and curve.robust else curve.width
        )
    # A short curve shows its points: one point has no line, and two look like a trend.
    if (curve.dots and len(points) <= 60) or len(points) <= 2:
        for point in points:
            canvas.dot(point, 3, curve.colour)
