"""Colours: the ones a prompt can name, any other, and the arithmetic between them.

Colours are triples of sRGB values in 0..1. Choices that an eye has to agree with (is this still
"teal"? do these two differ?) are made in OKLab, where equal distances look equal.
"""

from __future__ import annotations

import math
import random

import numpy as np

RGB = tuple[float, float, float]

WHITE: RGB = (1.0, 1.0, 1.0)
INDIGO: RGB = (0.10, 0.07, 0.20)
# Lightness, chroma and hue (degrees) of every colour word, in OKLCH. Neighbours are kept apart in
# lightness too, so that a warm or a blue light does not turn one into the other.
NAMED: dict[str, tuple[float, float, float]] = {
    "red": (0.56, 0.21, 27),
    "orange": (0.73, 0.17, 57),
    "yellow": (0.88, 0.17, 98),
    "green": (0.60, 0.17, 144),
    "teal": (0.67, 0.11, 192),
    "blue": (0.53, 0.19, 262),
    "purple": (0.50, 0.19, 303),
    "pink": (0.78, 0.13, 355),
    "brown": (0.42, 0.08, 52),
    "black": (0.25, 0.015, 285),
    "white": (0.95, 0.008, 90),
}
COLOURS = tuple(NAMED)

_FROM_LMS = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)
_FROM_LAB = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_TO_LMS = np.linalg.inv(_FROM_LMS)
_TO_LAB = np.linalg.inv(_FROM_LAB)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB in 0..1, colours in the last axis, to OKLab."""
    rgb = np.asarray(rgb, dtype=np.float64)
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


def from_oklch(lightness: float, chroma: float, hue: float) -> RGB:
    """Return the sRGB colour; chroma that a screen cannot show is reduced until it can."""
    angle = math.radians(hue)
    direction = np.array([math.cos(angle), math.sin(angle)])

    def light(chroma: float) -> np.ndarray:
        return _FROM_LMS @ (_FROM_LAB @ np.array([lightness, *(chroma * direction)])) ** 3

    linear = light(chroma)
    while chroma > 1e-3 and (linear.min() < -1e-3 or linear.max() > 1.001):
        chroma *= 0.94
        linear = light(chroma)
    linear = linear.clip(0, 1)
    red, green, blue = np.where(
        linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, linear * 12.92
    )
    return float(red), float(green), float(blue)


def difference(first: RGB, second: RGB) -> float:
    """How different two colours look; 0.1 is clear, black and white are 1 apart."""
    return float(np.linalg.norm(oklab(np.array(first)) - oklab(np.array(second))))


def named_colour(name: str, rng: random.Random) -> RGB:
    """Return one of the colours that a word covers."""
    lightness, chroma, hue = NAMED[name]
    return from_oklch(
        min(lightness + rng.uniform(-0.035, 0.035), 0.97),
        chroma * rng.uniform(0.88, 1.06),
        hue + rng.uniform(-6, 6),
    )


def any_colour(rng: random.Random, least_chroma: float = 0.0) -> RGB:
    """Return a colour from the whole space, greys and deep tones included if no chroma is asked."""
    return from_oklch(rng.uniform(0.3, 0.93), rng.uniform(least_chroma, 0.24), rng.uniform(0, 360))


def apart_from(
    others: tuple[RGB, ...], least: float, rng: random.Random, least_chroma: float = 0.0
) -> RGB:
    """Return any colour that looks at least so different from all the others."""
    colour = any_colour(rng, least_chroma)
    while any(difference(colour, other) < least for other in others):
        colour = any_colour(rng, least_chroma)
        # Three colours may leave no such room; then a little less must do.
        least *= 0.995
    return colour


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """Return the first colour with a share of the second in it."""
    keep = 1.0 - share
    return (
        first[0] * keep + second[0] * share,
        first[1] * keep + second[1] * share,
        first[2] * keep + second[2] * share,
    )


def hexa(code: str) -> RGB:
    """Return the colour of a six-digit code."""
    return int(code[:2], 16) / 255, int(code[2:4], 16) / 255, int(code[4:], 16) / 255


def is_dark(colour: RGB) -> bool:
    """Tell whether dark lines would be lost on the colour."""
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 0.25
