"""Things that hold something: mug, teapot, bowl, vase, can and candle.

An object stands on y = 0 and is at most 1 wide and 1 high; paths are in hundredths.
"""

from __future__ import annotations

from ..artist import INK_WIDTH, Artist
from ..palette import RGB, WHITE, hexa, mix
from ..pen import down, oval, path, smooth

METAL: RGB = hexa("c9ced8")
FLAME: RGB = hexa("ffb52e")
LEAF: RGB = hexa("4f9a46")


def mug(art: Artist) -> None:
    """A mug of coffee with a round handle."""
    lift = art.rng.uniform(6, 9.5)
    art.rod(path("M26 -62 C58 -70 60 -14 22 -19"), 0.105)
    body = path(
        f"M-44 -78 L-40 -12 Q-39 -1 -30 1 Q-8 {lift / 2 + 2} 14 1 Q23 -1 24 -12 L28 -78 "
        f"C28 {-78 + lift} -44 {-78 + lift} -44 -78 Z"
    )
    art.part(body, form="tube", clad=True, sag=0.05)
    art.mark(-0.08, -0.37, 0.225)
    art.glint(-0.08 + 0.24 * art.side, -0.42, 0.03, 0.2, 3 * -art.side)
    rim = oval(-0.08, -0.78, 0.36, lift / 100)
    art.part(rim, art.look.main, form="slab")
    inner = oval(-0.08, -0.78, 0.305, lift / 100 * 0.78)
    art.fill(inner, mix(art.look.main, hexa("2a1710"), 0.6))
    with art.clip(inner):
        art.fill(oval(-0.08, -0.755, 0.29, lift / 100 * 0.7), hexa("5b3319"))
        art.fill(oval(-0.14, -0.745, 0.12, 0.016), hexa("a26a3d"), 0.8)
    art.line(inner, art.ink, INK_WIDTH * 0.7)
    art.wear(0.06, -0.66, 0.3)


def teapot(art: Artist) -> None:
    """A round pot with spout, lid and handle."""
    art.rod(path("M26 -50 C58 -62 56 -8 24 -14"), 0.075)
    spout = path(
        "M-24 -36 C-36 -34 -36 -52 -47 -60 L-50 -57 C-52 -54 -47 -51 -46 -44 C-44 -24 -36 -14 "
        "-22 -14 Z"
    )
    art.part(spout, form="slab")
    art.part(path("M-17 -5 L-19 1 Q0 6 21 1 L19 -5 Z"), art.deep, form="tube")
    lid = path("M-17 -63 C-15 -76 19 -76 21 -63 Z")
    body = path(
        "M2 -66 C26 -66 36 -48 36 -32 C36 -12 22 -2 2 -2 C-18 -2 -32 -12 -32 -32 "
        "C-32 -48 -22 -66 2 -66 Z"
    )
    art.part(body, clad=True, sag=0.06)
    art.part(lid, form="ball")
    art.part(oval(0.02, -0.76, 0.05, 0.045), art.look.main)
    art.crease(path("M-20 -61 Q2 -54 24 -61"), INK_WIDTH * 1.1)
    art.mark(0.02, -0.31, 0.215)
    art.glint(0.02 + 0.19 * art.side, -0.49, 0.075, 0.045, 30 * art.side)
    art.wear(0.02, -0.76, 0.3)


def bowl(art: Artist) -> None:
    """A bowl of fruit."""
    art.part(path("M-17 -6 L-20 0 Q0 6 20 0 L17 -6 Z"), art.deep, form="tube")
    fruit = [(-0.27, -0.43, 0.125, "8bbf3f"), (0.27, -0.43, 0.12, "e0503c")]
    fruit += [(0.0, -0.46, 0.15, "f29a35")]
    for x, y, radius, code in fruit:
        art.part(oval(x, y, radius), hexa(code))
    art.line(path("M-27 -55 Q-26 -60 -22 -61"), hexa("5a3a1d"), 0.02)
    art.fill(smooth([(0.27, -0.54), (0.33, -0.61), (0.38, -0.6), (0.34, -0.55)]), LEAF)
    shell = path("M-50 -40 C-48 -14 -32 -3 0 -3 C32 -3 48 -14 50 -40 Q0 -27 -50 -40 Z")
    art.part(shell, clad=True, sag=0.08, area=(-0.5, -0.5, 0.5, -0.03), form="tube")
    lip = path("M-50 -40 Q0 -27 50 -40 L49 -34 Q0 -20 -49 -34 Z")
    art.part(lip, mix(art.look.main, WHITE, 0.18), form="tube")
    art.mark(0, -0.185, 0.15)
    art.glint(0.3 * art.side, -0.22, 0.035, 0.085, 24 * art.side)
    art.wear(0.33, -0.33, 0.24)


