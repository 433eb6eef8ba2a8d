"""Sky and ground: what a scene's things stand before, on and in.

Nothing in here is a thing with a record. Every random number is in picture units, so a scene looks
the same at every size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from demo.pen import Canvas, Color, Light, darker, lighter, mix

WASH_CELLS = 24  # the grid of soft spots on sky and ground; finer ones vanish at 64 px


@dataclass(frozen=True)
class Sky:
    """One hour and weather: two colours, the light below them, and its words."""

    top: Color
    bottom: Color
    tint: tuple[float, float, float]
    phrase: str
    is_dark: bool = False
    clouds: tuple[int, int] = (0, 4)


@dataclass(frozen=True)
class Setting:
    """One kind of ground.

    Attributes:
        ground: its colours, far and near.
        phrase: how captions say it.
        horizon: range of the horizon's height, picture units from the top.
        texture: strength of the soft spots, in grey levels.
    """

    ground: tuple[Color, Color]
    phrase: str
    horizon: tuple[float, float] = (0.42, 0.62)
    texture: float = 5.0


SKIES: dict[str, Sky] = {
    "day": Sky((84, 152, 222), (198, 226, 242), (1.0, 1.0, 1.0), "under a blue sky"),
    "cloudy": Sky((138, 150, 164), (206, 212, 214), (0.88, 0.9, 0.92), "under a grey sky",
                  clouds=(3, 7)),
    "sunset": Sky((92, 70, 138), (252, 158, 84), (1.0, 0.83, 0.7), "at sunset"),
    "morning": Sky((146, 176, 222), (252, 208, 190), (1.0, 0.94, 0.9), "on a pink morning"),
    "night": Sky((10, 16, 46), (46, 62, 106), (0.6, 0.65, 0.84), "at night", is_dark=True,
                 clouds=(0, 2)),
}  # fmt: skip
SETTINGS: dict[str, Setting] = {
    "meadow": Setting(((150, 186, 92), (70, 142, 58)), "on a green meadow"),
    "field": Setting(((184, 150, 98), (128, 88, 54)), "on a brown field"),
    "snow": Setting(((226, 234, 244), (250, 252, 255)), "in the snow", texture=3.0),
    "desert": Setting(((226, 188, 126), (240, 208, 148)), "in the desert"),
    "beach": Setting(((66, 146, 190), (240, 216, 164)), "on a sandy beach by the sea", (0.4, 0.5)),
    "sea": Setting(((74, 146, 192), (22, 88, 144)), "on the blue sea", (0.45, 0.6)),
    "lake": Setting(((150, 178, 96), (72, 140, 62)), "by a calm lake", (0.46, 0.54)),
    "street": Setting(((176, 172, 166), (196, 190, 182)), "on a city street", (0.5, 0.56), 3.0),
    "railway": Setting(((150, 186, 92), (74, 144, 60)), "beside a railway line"),
}
# Feet of what stands there, picture units; the backdrop draws the ground to match.
LAKE_SHORE, LAKE_BANK, SEA_EDGE = 0.045, 0.88, 0.66
ROAD_TOP, ROAD_BOTTOM, RAILS = 0.7, 0.95, 0.84


def draw_sky(
    canvas: Canvas, *, sky: Sky, light: Light, horizon: float, rng: np.random.Generator
) -> None:
    """Draw sky, sun or moon, stars and clouds down to the horizon."""
    _wash(
        canvas, top=0.0, bottom=horizon + 0.02, far=sky.top, near=sky.bottom, texture=2.5, rng=rng
    )
    sun_x = 0.5 + light.sun_side * (0.2 + 0.18 * rng.random())
    sun_y = horizon * (0.8 if sky.phrase == "at sunset" else 0.2 + 0.25 * rng.random())
    stars = rng.random((36, 2))
    if sky.is_dark:
        for x, y in stars:
            _ellipse(canvas, x, y * horizon, 0.004, 0.004, (236, 238, 220))
        _ellipse(canvas, sun_x, sun_y, 0.06, 0.06, (244, 240, 214))
        _ellipse(canvas, sun_x + 0.026, sun_y - 0.012, 0.052, 0.052, mix(sky.top, sky.bottom, 0.25))
    elif sky.phrase != "under a grey sky":
        glow = (255, 244, 196)
        for radius, alpha in ((0.13, 30), (0.1, 44), (0.075, 255)):
            _ellipse(canvas, sun_x, sun_y, radius, radius, glow, alpha)
    white = mix(lighter(sky.bottom, 0.55), sky.top, 0.55 if sky.is_dark else 0.0)
    for _ in range(int(rng.integers(*sky.clouds, endpoint=True))):
        x, y, scale = rng.random(), horizon * (0.1 + 0.55 * rng.random()), 0.5 + rng.random()
        for offset in (-0.08, 0.08, 0.0):
            radius = (0.05 if offset else 0.075) * scale * (0.8 + 0.4 * rng.random())
            _ellipse(
                canvas, x + offset * scale, y - radius * 0.3, radius * 1.25, radius * 0.7, white
            )
        _ellipse(canvas, x, y + 0.008, 0.15 * scale, 0.026 * scale, darker(white, 0.07))


def draw_hills(
    canvas: Canvas,
    *,
    setting: str,
    sky: Sky,
    light: Light,
    horizon: float,
    rng: np.random.Generator,
) -> None:
    """Draw up to three ridges, the far ones in the sky's colour, or snow-capped mountains."""
    num_ridges, has_mountains = int(rng.integers(0, 4)), rng.random() < 0.3
    num_ridges = min(num_ridges, 1) if setting in ("sea", "beach") else num_ridges
    base = (
        SETTINGS[setting].ground[1] if setting not in ("sea", "beach", "street") else (96, 132, 104)
    )
    if has_mountains and setting != "street":
        for _ in range(3):
            x, half, high = rng.random(), 0.2 + 0.16 * rng.random(), 0.16 + 0.14 * rng.random()
            rock = mix(light.on((112, 116, 136)), sky.bottom, 0.3)
            _mountain(canvas, x=x, foot=horizon, half=half, high=high, rock=rock, light=light)
    for ridge in range(num_ridges):
        share = (ridge + 1) / (num_ridges + 1)
        height, phase = 0.16 * (1 - share) + 0.03, rng.random(3) * 2 * math.pi
        xs = np.linspace(0, 1, 49)
        rise = 0.5 + 0.28 * np.sin(2.6 * xs * math.pi + phase[0])
        rise = rise + 0.14 * np.sin(5.4 * xs * math.pi + phase[1])
        color = mix(light.on(darker(base, 0.14)), sky.bottom, 0.62 * (1 - share))
        points = [(float(x), horizon - height * float(y)) for x, y in zip(xs, rise, strict=True)]
        _polygon(canvas, [(0.0, horizon + 0.02), *points, (1.0, horizon + 0.02)], color)


