"""Shapes and paint: a thin layer over Skia in which drawings are short to write.

Everything is drawn in the unit of the thing drawn: a frame or an object is 1 wide. Paths are
written in hundredths of it, as in an SVG file, with y pointing down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import skia

from .palette import RGB

Fill = RGB | skia.Shader
Box = tuple[float, float, float, float]
Stop = tuple[float, RGB, float]
ON_TOP_ONLY = skia.BlendMode.kSrcATop


@lru_cache(maxsize=1024)
def path(description: str) -> skia.Path:
    """Return the path of an SVG description in hundredths (M, L, Q, C and Z, absolute)."""
    result = skia.Path()
    commands = {"M": result.moveTo, "L": result.lineTo, "Q": result.quadTo, "C": result.cubicTo}
    command, numbers = "", []
    for word in [*description.replace(",", " ").split(), ""]:
        if word and not word[0].isalpha():
            numbers.append(float(word) / 100)
            continue
        if command:
            commands[command](*numbers)
        command, numbers = word[:1], [float(word[1:]) / 100] if len(word) > 1 else []
        if command == "Z":
            result.close()
            command = ""
    return result


def oval(x: float, y: float, radius_x: float, radius_y: float | None = None) -> skia.Path:
    """Return an ellipse around a point."""
    radius_y = radius_x if radius_y is None else radius_y
    return skia.Path.Oval(
        skia.Rect.MakeLTRB(x - radius_x, y - radius_y, x + radius_x, y + radius_y)
    )


def box(left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> skia.Path:
    """Return a rectangle, with round corners if asked."""
    rect = skia.Rect.MakeLTRB(left, top, right, bottom)
    if not radius:
        return skia.Path.Rect(rect)
    return skia.Path.RRect(skia.RRect.MakeRectXY(rect, radius, radius))


def polygon(points: Sequence[tuple[float, float]], closed: bool = True) -> skia.Path:
    """Return straight lines through points."""
    return skia.Path.Polygon([skia.Point(*point) for point in points], closed)


def smooth(points: Sequence[tuple[float, float]], closed: bool = True) -> skia.Path:
    """Return a soft curve through points (Catmull-Rom)."""
    count = len(points)
    result = skia.Path()
    result.moveTo(*points[0])
    for index in range(count if closed else count - 1):
        at = [
            points[(index + step) % count if closed else min(max(index + step, 0), count - 1)]
            for step in (-1, 0, 1, 2)
        ]
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = at
        result.cubicTo(
            *(bx + (cx - ax) / 6, by + (cy - ay) / 6),
            *(cx - (dx - bx) / 6, cy - (dy - by) / 6),
            *(cx, cy),
        )
    if closed:
        result.close()
    return result


def star(x: float, y: float, radius: float, points: int = 5, waist: float = 0.45) -> skia.Path:
    """Return a star with one point up."""
    turn = math.pi / points
    return polygon(
        [
            (
                x + radius * (waist if index % 2 else 1) * math.sin(index * turn),
                y - radius * (waist if index % 2 else 1) * math.cos(index * turn),
            )
            for index in range(2 * points)
        ]
    )


def _argb(colour: RGB, alpha: float) -> int:
    """Return the colour as Skia's gradients want it."""
    red, green, blue = (min(max(round(part * 255), 0), 255) for part in colour)
    return skia.ColorSetARGB(min(max(round(alpha * 255), 0), 255), red, green, blue)


def linear(x0: float, y0: float, x1: float, y1: float, stops: Sequence[Stop]) -> skia.Shader:
    """Return a gradient along a line; a stop is (position, colour, alpha)."""
    return skia.GradientShader.MakeLinear(
        [skia.Point(x0, y0), skia.Point(x1, y1)],
        [_argb(colour, alpha) for _, colour, alpha in stops],
        [position for position, _, _ in stops],
    )


