"""A pen that draws a thing twice: its colours on the picture, its number on the label map.

Terms: *picture units* have the picture's side as 1, y down. *Thing units* have the thing's height
as 1, the origin at the middle of its foot, x towards where it looks, y up. The canvas is
`SUPERSAMPLING` times larger than the picture, whose edges come out smooth when it is reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4
Color = tuple[int, int, int]
Point = tuple[float, float]

WHITE, BLACK = (248, 248, 244), (34, 34, 38)
LAMP = (255, 226, 130)  # shines by itself: the night doesn't darken it
COLORS: dict[str, Color] = {
    "red": (205, 48, 44),
    "orange": (236, 132, 36),
    "yellow": (244, 206, 62),
    "green": (62, 148, 68),
    "blue": (48, 104, 196),
    "purple": (132, 76, 168),
    "pink": (240, 142, 172),
    "brown": (136, 88, 52),
    "grey": (140, 144, 150),
    "white": (240, 240, 236),
    "black": (48, 48, 54),
}


def mix(first: Color, second: Color, share: float) -> Color:
    """Blend two colours: share 0 is the first, 1 the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def darker(color: Color, share: float) -> Color:
    """Blend towards black."""
    return mix(color, (10, 12, 24), share)


def lighter(color: Color, share: float) -> Color:
    """Blend towards white."""
    return mix(color, (255, 255, 250), share)


@dataclass(frozen=True)
class Light:
    """What the hour of the day does to every colour.

    Attributes:
        tint: factor of red, green and blue, [0, 1].
        haze: the colour that far things fade to.
        sun_side: -1 when the light comes from the left, 1 from the right.
        is_dark: windows and lamps are lit.
    """

    tint: tuple[float, float, float]
    haze: Color
    sun_side: int
    is_dark: bool

    def on(self, color: Color) -> Color:
        """Return the colour as it looks in this light."""
        if color == LAMP:
            return color
        red, green, blue = (round(a * b) for a, b in zip(color, self.tint, strict=True))
        return red, green, blue


class Canvas:
    """The supersampled picture and its label map (0 = no thing)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.side_px = size * SUPERSAMPLING
        self.picture = Image.new("RGB", (self.side_px, self.side_px))
        self.labels = Image.new("L", (self.side_px, self.side_px))
        self.ink = ImageDraw.Draw(self.picture, "RGBA")
        self.label_ink = ImageDraw.Draw(self.labels)

    def reduce(self) -> tuple[np.ndarray, np.ndarray]:
        """Return picture (size, size, 3) and label map (size, size), both uint8.

        A pixel belongs to the thing that covers its centre.
        """
        centre = SUPERSAMPLING // 2
        labels = np.asarray(self.labels)[centre::SUPERSAMPLING, centre::SUPERSAMPLING]
        return np.asarray(self.picture.reduce(SUPERSAMPLING)), labels.copy()


class Pen:
    """Draws one thing in its own units, under the scene's light."""

    def __init__(
        self,
        canvas: Canvas,
        *,
        x: float,
        foot: float,
        height: float,
        looks_left: bool,
        label: int,
        light: Light,
        haze: float,
    ) -> None:
        """Put the pen down.

        Args:
            canvas: what is drawn on.
            x: middle of the thing, picture units.
            foot: its lowest point, picture units.
            height: picture units.
            looks_left: mirrors it.
            label: its number on the label map, 1-255; 0 draws no label.
            light: the scene's.
            haze: share of the haze's colour, [0, 1].
        """
        self._canvas = canvas
        self._x, self._foot, self._height = x, foot, height
        self._sign = -1 if looks_left else 1
        self._label = label
        self._light = light
        self._haze = haze
        self.is_dark = light.is_dark
        self.sun_side = light.sun_side * self._sign

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        """Fill a polygon."""
        points_px = [self._to_px(*point) for point in points]
        self._canvas.ink.polygon(points_px, fill=self._lit(color))
        self._canvas.label_ink.polygon(points_px, fill=self._label)

    def box(self, left: float, bottom: float, right: float, top: float, color: Color) -> None:
        """Fill an upright rectangle."""
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], color)

    def ellipse(self, x: float, y: float, width: float, height: float, color: Color) -> None:
        """Fill an ellipse around (x, y); width and height are its radii."""
        (left, top), (right, bottom) = (
            self._to_px(x - self._sign * width, y + height),
            self._to_px(x + self._sign * width, y - height),
        )
        self._canvas.ink.ellipse((left, top, right, bottom), fill=self._lit(color))
        self._canvas.label_ink.ellipse((left, top, right, bottom), fill=self._label)

    def disc(self, x: float, y: float, radius: float, color: Color) -> None:
        """Fill a circle."""
        self.ellipse(x, y, radius, radius, color)

    def line(self, points: Sequence[Point], width: float, color: Color) -> None:
        """Draw a line with round ends."""
        points_px = [self._to_px(*point) for point in points]
        width_px = max(1, round(width * self._height * self._canvas.side_px))
        self._canvas.ink.line(points_px, fill=self._lit(color), width=width_px, joint="curve")
        self._canvas.label_ink.line(points_px, fill=self._label, width=width_px, joint="curve")
        for x, y in (points[0], points[-1]):
            self.disc(x, y, width / 2, color)

    def cast_shadow(self, half_width: float) -> None:
        """Darken the ground below the thing, away from the sun; the label map stays."""
        x, y = self._to_px(-self.sun_side * 0.08, 0.0)
        width_px = half_width * 1.1 * self._height * self._canvas.side_px
        for share in (1.0, 0.88, 0.76):
            wide, flat = width_px * share, width_px * share * 0.16
            self._canvas.ink.ellipse((x - wide, y - flat, x + wide, y + flat), fill=(8, 12, 32, 34))

    def _to_px(self, x: float, y: float) -> Point:
        side_px = self._canvas.side_px
        return (
            (self._x + self._sign * x * self._height) * side_px,
            (self._foot - y * self._height) * side_px,
        )

    def _lit(self, color: Color) -> Color:
        return mix(self._light.on(color), self._light.haze, self._haze)
