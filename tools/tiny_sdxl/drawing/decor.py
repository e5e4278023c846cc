"""What only one-of-a-kind objects carry: an emblem or a face, and something to wear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .palette import RGB, WHITE, hexa, is_dark, mix
from .pen import Pen, box, oval, path, polygon, smooth, star

DARK: RGB = hexa("231a33")


@dataclass(frozen=True)
class Decor:
    """The emblem or face of a subject, and its accessory."""

    mark: str
    letter: str
    badge: RGB
    figure: RGB
    accessory: str
    cloth: RGB
    trim: RGB


def draw_mark(pen: Pen, decor: Decor, radius: float) -> None:
    """Draw the emblem on its badge, or the face."""
    with pen.moved(stretch=(radius, radius)):
        if decor.mark in FACES:
            FACES[decor.mark](pen, decor)
            return
        rim = WHITE if is_dark(decor.badge) else DARK
        pen.fill(oval(0, 0, 1.0), rim)
        pen.fill(oval(0, 0, 0.9), decor.badge)
        EMBLEMS[decor.mark](pen, decor)


def draw_accessory(pen: Pen, decor: Decor, x: float, y: float, width: float) -> None:
    """Draw what a subject wears, standing on a point, in the width of its head or neck."""
    if decor.accessory == "nothing":
        return
    if decor.accessory in ("bow", "bloom") and width >= 0.4:
        # On a head, not over the eyes.
        x, y, width = x + 0.4 * width, y + 0.02, 0.6 * width
    with pen.moved(x, y, stretch=(width, width)):
        ACCESSORIES[decor.accessory](pen, decor)


def _star(pen: Pen, decor: Decor) -> None:
    """A five-pointed star."""
    pen.fill(star(0, 0.04, 0.8, waist=0.48), decor.figure)


def _heart(pen: Pen, decor: Decor) -> None:
    """A heart."""
    heart = path(
        "M0 66 C-90 8 -66 -60 -30 -56 C-12 -54 -4 -40 0 -28 C4 -40 12 -54 30 -56 "
        "C66 -60 90 8 0 66 Z"
    )
    pen.fill(heart, decor.figure)


def _letter(pen: Pen, decor: Decor) -> None:
    """A letter or a digit."""
    for stroke in LETTERS[decor.letter]:
        pen.line(path(stroke), decor.figure, 0.27)


def _eye(pen: Pen, decor: Decor) -> None:
    """One open eye."""
    pen.fill(path("M-78 0 Q0 -86 78 0 Q0 86 -78 0 Z"), WHITE)
    pen.fill(oval(0, 0, 0.38), decor.figure)
    pen.fill(oval(0, 0, 0.19), DARK)
    pen.fill(oval(-0.12, -0.14, 0.1), WHITE)


def _smiley(pen: Pen, decor: Decor) -> None:
    """Two dots and a smile."""
    for x in (-0.32, 0.32):
        pen.fill(oval(x, -0.2, 0.13, 0.19), decor.figure)
    pen.line(path("M-48 18 Q0 72 48 18"), decor.figure, 0.17)


def _bolt(pen: Pen, decor: Decor) -> None:
    """A flash of lightning."""
    pen.fill(path("M18 -78 L-46 14 L-6 14 L-20 78 L48 -18 L6 -18 Z"), decor.figure)


def _moon(pen: Pen, decor: Decor) -> None:
    """A crescent and a star."""
    pen.fill(path("M22 -66 C-86 -60 -86 60 22 66 C-24 36 -24 -36 22 -66 Z"), decor.figure)
    pen.fill(star(0.34, 0.0, 0.3, waist=0.45), decor.figure)


def _flower(pen: Pen, decor: Decor) -> None:
    """A flower of five petals."""
    petals = ((0, -0.46), (0.44, -0.14), (0.27, 0.38), (-0.27, 0.38), (-0.44, -0.14))
    for x, y in petals:
        pen.fill(oval(x, y, 0.33), decor.figure)
    pen.fill(oval(0, 0, 0.25), decor.badge)


def _cross(pen: Pen, decor: Decor) -> None:
    """A plus sign."""
    pen.fill(box(-0.22, -0.68, 0.22, 0.68, 0.08), decor.figure)
    pen.fill(box(-0.68, -0.22, 0.68, 0.22, 0.08), decor.figure)


def _drop(pen: Pen, decor: Decor) -> None:
    """A drop of water."""
    pen.fill(
        path("M0 -78 C20 -36 54 -8 54 24 C54 90 -54 90 -54 24 C-54 -8 -20 -36 0 -78 Z"),
        decor.figure,
    )
    pen.line(path("M-28 26 Q-26 48 -6 52"), WHITE, 0.12, 0.8)


def _eyes(pen: Pen, size: float, y: float = -0.22) -> None:
    """Two large round eyes looking at us."""
    for x in (-0.44, 0.44):
        pen.fill(oval(x, y, size * 1.2, size * 1.3), DARK)
        pen.fill(oval(x, y, size, size * 1.1), WHITE)
        pen.fill(oval(x * 0.94, y + 0.04, size * 0.62), DARK)
        pen.fill(oval(x * 0.94 - 0.1, y - 0.09, size * 0.22), WHITE)


def _happy(pen: Pen, decor: Decor) -> None:
    """A face that laughs."""
    _eyes(pen, 0.32)
    mouth = path("M-42 28 Q0 44 42 28 Q34 84 0 84 Q-34 84 -42 28 Z")
    pen.line(mouth, WHITE, 0.12)
    pen.fill(mouth, DARK)
    pen.fill(path("M-22 70 Q0 50 22 70 Q12 82 0 82 Q-12 82 -22 70 Z"), hexa("f2637e"))
    for x in (-0.86, 0.86):
        pen.fill(oval(x, 0.26, 0.2, 0.15), decor.figure)


def _cyclops(pen: Pen, decor: Decor) -> None:
    """A face with one eye."""
    pen.fill(oval(0, -0.18, 0.66), DARK)
    pen.fill(oval(0, -0.18, 0.57), WHITE)
    pen.fill(oval(0.02, -0.14, 0.36), decor.figure)
    pen.fill(oval(0.02, -0.14, 0.19), DARK)
    pen.fill(oval(-0.12, -0.3, 0.12), WHITE)
    for colour, width in ((WHITE, 0.27), (DARK, 0.15)):
        pen.line(path("M-40 68 Q0 94 40 68"), colour, width)


def _sleepy(pen: Pen, decor: Decor) -> None:
    """A face that sleeps and yawns."""
    # Light under dark lines, which show on any colour.
    for colour, more in ((WHITE, 0.07), (DARK, 0.0)):
        for x in (-0.46, 0.46):
            with pen.moved(x, -0.16):
                pen.line(path("M-30 0 Q0 36 30 0"), colour, 0.17 + 2 * more)
        pen.fill(oval(0, 0.46, 0.19 + more, 0.23 + more), colour)
    for x in (-0.8, 0.8):
        pen.fill(oval(x, 0.3, 0.22, 0.16), decor.figure)


def _grin(pen: Pen, decor: Decor) -> None:
    """A face that shows its teeth."""
    _eyes(pen, 0.3, -0.32)
    pen.fill(box(-0.68, 0.2, 0.68, 0.76, 0.26), DARK)
    pen.fill(box(-0.58, 0.3, 0.58, 0.66, 0.18), WHITE)
    for x in (-0.3, 0.0, 0.3):
        pen.fill(box(x - 0.035, 0.3, x + 0.035, 0.66), DARK)


def _bow(pen: Pen, decor: Decor) -> None:
    """A bow."""
    for side in (-1, 1):
        with pen.moved(stretch=(side, 1)):
            loop = path("M2 0 C20 -40 50 -34 52 -22 L52 22 C50 34 20 40 2 0 Z")
            pen.fill(loop, decor.cloth)
            pen.line(loop, mix(decor.cloth, DARK, 0.7), 0.05)
            pen.line(path("M16 0 L36 -4"), decor.trim, 0.09)
    pen.fill(oval(0, 0, 0.15, 0.17), decor.trim)
    pen.line(oval(0, 0, 0.15, 0.17), mix(decor.cloth, DARK, 0.7), 0.05)


def _crown(pen: Pen, decor: Decor) -> None:
    """A golden crown."""
    crown = path("M-44 4 L-50 -50 L-24 -26 L0 -62 L24 -26 L50 -50 L44 4 Q0 16 -44 4 Z")
    pen.fill(crown, hexa("f5c33b"))
    pen.fill(path("M-44 4 L-45 -10 Q0 2 45 -10 L44 4 Q0 16 -44 4 Z"), decor.cloth)
    pen.line(crown, hexa("6b4310"), 0.05)
    for x, y in ((-0.5, -0.5), (0, -0.62), (0.5, -0.5)):
        pen.fill(oval(x, y, 0.09), decor.trim)


def _party_hat(pen: Pen, decor: Decor) -> None:
    """A pointed hat with stripes."""
    hat = path("M-38 4 L0 -84 L38 4 Q0 18 -38 4 Z")
    pen.fill(hat, decor.cloth)
    with pen.clip(hat):
        for y in (-0.52, -0.1):
            pen.fill(
                polygon([(-0.6, y + 0.16), (0.6, y - 0.1), (0.6, y + 0.06), (-0.6, y + 0.32)]),
                decor.trim,
            )
    pen.line(hat, mix(decor.cloth, DARK, 0.7), 0.05)
    pen.fill(oval(0, -0.86, 0.14), decor.trim)


def _top_hat(pen: Pen, decor: Decor) -> None:
    """A top hat."""
    tall = path("M-32 -2 L-36 -66 Q0 -76 36 -66 L32 -2 Z")
    pen.fill(tall, decor.cloth)
    pen.fill(path("M-32 -2 L-33 -22 Q0 -12 33 -22 L32 -2 Z"), decor.trim)
    pen.line(tall, mix(decor.cloth, DARK, 0.75), 0.05)
    brim = oval(0, 0.0, 0.58, 0.11)
    pen.fill(brim, decor.cloth)
    pen.line(brim, mix(decor.cloth, DARK, 0.75), 0.05)


def _bloom(pen: Pen, decor: Decor) -> None:
    """A large flower."""
    ring = ((0, -0.3), (0.29, -0.09), (0.18, 0.25), (-0.18, 0.25), (-0.29, -0.09))
    for x, y in ring:
        pen.fill(oval(x, y, 0.25), mix(decor.cloth, DARK, 0.6))
    for x, y in ring:
        pen.fill(oval(x, y, 0.2), decor.cloth)
    pen.fill(oval(0, 0, 0.19), decor.trim)


def _sprout(pen: Pen, decor: Decor) -> None:
    """Two leaves on a stem."""
    pen.line(path("M0 6 Q2 -16 0 -34"), hexa("3c7d3a"), 0.1)
    for side in (-1, 1):
        with pen.moved(0, -0.32, stretch=(side, 1)):
            leaf = smooth([(0, 0), (0.2, -0.28), (0.54, -0.3), (0.34, -0.02)])
            pen.fill(leaf, hexa("6cc04a"))
            pen.line(leaf, hexa("2c5d2c"), 0.05)


Draw = Callable[[Pen, Decor], None]

EMBLEMS: dict[str, Draw] = {
    "star": _star,
    "heart": _heart,
    "letter": _letter,
    "eye": _eye,
    "smiley": _smiley,
    "bolt": _bolt,
    "moon": _moon,
    "flower": _flower,
    "cross": _cross,
    "drop": _drop,
}
FACES: dict[str, Draw] = {"happy": _happy, "cyclops": _cyclops, "sleepy": _sleepy, "grin": _grin}
ACCESSORIES: dict[str, Draw] = {
    "bow": _bow,
    "bloom": _bloom,
    "sprout": _sprout,
    "crown": _crown,
    "party hat": _party_hat,
    "top hat": _top_hat,
}
# Letters that stay apart when they are 30 px high and a little blurred.
LETTERS: dict[str, tuple[str, ...]] = {
    "A": ("M-36 54 L0 -54 L36 54", "M-22 18 L22 18"),
    "E": ("M32 -52 L-30 -52 L-30 52 L32 52", "M-30 0 L22 0"),
    "H": ("M-34 -54 L-34 54", "M34 -54 L34 54", "M-34 0 L34 0"),
    "K": ("M-30 -54 L-30 54", "M34 -54 L-28 4 L36 54"),
    "M": ("M-42 52 L-42 -52 L0 14 L42 -52 L42 52",),
    "R": ("M-30 54 L-30 -52 C44 -60 44 10 -28 4", "M-4 6 L34 54"),
    "S": ("M34 -36 C16 -66 -38 -56 -32 -22 C-26 8 40 -4 34 28 C28 62 -24 62 -38 34",),
    "T": ("M-40 -50 L40 -50", "M0 -50 L0 54"),
    "X": ("M-36 -52 L36 52", "M36 -52 L-36 52"),
    "Z": ("M-34 -50 L34 -50 L-34 50 L34 50",),
    "3": ("M-32 -42 C4 -76 52 -20 -6 -4 C62 12 14 76 -36 42",),
    "7": ("M-34 -50 L36 -50 L-8 54",),
}
