"""Put a thing into a place: background, shadow, the thing in the place's light, foreground."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import skia

from .artist import Artist, Look
from .mood import Light, Mood, Place
from .objects.things import THINGS, Thing
from .palette import INDIGO, RGB, WHITE, mix
from .pen import ON_TOP_ONLY, Pen, box, linear, radial
from .places import PLACES

FRAME = box(-0.5, -0.5, 1.5, 1.5)


@dataclass(frozen=True)
class Pose:
    """How a thing is put: its larger extent, where it stands (as shares of the frame), its lean."""

    scale: float
    x: float
    y: float
    tilt: float
    flip: bool


def paint_scene(
    size: int, thing: str, place: str, look: Look, pose: Pose, seed: int, warmth: float
) -> np.ndarray:
    """Paint one picture; (size, size, 3), 8 bit."""
    pixels = np.zeros((size, size, 4), np.uint8)
    surface = skia.Surface(pixels)
    pen = Pen(surface.getCanvas())
    pen.canvas.scale(size, size)
    scenery, what = PLACES[place], THINGS[thing]
    mood = Mood(seed, look.side, _lamp(look.main))
    scenery.back(pen, mood)
    if scenery.halo:
        _halo(pen, what, look, pose, mood.glow)
    if scenery.ground is not None:
        _shadow(pen, what, pose, scenery.light, look.side)
    with pen.layer():
        _thing(pen, what, look, pose)
        _light(pen, what, pose, scenery, look)
    if scenery.front:
        scenery.front(pen, mood)
    tint = (1.0, 0.82, 0.6) if warmth > 0 else (0.55, 0.7, 1.0)
    pen.wash(tint, 0.08 * abs(warmth))
    surface.flushAndSubmit()
    return pixels[..., :3].copy()


def paint_mask(size: int, thing: str, look: Look, pose: Pose) -> np.ndarray:
    """Return where the thing is, as (size, size) booleans."""
    pixels = np.zeros((size, size, 4), np.uint8)
    surface = skia.Surface(pixels)
    pen = Pen(surface.getCanvas())
    pen.canvas.scale(size, size)
    _thing(pen, THINGS[thing], look, pose)
    surface.flushAndSubmit()
    return pixels[..., 3] > 127


def _lamp(colour: RGB) -> RGB:
    """Return the light that a glowing thing of a colour gives: none is black."""
    return mix(colour, WHITE, 0.35) if max(colour) < 0.45 else mix(colour, WHITE, 0.1)


def _thing(pen: Pen, thing: Thing, look: Look, pose: Pose) -> None:
    """Draw the thing alone."""
    flip = -1 if pose.flip else 1
    with pen.moved(pose.x, pose.y, pose.tilt, (flip * pose.scale, pose.scale)):
        # Seen a little from one side, a thing is narrower and its far side lies higher.
        pen.canvas.skew(0.0, 0.05 * look.yaw)
        pen.canvas.scale(1.0 - 0.06 * abs(look.yaw), 1.0)
        thing.draw(Artist(pen.canvas, look))


def _middle(thing: Thing, pose: Pose) -> tuple[float, float]:
    """Return the middle of the thing in the frame."""
    rise = 0.5 * thing.height * pose.scale
    lean = math.radians(pose.tilt)
    return pose.x + rise * math.sin(lean), pose.y - rise * math.cos(lean)


def _light(pen: Pen, thing: Thing, pose: Pose, place: Place, look: Look) -> None:
    """Let the place's light fall on what the layer holds."""
    light = place.light
    x, _ = _middle(thing, pose)
    half = 0.5 * thing.width * pose.scale
    lit, unlit = x + look.side * half, x - look.side * half
    top, bottom = pose.y - thing.height * pose.scale, pose.y
    stops = [(0.0, light.key, light.key_strength), (0.45, light.key, 0.0), (0.55, light.shade, 0.0)]
    stops.append((1.0, light.shade, light.shade_strength))
    pen.fill(FRAME, linear(lit, top, unlit, bottom, stops), mode=ON_TOP_ONLY)
    if place.ground is not None and not place.halo:
        # Little light reaches what is near the ground.
        near = [(0.0, light.shade, 0.0), (1.0, light.shade, 1.5 * light.shade_strength)]
        pen.fill(FRAME, linear(0, bottom - 0.3 * (bottom - top), 0, bottom, near), mode=ON_TOP_ONLY)
    if place.halo:
        x, y = _middle(thing, pose)
        lamp = mix(_lamp(look.main), WHITE, 0.25)
        stops = [(0.0, lamp, 0.3), (0.6, lamp, 0.14), (1.0, lamp, 0.1)]
        pen.fill(FRAME, radial(x, y, 0.6 * pose.scale, stops), mode=ON_TOP_ONLY)
    if light.edges:
        left, right = light.edges
        strength = light.edge_strength
        stops = [(0.0, left, strength), (0.3, left, 0.0), (0.7, right, 0.0), (1.0, right, strength)]
        pen.fill(FRAME, linear(x - half, 0, x + half, 0, stops), mode=ON_TOP_ONLY)


def _shadow(pen: Pen, thing: Thing, pose: Pose, light: Light, side: float) -> None:
    """Draw the shadow a thing casts on the ground, away from the light."""
    flip = -1 if pose.flip else 1
    x = pose.x + flip * thing.foot_at * pose.scale
    half = thing.foot * pose.scale
    pen.glow(
        x - side * 0.35 * half,
        pose.y + 0.005,
        1.75 * half + 0.04,
        light.shadow,
        light.shadow_strength,
        0.2,
    )
    pen.glow(
        x,
        pose.y,
        1.2 * half + 0.015,
        mix(light.shadow, INDIGO, 0.4),
        light.shadow_strength * 1.3,
        0.1,
    )


def _halo(pen: Pen, thing: Thing, look: Look, pose: Pose, glow: RGB) -> None:
    """Let light come from behind the edges of a glowing thing, in its own outline."""
    for width, colour in ((0.085, glow), (0.022, mix(glow, WHITE, 0.45))):
        paint = skia.Paint()
        light = skia.Color4f(*colour, 1.0).toColor()
        paint.setImageFilter(skia.ImageFilters.DropShadowOnly(0, 0, width, width, light))
        pen.canvas.saveLayer(None, paint)
        _thing(pen, thing, look, pose)
        pen.canvas.restore()
