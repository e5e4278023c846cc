"""Cat and dog, sitting and looking at us."""

from __future__ import annotations

from ..artist import INK_WIDTH, Artist
from ..palette import RGB, WHITE, hexa, is_dark, mix
from ..pen import oval, path

PUPIL: RGB = hexa("241a2e")
ROSE: RGB = hexa("f29aa5")


def cat(art: Artist) -> None:
    """A cat with large ears and a tail that curls round."""
    side = art.rng.choice((-1, 1))
    tail = path(
        f"M{20 * side} -8 C{48 * side} 0 {50 * side} -30 {39 * side} -34 "
        f"C{31 * side} -37 {30 * side} -26 {36 * side} -24"
    )
    art.rod(tail, 0.085)
    body = path(
        "M-17 -52 C-31 -40 -35 -18 -31 -5 Q-29 1 -20 1 L20 1 Q29 1 31 -5 C35 -18 31 -40 17 -52 Z"
    )
    art.part(body, clad=True)
    if art.look.decor is None:
        art.fill(oval(0, -0.2, 0.125, 0.19), art.light)
    for x in (-0.13, 0.13):
        art.part(oval(x, -0.035, 0.095, 0.055), art.light, form="slab")
    art.mark(0, -0.24, 0.165)
    turn = 2 * art.look.yaw
    _cat_head(art, turn)
    art.wear(turn / 100, -0.865, 0.4)


def _cat_head(art: Artist, turn: float) -> None:
    """Draw the head, its features moved sideways by a turn in hundredths."""
    head = path(
        "M-33 -96 Q-36 -100 -31 -99 L-13 -86 Q0 -89 13 -86 L31 -99 Q36 -100 33 -96 L34 -72 "
        "C38 -58 24 -42 0 -42 C-24 -42 -38 -58 -34 -72 Z"
    )
    art.part(head, clad=True, area=(-0.36, -1.0, 0.36, -0.42))
    for side in (-1, 1):
        ear = f"M{29 * side} -92 L{18 * side} -83 L{29 * side} -76 Z"
        art.fill(path(ear), ROSE)
    with art.moved(turn / 100):
        art.fill(path("M0 -64 C22 -64 22 -44 0 -44 C-22 -44 -22 -64 0 -64 Z"), art.light)
        iris = hexa("9ad14b") if art.rng.random() < 0.5 else hexa("f2c33c")
        if art.look.decor:
            # One animal has the same eyes in all its pictures.
            iris = mix(art.look.decor.figure, WHITE, 0.25)
        for x in (-0.155, 0.155):
            art.fill(oval(x, -0.685, 0.088, 0.094), PUPIL)
            art.fill(oval(x, -0.685, 0.073, 0.079), iris)
            art.fill(oval(x, -0.685, 0.036, 0.07), PUPIL)
            art.fill(oval(x - 0.022, -0.715, 0.022), WHITE)
        art.fill(path("M-5 -59.5 Q0 -62 5 -59.5 Q3 -54 0 -54 Q-3 -54 -5 -59.5 Z"), hexa("e0697c"))
        mouth = path("M-9 -51 Q-5 -46 0 -52 Q5 -46 9 -51")
        art.line(mouth, art.ink_of(art.light), INK_WIDTH * 1.1)
        for side in (-1, 1):
            for y, drop in ((-57, -1), (-53, 2)):
                whisker = path(f"M{22 * side} {y} L{38 * side} {y + drop}")
                art.line(whisker, WHITE if is_dark(art.look.main) else art.ink, 0.012, 0.8)


def dog(art: Artist) -> None:
    """A dog with hanging ears, a large snout and a collar."""
    side = art.rng.choice((-1, 1))
    tail = path(f"M{24 * side} -10 C{40 * side} -12 {44 * side} -24 {40 * side} -36")
    art.rod(tail, 0.08)
    body = path(
        "M-16 -50 C-30 -38 -36 -18 -32 -5 Q-30 1 -22 1 L22 1 Q30 1 32 -5 C36 -18 30 -38 16 -50 Z"
    )
    art.part(body, clad=True)
    for x in (-1, 1):
        haunch = path(
            f"M{20 * x} -1 C{18 * x} -12 {36 * x} -14 {37 * x} -3 Q{36 * x} 2 {30 * x} 2 "
            f"L{22 * x} 2 Z"
        )
        art.part(haunch, form="ball")
        leg = path(
            f"M{3 * x} -30 L{2 * x} -3 Q{2 * x} 2 {8 * x} 2 L{15 * x} 2 Q{19 * x} 0 "
            f"{17 * x} -5 L{14 * x} -30"
        )
        art.crease(leg)
        art.part(oval(0.1 * x, -0.025, 0.082, 0.05), art.light, form="slab")
    art.mark(0, -0.245, 0.15)
    art.part(path("M-19 -47 Q0 -36 19 -47 L19 -40 Q0 -29 -19 -40 Z"), hexa("d8433b"), form="tube")
    art.part(oval(0, -0.335, 0.045), hexa("f5c33b"))
    turn = 2 * art.look.yaw
    _dog_head(art, turn)
    art.wear(turn / 100, -0.955, 0.4)


def _dog_head(art: Artist, turn: float) -> None:
    """Draw the head, its features moved sideways by a turn in hundredths."""
    head = path(
        "M0 -98 C22 -98 31 -86 31 -70 C31 -52 20 -42 0 -42 C-20 -42 -31 -52 -31 -70 "
        "C-31 -86 -22 -98 0 -98 Z"
    )
    art.part(head, clad=True, area=(-0.34, -1.0, 0.34, -0.42))
    with art.moved(turn / 100):
        art.part(
            path(
                "M0 -72 C16 -72 24 -62 22 -53 C20 -43 10 -41 0 -41 C-10 -41 -20 -43 -22 -53 "
                "C-24 -62 -16 -72 0 -72 Z"
            ),
            art.light,
            form="ball",
            ink=False,
        )
        tongue = path("M-7 -48 Q0 -45 7 -48 L6 -40 Q0 -34 -6 -40 Z")
        art.part(tongue, hexa("f2637e"), form="slab")
        line = art.ink_of(art.light)
        art.line(path("M-14 -52 Q-7 -44 0 -50 Q7 -44 14 -52"), line, INK_WIDTH * 1.15)
        art.line(path("M0 -58 L0 -50"), line, INK_WIDTH)
        art.fill(oval(0, -0.635, 0.085, 0.06), PUPIL)
        art.fill(oval(-0.025, -0.655, 0.03, 0.016), WHITE, 0.75)
        for x in (-0.145, 0.145):
            if is_dark(art.look.main):
                art.fill(oval(x, -0.77, 0.075, 0.083), art.light)
            art.fill(oval(x, -0.77, 0.06, 0.068), PUPIL)
            art.fill(oval(x - 0.018, -0.795, 0.022), WHITE)
    for side in (-1, 1):
        ear = path(
            f"M{17 * side} -95 C{30 * side} -100 {44 * side} -88 {46 * side} -70 "
            f"C{48 * side} -54 {42 * side} -46 {36 * side} -47 C{29 * side} -49 "
            f"{27 * side} -64 {24 * side} -76 C{22 * side} -84 {17 * side} -88 {17 * side} -95 Z"
        )
        art.part(ear, mix(art.look.main, (0.1, 0.05, 0.1), 0.22), form="slab")