def down(top: float, bottom: float, *colours: RGB) -> skia.Shader:
    """Return an opaque gradient of evenly spaced colours from top to bottom."""
    last = len(colours) - 1
    return linear(0, top, 0, bottom, [(i / last, colour, 1) for i, colour in enumerate(colours)])


def radial(x: float, y: float, radius: float, stops: Sequence[Stop]) -> skia.Shader:
    """Return a gradient around a point."""
    return skia.GradientShader.MakeRadial(
        skia.Point(x, y),
        radius,
        [_argb(colour, alpha) for _, colour, alpha in stops],
        [position for position, _, _ in stops],
    )


class Pen:
    """A canvas with paint."""

    def __init__(self, canvas: skia.Canvas) -> None:
        self.canvas = canvas

    def fill(
        self,
        shape: skia.Path,
        fill: Fill,
        alpha: float = 1.0,
        blur: float = 0.0,
        mode: skia.BlendMode = skia.BlendMode.kSrcOver,
    ) -> None:
        """Fill a shape, with soft edges if `blur` (their width) is given."""
        self.canvas.drawPath(shape, _paint(fill, alpha, blur, mode))

    def line(
        self, shape: skia.Path, fill: Fill, width: float, alpha: float = 1.0, blur: float = 0.0
    ) -> None:
        """Stroke a shape with round ends and joints."""
        paint = _paint(fill, alpha, blur, skia.BlendMode.kSrcOver)
        paint.setStyle(skia.Paint.kStroke_Style)
        paint.setStrokeWidth(width)
        paint.setStrokeCap(skia.Paint.kRound_Cap)
        paint.setStrokeJoin(skia.Paint.kRound_Join)
        self.canvas.drawPath(shape, paint)

    def wash(self, fill: Fill, alpha: float = 1.0) -> None:
        """Fill everything there is, or everything inside the clip."""
        self.canvas.drawPaint(_paint(fill, alpha, 0.0, skia.BlendMode.kSrcOver))

    def glow(
        self, x: float, y: float, radius: float, colour: RGB, alpha: float, flat: float = 1.0
    ) -> None:
        """Paint a soft round light (or, in a dark colour, a shadow), `flat` high for 1 wide."""
        stops = [(0.0, colour, alpha), (0.4, colour, alpha * 0.6), (1.0, colour, 0.0)]
        with self.moved(x, y, stretch=(1.0, flat)):
            self.fill(oval(0, 0, radius), radial(0, 0, radius, stops))

    @contextmanager
    def clip(self, shape: skia.Path) -> Iterator[None]:
        """Draw only inside a shape."""
        self.canvas.save()
        self.canvas.clipPath(shape, doAntiAlias=True)
        try:
            yield
        finally:
            self.canvas.restore()

    @contextmanager
    def moved(
        self,
        x: float = 0.0,
        y: float = 0.0,
        turn: float = 0.0,
        stretch: tuple[float, float] = (1.0, 1.0),
    ) -> Iterator[None]:
        """Draw at another place, turned by degrees, then stretched."""
        self.canvas.save()
        self.canvas.translate(x, y)
        if turn:
            self.canvas.rotate(turn)
        self.canvas.scale(*stretch)
        try:
            yield
        finally:
            self.canvas.restore()

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Draw on a transparent sheet of its own, laid on the canvas at the end."""
        self.canvas.saveLayer()
        try:
            yield
        finally:
            self.canvas.restore()


def _paint(fill: Fill, alpha: float, blur: float, mode: skia.BlendMode) -> skia.Paint:
    """Return Skia's paint for a colour or a gradient."""
    paint = skia.Paint(AntiAlias=True)
    if isinstance(fill, tuple):
        paint.setColor4f(skia.Color4f(*fill, alpha))
    else:
        paint.setShader(fill)
        paint.setAlphaf(alpha)
    if blur:
        paint.setMaskFilter(skia.MaskFilter.MakeBlur(skia.kNormal_BlurStyle, blur))
    if mode is not skia.BlendMode.kSrcOver:
        paint.setBlendMode(mode)
    return paint
