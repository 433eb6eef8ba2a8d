"""Buildings, trees, people and vehicles: one function draws one thing.

Every function draws in thing units (height 1, foot at the origin, looking to the right) with
`color` as the colour that captions name. Random numbers only choose between looks that a stranger
would still call by the same name.
"""

from __future__ import annotations

import math

import numpy as np

from demo.pen import BLACK, LAMP, WHITE, Color, Pen, darker, lighter, mix

PANE, PALE_PANE = (126, 176, 206), (176, 212, 230)
WOOD, RUBBER, METAL = (112, 76, 48), (38, 38, 42), (196, 200, 204)
SKINS: tuple[Color, ...] = ((250, 214, 184), (226, 176, 136), (160, 108, 72), (104, 68, 48))
HAIRS: tuple[Color, ...] = ((48, 36, 30), (110, 70, 38), (226, 188, 96), (150, 62, 34))
TROUSERS: tuple[Color, ...] = ((48, 62, 104), (70, 64, 60), (120, 104, 82), (36, 40, 48))
ROOFS: tuple[Color, ...] = ((160, 66, 48), (92, 74, 70), (84, 96, 120), (128, 60, 56))


def draw_house(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A gabled house: door in the middle, windows in equal rows on both sides."""
    half, eaves, roof = 0.5, 0.6, ROOFS[rng.integers(len(ROOFS))]
    is_tall, has_chimney = rng.random() < 0.4, rng.random() < 0.6
    if has_chimney:
        pen.box(0.22, 0.7, 0.34, 0.98, darker(roof, 0.25))
    pen.box(-half, 0.0, half, eaves, color)
    shade_from, shade_to = sorted((0.3 * -pen.sun_side, half * -pen.sun_side))
    pen.box(shade_from, 0.0, shade_to, eaves, darker(color, 0.1))
    pen.box(-half, 0.0, half, 0.05, darker(color, 0.35))
    peak = [(0.0, 1.0)] if rng.random() < 0.6 else [(-0.3, 0.95), (0.3, 0.95)]
    pen.polygon([(-half - 0.08, eaves - 0.03), *peak, (half + 0.08, eaves - 0.03)], roof)
    pen.line([(-half - 0.06, eaves - 0.02), (half + 0.06, eaves - 0.02)], 0.03, darker(roof, 0.3))
    pen.box(-0.09, 0.0, 0.09, 0.3, darker(WOOD, 0.1))
    pen.disc(0.05, 0.14, 0.015, LAMP)
    rows = (0.14, 0.4) if is_tall else (0.24,)
    for bottom in rows:
        for x in (-0.3, 0.3) if bottom < 0.3 else (-0.3, 0.0, 0.3):
            _window(pen, x=x, bottom=bottom, half=0.09, height=0.15 if is_tall else 0.2)


def _window(pen: Pen, *, x: float, bottom: float, half: float, height: float) -> None:
    pane = LAMP if pen.is_dark else PANE
    pen.box(x - half, bottom, x + half, bottom + height, WHITE)
    for left in (x - half + 0.02, x + 0.01):
        pen.box(left, bottom + 0.02, left + half - 0.03, bottom + height - 0.02, pane)


def draw_building(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A tower block: a grid of equal windows."""
    num_columns, num_rows = int(rng.integers(3, 5)), int(rng.integers(6, 9))
    half, pane = 0.25, PANE if not pen.is_dark else darker(PANE, 0.6)
    if rng.random() < 0.5:
        pen.box(-0.02, 0.9, 0.02, 1.0, METAL)
    pen.box(-half, 0.0, half, 0.92, color)
    shade_from, shade_to = sorted((half * 0.7 * -pen.sun_side, half * -pen.sun_side))
    pen.box(shade_from, 0.0, shade_to, 0.92, darker(color, 0.12))
    pen.box(-half - 0.02, 0.9, half + 0.02, 0.94, darker(color, 0.3))
    step_x, step_y = 2 * half / num_columns, 0.78 / num_rows
    is_lit = rng.random((num_rows, num_columns)) < 0.55
    for row in range(num_rows):
        for column in range(num_columns):
            left, bottom = -half + (column + 0.22) * step_x, 0.11 + (row + 0.2) * step_y
            glass = LAMP if pen.is_dark and is_lit[row, column] else pane
            pen.box(left, bottom, left + 0.56 * step_x, bottom + 0.62 * step_y, glass)
    pen.box(-0.06, 0.0, 0.06, 0.09, darker(color, 0.55))


def draw_tree(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A leafy tree or a fir."""
    pen.polygon([(-0.06, 0.0), (0.06, 0.0), (0.035, 0.5), (-0.035, 0.5)], WOOD)
    if rng.random() < 0.4:
        for bottom, half, top in ((0.14, 0.32, 0.56), (0.36, 0.26, 0.78), (0.58, 0.2, 1.0)):
            pen.polygon([(-half, bottom), (half, bottom), (0.0, top)], darker(color, 0.12))
            sunny = half * pen.sun_side
            pen.polygon([(0.0, bottom), (sunny, bottom), (0.0, top)], lighter(color, 0.06))
        return
    pen.line([(0.0, 0.35), (0.14, 0.52)], 0.04, WOOD)
    blobs = [(-0.2, 0.58, 0.19), (0.2, 0.58, 0.19), (0.0, 0.52, 0.2), (-0.12, 0.76, 0.19),
             (0.13, 0.76, 0.19), (0.0, 0.83, 0.17)]  # fmt: skip
    for x, y, radius in blobs:
        pen.disc(x, y, radius, darker(color, 0.14))
    for x, y, radius in blobs:
        pen.disc(x + 0.03 * pen.sun_side, y + 0.03, radius * 0.78, color)
    for x, y, radius in blobs[3:]:
        pen.disc(x + 0.06 * pen.sun_side, y + 0.06, radius * 0.42, lighter(color, 0.16))


def draw_palm(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A palm: a bent trunk and a crown of hanging leaves."""
    bend = 0.1 + 0.1 * rng.random()
    trunk = [(0.0, 0.0), (bend * 0.3, 0.35), (bend, 0.72)]
    pen.line(trunk, 0.07, mix(WOOD, (200, 160, 110), 0.4))
    for angle in (200, 165, 130, 95, 60, 25, -15):
        direction = math.radians(angle)
        tip = (bend + 0.34 * math.cos(direction), 0.66 + 0.3 * math.sin(direction))
        middle = (bend + 0.2 * math.cos(direction), 0.78 + 0.2 * math.sin(direction))
        low = (bend + 0.17 * math.cos(direction), 0.68 + 0.14 * math.sin(direction))
        leaf = color if math.cos(direction) * pen.sun_side > 0 else darker(color, 0.2)
        pen.polygon([(bend, 0.72), middle, tip, low], leaf)
    for x in (-0.03, 0.04):
        pen.disc(bend + x, 0.69, 0.035, darker(WOOD, 0.3))


def draw_person(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A person from the front; the colour is the shirt's or the dress's."""
    skin, hair = SKINS[rng.integers(len(SKINS))], HAIRS[rng.integers(len(HAIRS))]
    trousers, has_dress, waves = TROUSERS[rng.integers(4)], rng.random() < 0.4, rng.random() < 0.4
    legs = skin if has_dress else trousers
    for x in (-0.07, 0.07):
        pen.line([(x, 0.04), (x, 0.4)], 0.1, legs)
        pen.ellipse(x + 0.02, 0.025, 0.07, 0.025, BLACK)
    hand = (0.3, 0.82) if waves else (0.22, 0.4)
    for elbow in ((-0.22, 0.4), hand):
        pen.line([(math.copysign(0.13, elbow[0]), 0.66), elbow], 0.075, color)
        pen.disc(*elbow, 0.042, skin)
    if has_dress:
        pen.disc(0.0, 0.86, 0.145, hair)
        pen.box(-0.145, 0.7, 0.145, 0.86, hair)
        pen.polygon([(-0.24, 0.26), (0.24, 0.26), (0.12, 0.7), (-0.12, 0.7)], color)
    else:
        pen.box(-0.13, 0.36, 0.13, 0.66, color)
        pen.ellipse(0.0, 0.66, 0.13, 0.045, color)
    pen.box(-0.035, 0.66, 0.035, 0.76, darker(skin, 0.12))
    pen.disc(0.0, 0.85, 0.12, skin)
    pen.polygon([(-0.13, 0.86), (-0.11, 0.96), (0.0, 1.0), (0.11, 0.96), (0.13, 0.86), (0.06, 0.91),
                 (-0.06, 0.92)], hair)  # fmt: skip
    for x in (-0.045, 0.045):
        pen.disc(x, 0.85, 0.016, BLACK)
    pen.line([(-0.035, 0.79), (0.035, 0.79)], 0.016, (170, 60, 60))


def draw_car(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A car from its side, two windows, two wheels."""
    is_van = rng.random() < 0.35
    back = -0.86 if is_van else -0.6
    pen.polygon([(back - 0.08, 0.5), (back + 0.06, 1.0), (0.3, 1.0), (0.62, 0.52)], color)
    pane = LAMP if pen.is_dark else PALE_PANE
    pen.polygon([(back + 0.06, 0.56), (back + 0.15, 0.9), (-0.18, 0.9), (-0.18, 0.56)], pane)
    pen.polygon([(-0.08, 0.56), (-0.08, 0.9), (0.24, 0.9), (0.47, 0.56)], pane)
    pen.polygon([(-1.0, 0.2), (-1.02, 0.5), (-0.9, 0.58), (0.62, 0.58), (0.96, 0.48), (1.04, 0.36),
                 (1.02, 0.2)], color)  # fmt: skip
    pen.box(-1.0, 0.18, 1.02, 0.26, darker(color, 0.4))
    pen.line([(-0.13, 0.28), (-0.13, 0.54)], 0.02, darker(color, 0.3))
    pen.box(-0.34, 0.44, -0.22, 0.48, darker(color, 0.45))
    pen.ellipse(0.96, 0.4, 0.06, 0.07, LAMP)
    pen.box(-1.03, 0.36, -0.94, 0.48, (220, 40, 40))
    for x in (-0.58, 0.58):
        _wheel(pen, x=x, radius=0.22)


def _wheel(pen: Pen, *, x: float, radius: float) -> None:
    pen.disc(x, radius, radius, RUBBER)
    pen.disc(x, radius, radius * 0.5, METAL)


def draw_bus(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A bus from its side: a row of equal windows, or two of them."""
    is_double = rng.random() < 0.35
    pane = LAMP if pen.is_dark else PALE_PANE
    pen.box(-0.98, 0.12, 0.98, 0.97, color)
    pen.box(-0.94, 0.94, 0.94, 1.0, darker(color, 0.2))
    pen.box(-0.98, 0.12, 0.98, 0.2, darker(color, 0.4))
    for bottom, top in ((0.3, 0.56), (0.66, 0.88)) if is_double else ((0.48, 0.84),):
        for column in range(5):
            left = -0.9 + column * 0.29
            pen.box(left, bottom, left + 0.23, top, pane)
    pen.box(0.58, 0.16, 0.8, 0.84 if not is_double else 0.56, darker(color, 0.3))
    pen.box(0.61, 0.2, 0.77, 0.8 if not is_double else 0.53, pane)
    pen.box(0.86, 0.44, 0.98, 0.84, pane)
    pen.disc(0.94, 0.27, 0.045, LAMP)
    for x in (-0.56, 0.4):
        _wheel(pen, x=x, radius=0.15)


def draw_train(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A steam engine that pulls equal waggons."""
    pane = LAMP if pen.is_dark else PALE_PANE
    pen.box(-1.9, 0.08, 1.7, 0.16, darker(METAL, 0.6))
    for left in (-1.9, -0.86):
        pen.box(left, 0.16, left + 0.94, 0.74, color)
        pen.box(left - 0.03, 0.7, left + 0.97, 0.8, darker(color, 0.45))
        for start in (left + 0.1, left + 0.37, left + 0.64):
            pen.box(start, 0.38, start + 0.2, 0.62, pane)
        for x in (left + 0.2, left + 0.74):
            _wheel(pen, x=x, radius=0.12)
    pen.box(0.6, 0.18, 1.56, 0.56, darker(color, 0.25))
    pen.disc(1.56, 0.37, 0.19, darker(color, 0.25))
    pen.box(0.18, 0.16, 0.7, 0.9, color)
    pen.box(0.12, 0.86, 0.76, 0.95, darker(color, 0.5))
    pen.box(0.3, 0.54, 0.58, 0.8, pane)
    pen.polygon([(1.28, 0.54), (1.22, 1.0), (1.54, 1.0), (1.48, 0.54)], BLACK)
    pen.disc(0.98, 0.56, 0.1, LAMP)
    pen.polygon([(1.6, 0.06), (1.9, 0.06), (1.6, 0.24)], (200, 50, 44))
    for x, radius in ((0.42, 0.19), (0.9, 0.19), (1.36, 0.14)):
        _wheel(pen, x=x, radius=radius)


def draw_boat(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A sailing boat; the colour is the hull's."""
    sail = (WHITE, (246, 226, 190), (240, 130, 90))[rng.integers(3)]
    pen.box(-0.02, 0.16, 0.02, 1.0, WOOD)
    pen.polygon([(0.05, 0.26), (0.42, 0.26), (0.04, 0.92)], darker(sail, 0.1))
    pen.polygon([(-0.05, 0.26), (-0.36, 0.26), (-0.04, 0.98)], sail)
    pen.polygon([(0.0, 0.94), (0.0, 1.0), (0.13, 0.97)], (214, 60, 50))
    pen.polygon([(-0.5, 0.22), (0.56, 0.22), (0.38, 0.0), (-0.36, 0.0)], color)
    pen.polygon([(-0.5, 0.22), (0.56, 0.22), (0.53, 0.17), (-0.47, 0.17)], lighter(color, 0.55))
    pen.polygon([(-0.39, 0.05), (0.42, 0.05), (0.38, 0.0), (-0.36, 0.0)], darker(color, 0.35))


def draw_airplane(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """An airliner from its side; the colour is that of tail, wing and stripe."""
    hull = WHITE if rng.random() < 0.7 else METAL
    pen.polygon([(-1.2, 0.5), (-1.32, 1.0), (-1.08, 1.0), (-0.66, 0.56)], color)
    pen.polygon([(-0.1, 0.5), (-0.45, 0.86), (-0.28, 0.86), (0.35, 0.5)], darker(color, 0.3))
    pen.ellipse(0.95, 0.42, 0.36, 0.17, hull)
    pen.polygon([(-1.25, 0.56), (0.95, 0.59), (0.95, 0.25), (-0.7, 0.25)], hull)
    pen.polygon([(-1.1, 0.42), (1.24, 0.38), (1.2, 0.32), (-0.95, 0.35)], color)
    pen.polygon([(1.02, 0.56), (1.18, 0.52), (1.25, 0.44), (1.05, 0.44)], (70, 110, 150))
    for column in range(8):
        pen.box(-0.75 + column * 0.2, 0.45, -0.66 + column * 0.2, 0.53, (80, 120, 160))
    pen.polygon([(0.4, 0.34), (-0.12, 0.34), (-0.62, 0.0), (-0.42, 0.0)], color)
    pen.ellipse(0.1, 0.18, 0.16, 0.08, darker(METAL, 0.3))


def draw_balloon(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A hot-air balloon with vertical stripes and a basket."""
    stripe = (WHITE, lighter(color, 0.5), (250, 214, 90))[rng.integers(3)]
    for x in (-0.09, 0.09):
        pen.line([(x * 2.4, 0.38), (x, 0.14)], 0.012, WOOD)
    pen.box(-0.1, 0.0, 0.1, 0.14, (150, 104, 60))
    pen.box(-0.11, 0.12, 0.11, 0.16, (100, 66, 38))
    pen.polygon([(-0.31, 0.5), (0.31, 0.5), (0.1, 0.22), (-0.1, 0.22)], color)
    pen.disc(0.0, 0.66, 0.35, color)
    for half, fill in ((0.22, stripe), (0.09, color)):
        pen.ellipse(0.0, 0.66, half, 0.345, fill)
        pen.polygon([(-half, 0.6), (half, 0.6), (half * 0.35, 0.22), (-half * 0.35, 0.22)], fill)
    pen.ellipse(0.2 * pen.sun_side, 0.8, 0.05, 0.09, lighter(color, 0.45))
    pen.box(-0.1, 0.2, 0.1, 0.24, darker(color, 0.4))


def draw_bird(pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
    """A bird in flight, its wings up."""
    lift = 0.9 + 0.1 * rng.random()
    pen.polygon([(-0.1, 0.36), (-0.5, lift), (-0.16, lift - 0.1), (0.2, 0.4)], darker(color, 0.3))
    pen.polygon([(-0.4, 0.3), (-0.9, 0.42), (-0.86, 0.2), (-0.4, 0.18)], darker(color, 0.15))
    pen.ellipse(-0.05, 0.27, 0.5, 0.19, color)
    pen.ellipse(-0.02, 0.2, 0.34, 0.11, lighter(color, 0.45))
    pen.disc(0.5, 0.4, 0.2, color)
    pen.polygon([(0.64, 0.46), (0.94, 0.37), (0.64, 0.3)], (242, 160, 40))
    pen.disc(0.56, 0.44, 0.045, BLACK)
    pen.polygon([(-0.25, 0.34), (-0.3, lift + 0.0), (0.06, lift - 0.14), (0.22, 0.34)],
                lighter(color, 0.15))  # fmt: skip