def draw_ground(
    canvas: Canvas, *, setting: str, light: Light, horizon: float, rng: np.random.Generator
) -> None:
    """Draw what lies below the horizon; a lake's water comes after what stands behind it."""
    far, near = (light.on(color) for color in SETTINGS[setting].ground)
    texture = SETTINGS[setting].texture
    if setting == "beach":
        sea = light.on((34, 112, 164))
        sea_edge = SEA_EDGE + 0.02
        _wash(canvas, top=horizon, bottom=sea_edge, far=far, near=sea, texture=3.0, rng=rng)
        draw_waves(canvas, top=horizon, bottom=SEA_EDGE - 0.03, light=light, rng=rng)
        wet = darker(near, 0.12)
        _wash(canvas, top=SEA_EDGE, bottom=1.0, far=wet, near=near, texture=texture, rng=rng)
        _box(canvas, SEA_EDGE - 0.008, SEA_EDGE + 0.008, light.on((240, 248, 250)))
    else:
        _wash(canvas, top=horizon, bottom=1.0, far=far, near=near, texture=texture, rng=rng)
    if setting in ("meadow", "lake", "railway"):
        _tufts(canvas, top=horizon + 0.06, near=near, light=light, rng=rng)
    elif setting == "sea":
        draw_waves(canvas, top=horizon, bottom=1.0, light=light, rng=rng)
    elif setting == "field":
        _furrows(canvas, horizon=horizon, color=darker(near, 0.25), rng=rng)
    elif setting == "street":
        _street(canvas, horizon=horizon, light=light)
    elif setting in ("snow", "desert"):
        shade = mix(near, light.on((120, 130, 190)), 0.16)
        _drifts(canvas, horizon=horizon, color=shade, rng=rng)
    if setting == "railway":
        _rails(canvas, light=light)


