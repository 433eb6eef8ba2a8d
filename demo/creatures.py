"""Animals, plants and landmarks, drawn like everything in things.py."""

from __future__ import annotations

import itertools
import math

import numpy as np

from demo.pen import BLACK, LAMP, WHITE, Color, Pen, darker, lighter

ARC = tuple(math.pi / 2 * step / 6 for step in range(7))


def _legs(pen: Pen, *, xs: tuple[float, ...], top: float, width: float, color: Color) -> None:
    for number, x in enumerate(xs):
        fill = darker(color, 0.3) if number % 2 else color
        pen.line([(x, width / 2), (x, top)], width, fill)


def draw_dog(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A dog from its side: snout, hanging ear, raised tail, collar."""
    collar = ((210, 50, 46), (50, 110, 200), (240, 200, 60))[rng.integers(3)]
    pen.line([(-0.52, 0.52), (-0.68, 0.66), (-0.7, 0.84)], 0.09, color)
    _legs(pen, xs=(-0.42, -0.3, 0.22, 0.34), top=0.4, width=0.11, color=color)
    pen.ellipse(-0.32, 0.47, 0.24, 0.18, color)
    pen.ellipse(0.2, 0.49, 0.22, 0.2, color)
    pen.box(-0.34, 0.32, 0.2, 0.64, color)
    pen.polygon([(0.1, 0.58), (0.4, 0.48), (0.56, 0.76), (0.24, 0.82)], color)
    pen.line([(0.2, 0.64), (0.44, 0.58)], 0.06, collar)
    pen.disc(0.42, 0.8, 0.19, color)
    pen.ellipse(0.64, 0.74, 0.17, 0.1, lighter(color, 0.18))
    pen.disc(0.79, 0.78, 0.05, BLACK)
    pen.disc(0.5, 0.85, 0.032, BLACK)
    pen.ellipse(0.3, 0.76, 0.085, 0.19, darker(color, 0.4))


def draw_cat(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A cat that sits and faces us: pointed ears, whiskers, curled tail."""
    eyes, is_striped = ((120, 190, 70), (240, 190, 50))[rng.integers(2)], rng.random() < 0.5
    dark = darker(color, 0.35)
    pen.line([(0.18, 0.06), (0.42, 0.08), (0.46, 0.24), (0.38, 0.36)], 0.085, dark)
    pen.ellipse(0.0, 0.24, 0.27, 0.24, color)
    pen.polygon([(-0.22, 0.3), (0.22, 0.3), (0.14, 0.6), (-0.14, 0.6)], color)
    pen.ellipse(0.0, 0.26, 0.12, 0.2, lighter(color, 0.4))
    for x in (-0.1, 0.1):
        pen.ellipse(x, 0.05, 0.085, 0.05, lighter(color, 0.25))
    for side in (-1, 1):
        pen.polygon([(0.27 * side, 0.72), (0.25 * side, 1.0), (0.06 * side, 0.87)], color)
        pen.polygon([(0.22 * side, 0.78), (0.22 * side, 0.93), (0.1 * side, 0.86)], (236, 160, 160))
    pen.ellipse(0.0, 0.7, 0.28, 0.22, color)
    if is_striped:
        for x in (-0.07, 0.0, 0.07):
            pen.line([(x, 0.82), (x, 0.89)], 0.025, dark)
    pen.ellipse(0.0, 0.62, 0.13, 0.09, lighter(color, 0.45))
    for side in (-1, 1):
        pen.ellipse(0.12 * side, 0.73, 0.055, 0.06, eyes)
        pen.ellipse(0.12 * side, 0.73, 0.022, 0.055, BLACK)
        pen.line([(0.12 * side, 0.63), (0.34 * side, 0.66)], 0.012, WHITE)
        pen.line([(0.12 * side, 0.6), (0.34 * side, 0.57)], 0.012, WHITE)
    pen.polygon([(-0.04, 0.66), (0.04, 0.66), (0.0, 0.61)], (226, 110, 120))


def draw_cow(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A cow from its side: patches, horns, pink muzzle and udder."""
    patch = WHITE if sum(color) < 560 else (70, 52, 46)
    pen.line([(-0.68, 0.74), (-0.76, 0.5), (-0.74, 0.34)], 0.045, color)
    pen.disc(-0.74, 0.3, 0.05, darker(patch, 0.2))
    _legs(pen, xs=(-0.54, -0.4, 0.26, 0.4), top=0.4, width=0.12, color=color)
    pen.ellipse(-0.26, 0.33, 0.14, 0.1, (244, 170, 170))
    pen.ellipse(-0.46, 0.57, 0.24, 0.23, color)
    pen.ellipse(0.3, 0.57, 0.24, 0.23, color)
    pen.box(-0.46, 0.34, 0.3, 0.8, color)
    for x, y, wide in ((-0.4, 0.64, 0.14), (0.02, 0.5, 0.14), (0.2, 0.7, 0.1)):
        pen.ellipse(x + 0.06 * rng.random(), y, wide, 0.74 * wide, patch)
    pen.polygon([(0.26, 0.76), (0.46, 0.5), (0.68, 0.66), (0.56, 0.92)], color)
    for x in (0.52, 0.72):
        pen.line([(x, 0.92), (x + 0.03, 1.0)], 0.05, (232, 220, 190))
    pen.ellipse(0.46, 0.87, 0.1, 0.045, darker(color, 0.2))
    pen.ellipse(0.66, 0.78, 0.16, 0.17, color)
    pen.ellipse(0.78, 0.69, 0.12, 0.1, (244, 176, 172))
    pen.disc(0.82, 0.71, 0.022, BLACK)
    pen.disc(0.68, 0.84, 0.03, BLACK)


def draw_sheep(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A sheep from its side: a cloud of wool, a dark face."""
    face = (64, 56, 56) if sum(color) > 300 else (190, 170, 150)
    _legs(pen, xs=(-0.32, -0.2, 0.16, 0.28), top=0.36, width=0.1, color=face)
    ring = [(-0.02 + 0.42 * math.cos(k * 0.7), 0.6 + 0.24 * math.sin(k * 0.7)) for k in range(9)]
    for x, y in ring:
        pen.disc(x, y, 0.17, darker(color, 0.13))
    pen.ellipse(0.0, 0.6, 0.44, 0.26, color)
    for x, y in ring:
        pen.disc(x + 0.02 * pen.sun_side, y + 0.035, 0.125, color)
    pen.ellipse(0.5, 0.7, 0.15, 0.19, face)
    pen.ellipse(0.36, 0.76, 0.1, 0.045, face)
    pen.disc(0.46, 0.87, 0.11, color)
    pen.disc(0.56, 0.74, 0.03, WHITE)


def draw_flower(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A flower: a ring of equal petals on a stem with two leaves."""
    num_petals, green = int(rng.integers(6, 9)), (64, 140, 60)
    heart = (120, 72, 36) if sum(color) > 460 and color[2] < 120 else (250, 208, 66)
    pen.line([(0.0, 0.0), (0.02, 0.3), (0.0, 0.64)], 0.05, green)
    pen.polygon([(0.01, 0.12), (0.12, 0.32), (0.3, 0.36), (0.2, 0.18)], green)
    pen.polygon([(0.01, 0.06), (-0.12, 0.26), (-0.3, 0.28), (-0.2, 0.12)], darker(green, 0.15))
    for petal in range(num_petals):
        angle = 2 * math.pi * (petal + 0.25) / num_petals
        shade = darker(color, 0.12) if petal % 2 else color
        pen.disc(0.2 * math.cos(angle), 0.69 + 0.2 * math.sin(angle), 0.105, shade)
    pen.disc(0.0, 0.69, 0.16, color)
    pen.disc(0.0, 0.69, 0.11, heart)


def draw_lighthouse(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A white tower with bands of the named colour, a gallery and a lamp."""
    num_bands = 5 if rng.random() < 0.5 else 7

    def half(y: float) -> float:
        return 0.17 - 0.07 * y / 0.74

    for band in range(num_bands):
        low, high = 0.74 * band / num_bands, 0.74 * (band + 1) / num_bands
        fill = WHITE if band % 2 else color
        pen.polygon([(-half(low), low), (half(low), low), (half(high), high), (-half(high), high)],
                    fill)  # fmt: skip
        edge = -pen.sun_side
        pen.polygon([(half(low) * edge, low), (half(low) * 0.5 * edge, low),
                     (half(high) * 0.5 * edge, high), (half(high) * edge, high)],
                    darker(fill, 0.16))  # fmt: skip
    pen.box(-0.045, 0.0, 0.045, 0.11, darker(color, 0.6))
    pen.box(-0.15, 0.74, 0.15, 0.78, BLACK)
    pen.box(-0.08, 0.78, 0.08, 0.88, LAMP)
    for x in (-0.08, 0.0, 0.08):
        pen.line([(x, 0.78), (x, 0.88)], 0.014, BLACK)
    pen.polygon([(-0.12, 0.88), (0.12, 0.88), (0.0, 1.0)], darker(color, 0.2))


def draw_windmill(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A windmill: a tapering tower, a cap, four sails at right angles."""
    turn = rng.random() * math.pi / 2
    pen.polygon([(-0.2, 0.0), (0.2, 0.0), (0.12, 0.58), (-0.12, 0.58)], color)
    edge = -pen.sun_side
    pen.polygon([(0.2 * edge, 0.0), (0.08 * edge, 0.0), (0.05 * edge, 0.58), (0.12 * edge, 0.58)],
                darker(color, 0.14))  # fmt: skip
    pen.polygon([(-0.15, 0.57), (0.15, 0.57), (0.09, 0.7), (-0.09, 0.7)], (130, 60, 48))
    pen.box(-0.05, 0.0, 0.05, 0.15, (84, 58, 40))
    pen.box(-0.035, 0.32, 0.035, 0.42, LAMP if pen.is_dark else (90, 120, 140))
    for blade in range(4):
        angle = turn + blade * math.pi / 2
        cos, sin = math.cos(angle), math.sin(angle)
        tip = (0.4 * cos, 0.6 + 0.4 * sin)
        across = (-0.11 * sin, 0.11 * cos)
        hub = (0.1 * cos, 0.6 + 0.1 * sin)
        cloth = [hub, tip, *((x + across[0], y + across[1]) for x, y in (tip, hub))]
        pen.polygon(cloth, (236, 226, 204))
        pen.line([(0.0, 0.6), tip], 0.03, (92, 66, 46))
    pen.disc(0.0, 0.6, 0.04, (70, 50, 38))


def draw_snowman(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A snowman; the colour is that of scarf and hat band."""
    snow = (244, 248, 252)
    for side in (-1, 1):
        pen.line([(0.15 * side, 0.5), (0.4 * side, 0.64)], 0.03, (92, 64, 44))
    for y, radius in ((0.22, 0.25), (0.52, 0.18)):
        pen.disc(0.0, y, radius, darker(snow, 0.16))
        pen.disc(0.03 * pen.sun_side, y + 0.01, radius * 0.88, snow)
    pen.disc(0.0, 0.75, 0.14, darker(snow, 0.1))
    pen.disc(0.015 * pen.sun_side, 0.755, 0.125, snow)
    pen.line([(-0.13, 0.63), (0.13, 0.63)], 0.07, color)
    pen.line([(0.1, 0.62), (0.13, 0.46)], 0.06, darker(color, 0.15))
    pen.box(-0.2, 0.85, 0.2, 0.885, BLACK)
    pen.box(-0.12, 0.88, 0.12, 1.0, BLACK)
    pen.box(-0.12, 0.885, 0.12, 0.92, color)
    for x in (-0.05, 0.05):
        pen.disc(x, 0.79, 0.02, BLACK)
    for y in (0.5, 0.38, 0.28):
        pen.disc(0.0, y, 0.02, BLACK)
    pen.polygon([(0.0, 0.77), (0.0, 0.72), (0.17, 0.735)], (240, 130, 40))


def draw_umbrella(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A beach umbrella with equal segments in two colours."""
    other = WHITE if sum(color) < 620 else (70, 140, 200)
    pen.line([(0.0, 0.0), (0.0, 0.95)], 0.04, (150, 110, 76))
    # Ribs are meridians: from the tip to the rim, crowding towards the two ends.
    ribs = [
        [(-0.6 * math.cos(math.pi * rib / 6) * math.sin(t), 0.55 + 0.42 * math.cos(t)) for t in ARC]
        for rib in range(7)
    ]
    for segment, (left, right) in enumerate(itertools.pairwise(ribs)):
        pen.polygon([*left, *reversed(right)], other if segment % 2 else color)
    pen.disc(0.0, 0.98, 0.025, (150, 110, 76))


def draw_fence(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A picket fence: equal pickets on two rails."""
    num_pickets = int(rng.integers(7, 10))
    for y in (0.28, 0.66):
        pen.box(-0.34 * num_pickets / 2, y, 0.34 * num_pickets / 2, y + 0.12, darker(color, 0.2))
    for picket in range(num_pickets):
        x = 0.34 * (picket - (num_pickets - 1) / 2)
        left, right = x - 0.09, x + 0.09
        pen.polygon([(left, 0.0), (right, 0.0), (right, 0.86), (x, 1.0), (left, 0.86)], color)
