"""How every object is drawn: base colour, pattern, form, ink, in one light.

All objects share this one manner, which is what makes a picture of any of them look like it comes
from the same book: flat colour, a soft shade that says which form it is, a thin line in a deep
tone of the colour itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import skia

from .decor import Decor, draw_accessory, draw_mark
from .palette import INDIGO, RGB, WHITE, is_dark, mix
from .patterns import PATTERNS
from .pen import Box, Pen, linear, oval, radial

INK_WIDTH = 0.0155


@dataclass(frozen=True)
class Look:
    """How one object looks: colours, pattern and what varies from one to the next."""

    main: RGB
    accent: RGB
    pattern: str = "plain"
    # Where the light comes from: -1 left, 1 right.
    side: float = -1.0
    gloss: float = 0.5
    yaw: float = 0.0
    # Seeds the small differences between two objects of a kind.
    variant: int = 0
    # Whether it is drawn mirrored, for the light and for what must not be: letters.
    flip: bool = False
    decor: Decor | None = None


@dataclass
class Artist(Pen):
    """A pen that draws an object with a look."""

    canvas: skia.Canvas
    look: Look
    rng: random.Random = field(init=False)
    ink: RGB = field(init=False)
    seam: RGB = field(init=False)
    side: float = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.look.variant)
        # In the coordinates of the drawing, which may be mirrored.
        self.side = -self.look.side if self.look.flip else self.look.side
        self.ink = self.ink_of(self.look.main)
        # Lines inside a dark object are light: ink would be lost on it.
        dark = is_dark(self.look.main)
        self.seam = mix(self.look.main, WHITE, 0.3) if dark else mix(self.look.main, self.ink, 0.7)

    @staticmethod
    def ink_of(colour: RGB) -> RGB:
        """Return the deep tone that outlines a colour."""
        return mix(colour, INDIGO, 0.58)

    @property
    def deep(self) -> RGB:
        """The main colour in the shade, for parts that lie behind or below."""
        return mix(self.look.main, INDIGO, 0.28)

    @property
    def light(self) -> RGB:
        """The main colour, pale, for bellies and linings."""
        return mix(self.look.main, WHITE, 0.25 if is_dark(self.look.main) else 0.55)

    def part(
        self,
        shape: skia.Path,
        fill: RGB | None = None,
        form: str = "ball",
        clad: bool = False,
        sag: float = 0.0,
        area: Box | None = None,
        ink: bool = True,
    ) -> None:
        """Draw a part of the object; a clad one wears the pattern."""
        fill = self.look.main if fill is None else fill
        self.fill(shape, fill)
        edges = area or bounds(shape)
        with self.clip(shape):
            if clad:
                shift = 0.05 * self.look.yaw
                moved = (edges[0] + shift, edges[1], edges[2] + shift, edges[3])
                self.fill(PATTERNS[self.look.pattern](moved, sag), self.look.accent)
            self.shade(bounds(shape), form)
        if ink:
            self.line(shape, self.ink_of(fill), INK_WIDTH)

    def shade(self, edges: Box, form: str) -> None:
        """Lay light and shade over a part: a "ball", a "tube" (upright) or a "slab"."""
        left, top, right, bottom = edges
        side, shade = self.side, mix(self.look.main, INDIGO, 0.85)
        glint = 0.16 + 0.3 * self.look.gloss
        width, height = right - left, bottom - top
        middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
        if form == "tube":
            lit, unlit = (left, right) if side < 0 else (right, left)
            stops = [(0.0, shade, 0.16), (0.2, WHITE, glint), (0.5, WHITE, 0.0), (1.0, shade, 0.35)]
            stops.insert(3, (0.6, shade, 0.03))
            self.wash(linear(lit, 0, unlit, 0, stops))
        elif form == "ball":
            x, y = middle_x + 0.22 * side * width, middle_y - 0.24 * height
            stops = [(0.0, WHITE, glint), (0.4, WHITE, 0.02), (0.62, shade, 0.06)]
            stops.append((1.0, shade, 0.37))
            self.wash(radial(x, y, 0.86 * max(width, height), stops))
        else:
            x = side * width / 2
            stops = [(0.0, WHITE, 0.7 * glint), (0.5, WHITE, 0.0), (1.0, shade, 0.26)]
            stops.insert(2, (0.55, shade, 0.0))
            self.wash(linear(middle_x + x, top, middle_x - x, bottom, stops))

    def rod(self, curve: skia.Path, width: float, fill: RGB | None = None) -> None:
        """Draw a rounded bar along a curve: a handle, a tail, an arm."""
        fill = self.look.main if fill is None else fill
        self.line(curve, self.ink_of(fill), width + 2 * INK_WIDTH * 0.8)
        self.line(curve, fill, width)
        with self.moved(0.16 * width * self.side, -0.16 * width):
            self.line(curve, WHITE, width * 0.34, 0.16 + 0.3 * self.look.gloss)

    def crease(self, curve: skia.Path, width: float = INK_WIDTH, alpha: float = 0.85) -> None:
        """Draw a line inside the object."""
        self.line(curve, self.seam, width, alpha)

    def glint(self, x: float, y: float, radius_x: float, radius_y: float, turn: float = 0) -> None:
        """Put a reflection of the window on a glossy surface."""
        strength = max(self.look.gloss - 0.35, 0.0) * 1.2
        if strength:
            with self.moved(x, y, turn):
                self.fill(oval(0, 0, radius_x, radius_y), WHITE, min(strength, 0.85))

    def mark(self, x: float, y: float, radius: float) -> None:
        """Put the emblem or the face of a one-of-a-kind object here; others have none."""
        if self.look.decor:
            with self.moved(x + 0.04 * self.look.yaw, y, 0, (-1 if self.look.flip else 1, 1)):
                draw_mark(self, self.look.decor, radius)

    def wear(self, x: float, y: float, width: float) -> None:
        """Put the accessory of a one-of-a-kind object here: a head's crown, a neck."""
        if self.look.decor:
            draw_accessory(self, self.look.decor, x, y, width)


def bounds(shape: skia.Path) -> Box:
    """Return the left, top, right and bottom of a shape."""
    rect = shape.computeTightBounds()
    return rect.left(), rect.top(), rect.right(), rect.bottom()