def draw_waves(
    canvas: Canvas, *, top: float, bottom: float, light: Light, rng: np.random.Generator
) -> None:
    """Draw rows of short crests that grow towards us."""
    color = light.on((206, 232, 240))
    for x, depth, length in rng.random((46, 3)):
        y = top + 0.01 + (bottom - top - 0.02) * depth**1.5
        half = (0.01 + 0.035 * depth) * (0.6 + length)
        _ellipse(canvas, x, y, half, 0.0022 + 0.0035 * depth, color, 110)


def mirror_in_lake(
    canvas: Canvas, *, horizon: float, light: Light, rng: np.random.Generator
) -> None:
    """Turn the strip below the far shore into water that mirrors everything above it."""
    shore_px = round((horizon + LAKE_SHORE) * canvas.side_px)
    bank_px = round(LAKE_BANK * canvas.side_px)
    above = canvas.picture.crop((0, 0, canvas.side_px, shore_px))
    mirrored = above.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    mirrored = mirrored.crop((0, 0, canvas.side_px, bank_px - shore_px))
    water = Image.new("RGB", mirrored.size, light.on((44, 106, 146)))
    canvas.picture.paste(Image.blend(mirrored, water, 0.36), (0, shore_px))
    canvas.labels.paste(0, (0, shore_px, canvas.side_px, bank_px))
    draw_waves(canvas, top=horizon + LAKE_SHORE, bottom=LAKE_BANK, light=light, rng=rng)