def vase(art: Artist) -> None:
    """A bellied vase with three flowers."""
    sway = art.rng.uniform(-2, 2)
    stems = ((-18, -80), (sway, -88), (18, -79))
    for x, y in stems:
        art.line(path(f"M{x * 0.1} -46 Q{x * 0.3} {y * 0.75} {x} {y}"), hexa("3c7d3a"), 0.026)
    for side in (-1, 1):
        leaf = smooth(
            [(0.02 * side, -0.56), (0.13 * side, -0.68), (0.27 * side, -0.66), (0.15 * side, -0.57)]
        )
        art.fill(leaf, LEAF)
    for (x, y), code in zip(stems, ("f7d154", "f4f1ea", "f28b82"), strict=True):
        _daisy(art, x / 100, y / 100, 0.118, hexa(code))
    body = path(
        "M-11 -56 C-9 -47 -10 -44 -17 -40 C-29 -33 -31 -21 -27 -12 C-24 -4 -18 1 -13 1 Q0 4 13 1 "
        "C18 1 24 -4 27 -12 C31 -21 29 -33 17 -40 C10 -44 9 -47 11 -56 Q0 -53 -11 -56 Z"
    )
    art.part(body, clad=True, sag=0.05)
    art.part(oval(0, -0.56, 0.125, 0.028), art.look.main, form="slab")
    art.fill(oval(0, -0.56, 0.085, 0.014), mix(art.look.main, hexa("1a1020"), 0.7))
    art.mark(0, -0.205, 0.185)
    art.glint(0.15 * art.side, -0.26, 0.03, 0.08, 14 * art.side)
    art.wear(0, -0.44, 0.3)


def _daisy(art: Artist, x: float, y: float, radius: float, petal: RGB) -> None:
    """Draw a round flower with six petals."""
    ring = ((0, -1), (0.87, -0.5), (0.87, 0.5), (0, 1), (-0.87, 0.5), (-0.87, -0.5))
    spread = 0.6 * radius
    for across, along in ring:
        art.line(
            oval(x + across * spread, y + along * spread, radius * 0.4),
            mix(petal, hexa("7a3b2a"), 0.6),
            0.02,
        )
    for across, along in ring:
        art.fill(oval(x + across * spread, y + along * spread, radius * 0.44), petal)
    art.fill(oval(x, y, radius * 0.4), hexa("d9822b"))


def can(art: Artist) -> None:
    """A drinks can with bright rims and a ring to pull."""
    lift = art.rng.uniform(4.5, 6.5)
    art.part(
        path(f"M-24 -7 L-20 0 Q0 {lift + 1} 20 0 L24 -7 Q0 {lift - 4} -24 -7 Z"), METAL, "tube"
    )
    art.part(
        path(f"M-27 -86 L-22 -94 Q0 {-94 + lift} 22 -94 L27 -86 Q0 {-86 + lift} -27 -86 Z"),
        METAL,
        "tube",
    )
    body = path(
        f"M-27 -86 L-27 -11 Q-26 -7 -24 -6 Q0 {lift - 2} 24 -6 Q26 -7 27 -11 L27 -86 "
        f"Q0 {-85 + lift} -27 -86 Z"
    )
    art.part(body, form="tube", clad=True, sag=0.045)
    art.part(oval(0, -0.94, 0.225, lift / 100), mix(METAL, WHITE, 0.3), form="slab")
    art.fill(oval(0, -0.937, 0.17, lift / 100 * 0.66), mix(METAL, hexa("39404f"), 0.35))
    art.line(oval(0.02, -0.945, 0.055, 0.018), hexa("eef1f6"), 0.02)
    art.mark(0, -0.45, 0.215)
    art.glint(0.17 * art.side, -0.46, 0.022, 0.26)
    art.wear(0, -0.76, 0.3)


def candle(art: Artist) -> None:
    """A thick burning candle on a brass dish."""
    art.part(path("M-40 -9 C-36 -1 -24 2 0 2 C24 2 36 -1 40 -9 Z"), hexa("c9973f"), "tube")
    art.part(oval(0, -0.09, 0.4, 0.065), hexa("e3b75c"), form="slab")
    art.glow(0, -0.86, 0.42, hexa("ffd98a"), 0.55)
    lean = art.rng.uniform(-1.5, 1.5)
    body = path("M-22 -66 L-22 -11 Q0 -3 22 -11 L22 -66 Q0 -59 -22 -66 Z")
    art.part(body, form="tube", clad=True, sag=0.05)
    art.part(oval(0, -0.66, 0.22, 0.05), mix(art.look.main, WHITE, 0.25), form="slab")
    drip = path("M-22 -66 L-22 -50 Q-18 -42 -14 -50 L-13 -57 Q-9 -52 -6 -61 Z")
    art.part(drip, mix(art.look.main, WHITE, 0.22), form="slab", ink=False)
    art.fill(oval(0, -0.662, 0.13, 0.026), hexa("ffe2a0"), 0.85)
    art.line(path(f"M0 -66 L{lean * 0.3} -73"), hexa("3a2618"), 0.022)
    flame = path(f"M0 -69 C-13 -72 -12 -84 {lean} -99 C12 -84 13 -72 0 -69 Z")
    art.fill(flame, down(-0.99, -0.69, hexa("ff8a1f"), FLAME, hexa("ffd75e")))
    art.fill(path(f"M0 -70 C-6 -72 -6 -79 {lean * 0.5} -87 C6 -79 6 -72 0 -70 Z"), hexa("fff6cf"))
    art.mark(0, -0.36, 0.185)
    art.wear(0, -0.55, 0.34)