def _wash(
    canvas: Canvas, *, top: float, bottom: float, far: Color, near: Color, texture: float,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Fill a band from side to side with a gradient and soft spots."""
    share = np.linspace(0, 1, WASH_CELLS)[:, None, None]
    cells = np.asarray(far) * (1 - share) + np.asarray(near) * share
    cells = cells + rng.normal(0.0, texture, (WASH_CELLS, WASH_CELLS, 1))
    top_px, bottom_px = round(top * canvas.side_px), round(bottom * canvas.side_px)
    band = Image.fromarray(cells.clip(0, 255).astype(np.uint8))
    band = band.resize((canvas.side_px, bottom_px - top_px), Image.Resampling.BICUBIC)
    canvas.picture.paste(band, (0, top_px))


def _tufts(canvas: Canvas, top: float, near: Color, light: Light, rng: np.random.Generator) -> None:
    blossoms = [light.on(color) for color in ((250, 240, 200), (250, 214, 80), (236, 140, 170))]
    has_blossoms = rng.random() < 0.5
    for number, (x, depth, lean) in enumerate(rng.random((90, 3))):
        y, high = top + (1 - top) * depth, 0.012 + 0.03 * depth
        color = darker(near, 0.22) if number % 3 else lighter(near, 0.2)
        tip = (x + (lean - 0.5) * high, y - high)
        _polygon(canvas, [(x - high * 0.14, y), tip, (x + high * 0.14, y)], color)
        if has_blossoms and number % 4 == 0:
            _ellipse(canvas, x + 0.03, y, high * 0.2, high * 0.2, blossoms[number % 3])


def _furrows(canvas: Canvas, *, horizon: float, color: Color, rng: np.random.Generator) -> None:
    """Draw furrows that meet in one point of the horizon."""
    meeting = 0.25 + 0.5 * rng.random()
    for furrow in range(-14, 15):
        x = meeting + furrow * 0.14
        points = [(meeting + furrow * 0.004, horizon), (x - 0.022, 1.0), (x + 0.022, 1.0)]
        _polygon(canvas, points, color, 150)


def _drifts(canvas: Canvas, *, horizon: float, color: Color, rng: np.random.Generator) -> None:
    for x, depth, wide in rng.random((9, 3)):
        y = horizon + 0.04 + (0.94 - horizon) * depth
        half = (0.1 + 0.3 * wide) * (0.3 + depth)
        _ellipse(canvas, x, y, half, 0.01 + 0.016 * depth, color, 120)


def _street(canvas: Canvas, *, horizon: float, light: Light) -> None:
    """Draw a road from side to side: kerbs, edge, dashes; paving joints that meet far away."""
    joint = light.on((150, 146, 140))
    for step in range(-12, 13):
        x = 0.5 + step * 0.16
        points = [(0.5 + step * 0.09, horizon), (x - 0.004, 1.0), (x + 0.004, 1.0)]
        _polygon(canvas, points, joint, 170)
    for y in (horizon + 0.07, ROAD_TOP - 0.03):
        _box(canvas, y, y + 0.006, joint)
    _box(canvas, ROAD_TOP - 0.014, ROAD_BOTTOM + 0.014, light.on((214, 210, 202)))
    _box(canvas, ROAD_TOP, ROAD_BOTTOM, light.on((84, 86, 92)))
    middle, dash = (ROAD_TOP + ROAD_BOTTOM) / 2, light.on((238, 232, 210))
    for step in range(6):
        x = 0.02 + step * 0.19
        _polygon(canvas, [(x, middle + 0.007), (x + 0.01, middle - 0.007),
                          (x + 0.11, middle - 0.007), (x + 0.1, middle + 0.007)], dash)  # fmt: skip


def _rails(canvas: Canvas, *, light: Light) -> None:
    _box(canvas, RAILS - 0.035, RAILS + 0.035, light.on((150, 140, 128)))
    for step in range(17):
        x = step * 0.065
        _polygon(canvas, [(x, RAILS + 0.026), (x + 0.012, RAILS - 0.022),
                          (x + 0.036, RAILS - 0.022), (x + 0.026, RAILS + 0.026)],
                 light.on((98, 70, 48)))  # fmt: skip
    for y in (RAILS - 0.014, RAILS + 0.012):
        _box(canvas, y, y + 0.01, light.on((188, 190, 196)))


def _mountain(
    canvas: Canvas, *, x: float, foot: float, half: float, high: float, rock: Color, light: Light
) -> None:
    foot += 0.02
    peak = (x, foot - high)
    _polygon(canvas, [(x - half, foot), peak, (x + half, foot)], rock)
    shady = -light.sun_side * half
    _polygon(canvas, [(x, foot), peak, (x + shady, foot)], darker(rock, 0.14))
    snow = [(x - half * 0.32, foot - high * 0.68), peak, (x + half * 0.32, foot - high * 0.68),
            (x + half * 0.12, foot - high * 0.74), (x, foot - high * 0.62),
            (x - half * 0.12, foot - high * 0.74)]  # fmt: skip
    _polygon(canvas, snow, light.on((244, 246, 252)))


def _polygon(
    canvas: Canvas, points: list[tuple[float, float]], color: Color, alpha: int = 255
) -> None:
    points_px = [(x * canvas.side_px, y * canvas.side_px) for x, y in points]
    canvas.ink.polygon(points_px, fill=(*color, alpha))


def _box(canvas: Canvas, top: float, bottom: float, color: Color) -> None:
    _polygon(canvas, [(0.0, top), (1.0, top), (1.0, bottom), (0.0, bottom)], color)


def _ellipse(
    canvas: Canvas, x: float, y: float, wide: float, high: float, color: Color, alpha: int = 255
) -> None:
    side_px = canvas.side_px
    box_px = (
        (x - wide) * side_px,
        (y - high) * side_px,
        (x + wide) * side_px,
        (y + high) * side_px,
    )
    canvas.ink.ellipse(box_px, fill=(*color, alpha))
