"""The plan of a scene: which things stand where, on what ground, at what hour.

A plan depends on (seed, index) alone and is written in picture units, so that scene `index` of a
seed is the same picture at every size. One thing is the *main* one: large, and hardly covered;
others stand before and behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo.backdrops import LAKE_BANK, LAKE_SHORE, RAILS, ROAD_TOP, SEA_EDGE, SETTINGS, SKIES
from demo.kinds import KINDS
from inpainting.randomness import generator

MAX_HIDDEN = 0.3  # share of a thing's box that one later thing may cover
NUM_TRIES = 10
CLOSED_SETTINGS = ("street", "lake", "beach", "railway")  # their horizon can't be lowered
SKY_NAMES = tuple(SKIES)
SKY_SHARES = (0.42, 0.16, 0.17, 0.12, 0.13)


@dataclass(frozen=True)
class Member:
    """Where one drawing stands: x of its middle, y of its foot, height; picture units."""

    x: float
    foot: float
    height: float


@dataclass(frozen=True)
class Thing:
    """What gets one record: a single thing, or a crowd of many.

    Attributes:
        name: a key of `KINDS`.
        color_name: a key of `COLORS`; None for a crowd of many colours.
        members: one, or the members of a crowd, from far to near.
        looks_left: mirrors the drawing.
    """

    name: str
    color_name: str | None
    members: tuple[Member, ...]
    looks_left: bool

    @property
    def is_crowd(self) -> bool:
        """Whether the record covers many."""
        return len(self.members) > 1

    @property
    def foot(self) -> float:
        """The mean foot."""
        return sum(member.foot for member in self.members) / len(self.members)

    @property
    def nearness(self) -> float:
        """Decides what covers what: the lower foot is nearer, the sky behind everything."""
        return self.foot - 1.0 if KINDS[self.name].zone == "sky" else self.foot

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom, picture units."""
        half = KINDS[self.name].width / 2
        return (
            min(member.x - half * member.height for member in self.members),
            min(member.foot - member.height for member in self.members),
            max(member.x + half * member.height for member in self.members),
            max(member.foot for member in self.members),
        )


@dataclass(frozen=True)
class Plan:
    """A scene before it is drawn.

    Attributes:
        setting, sky: keys of `SETTINGS` and `SKIES`.
        horizon: picture units from the top.
        sun_side: -1 left, 1 right.
        things: the main thing first, then the others as they came to mind.
    """

    setting: str
    sky: str
    horizon: float
    sun_side: int
    things: tuple[Thing, ...]


def plan_scene(index: int, *, seed: int) -> Plan:
    """Decide what scene `index` of a seed shows."""
    rng = generator(seed, "scene", index)
    names = [name for name in KINDS if name != "fence"]  # a fence alone is no subject
    main = KINDS[name := names[rng.integers(len(names))]]
    homes = [home for home in main.homes if main.zone != "sky" or home not in CLOSED_SETTINGS]
    setting = homes[rng.integers(len(homes))]
    sky = SKY_NAMES[rng.choice(len(SKY_NAMES), p=SKY_SHARES)]
    horizon = float(rng.uniform(*SETTINGS[setting].horizon))
    if main.zone == "sky":
        horizon = float(rng.uniform(0.7, 0.82))
    things = [_place_main(name, setting=setting, horizon=horizon, rng=rng)]
    if setting == "street":
        things += _build_row(things[0], horizon=horizon, rng=rng)
    companions = [other for other, kind in KINDS.items() if setting in kind.homes]
    for _ in range(int(rng.integers(1, 6))):
        other = companions[rng.integers(len(companions))]
        for _ in range(NUM_TRIES):
            thing = _place_companion(other, setting=setting, horizon=horizon, rng=rng)
            if _fits(thing, things):
                things.append(thing)
                break
    sun_side = 1 if rng.random() < 0.5 else -1
    return Plan(setting, sky, horizon, sun_side, tuple(things))


def depth_of(foot: float, *, horizon: float) -> float:
    """Return 0 for what stands on the horizon, 1 for what stands near us."""
    return min(max((foot - horizon) / (0.95 - horizon), 0.0), 1.0)


def _place_main(name: str, *, setting: str, horizon: float, rng: np.random.Generator) -> Thing:
    kind = KINDS[name]
    height = min(rng.uniform(0.5, 0.74), rng.uniform(0.84, 1.0) / kind.width)
    is_tall = kind.height > 0.5
    if kind.zone == "sky":
        height = min(height, horizon - 0.1)
        foot = rng.uniform(height + 0.03, horizon - 0.03)
    elif setting == "lake" and is_tall:
        foot = horizon + LAKE_SHORE - 0.008
        height = min(height, foot - 0.03)
    elif setting == "street" and kind.zone == "ground":
        foot = ROAD_TOP - 0.03 if is_tall else 0.985
    else:
        foot = _foot(kind.zone, setting=setting, horizon=horizon, nearest=0.6, rng=rng)
    height = min(height, foot - 0.02)
    half = kind.width * height / 2
    low, high = min(half, 0.5), max(1 - half, 0.5)
    member = Member(rng.uniform(low, high), foot, height)
    return _thing(name, member=member, setting=setting, rng=rng)


def _place_companion(name: str, *, setting: str, horizon: float, rng: np.random.Generator) -> Thing:
    kind = KINDS[name]
    if kind.crowd and rng.random() < 0.3:
        return _place_crowd(name, setting=setting, horizon=horizon, rng=rng)
    foot = _foot(kind.zone, setting=setting, horizon=horizon, nearest=0.0, rng=rng)
    height = kind.height * rng.uniform(0.85, 1.15)
    if kind.zone == "sky":
        foot = rng.uniform(height * 0.8, horizon - 0.04)
        height *= rng.uniform(0.6, 1.0)
    elif setting == "lake" and foot < horizon + LAKE_SHORE:
        height *= 0.55
    else:
        height *= 0.36 + 0.64 * depth_of(foot, horizon=horizon)
    member = Member(rng.uniform(0.0, 1.0), foot, height)
    return _thing(name, member=member, setting=setting, rng=rng)


def _place_crowd(name: str, *, setting: str, horizon: float, rng: np.random.Generator) -> Thing:
    kind, num_members = KINDS[name], int(rng.integers(7, 15))
    foot = _foot(kind.zone, setting=setting, horizon=horizon, nearest=0.0, rng=rng)
    scale = 0.5 if kind.zone == "sky" else 0.3 + 0.45 * depth_of(foot, horizon=horizon)
    if kind.zone == "sky":
        foot = rng.uniform(0.25, 0.8) * horizon
    height, middle = kind.height * scale, rng.uniform(0.15, 0.85)
    step = height * kind.width * (0.62 if kind.zone == "ground" else 1.0)
    members = []
    for number in range(num_members):
        x = middle + step * ((number % 5) - 2 + rng.uniform(-0.35, 0.35))
        row = height * (0.25 if kind.zone == "ground" else 1.1) * (number // 5 - 1)
        y = foot + row + height * rng.uniform(-0.1, 0.1)
        members.append(Member(x, min(y, 0.99), height * rng.uniform(0.9, 1.1)))
    members.sort(key=lambda member: member.foot)
    color_name = None if name == "person" else kind.colors[rng.integers(len(kind.colors))]
    return Thing(name, color_name, tuple(members), bool(rng.random() < 0.5))


def _build_row(main: Thing, *, horizon: float, rng: np.random.Generator) -> list[Thing]:
    """Line the street with equal houses or towers; the gap behind a tall main thing stays open."""
    name = "building" if rng.random() < 0.6 else "house"
    kind, foot = KINDS[name], horizon + 0.08
    height = rng.uniform(0.34, 0.5) if name == "building" else rng.uniform(0.24, 0.34)
    step = kind.width * height * 1.06
    colors = rng.integers(len(kind.colors), size=12)
    start = -rng.random() * step
    row = []
    for number in range(int(1 / step) + 2):
        member = Member(start + (number + 0.5) * step, foot, height)
        thing = Thing(name, kind.colors[colors[number % 2]], (member,), False)
        if _fits(thing, [main], in_front=True):
            row.append(thing)
    return row


def _thing(name: str, *, member: Member, setting: str, rng: np.random.Generator) -> Thing:
    kind = KINDS[name]
    looks_left = bool(rng.random() < 0.5)
    if kind.zone == "road":
        looks_left = member.foot < 0.86  # they keep to the right
    colors = ("white", "green") if name == "tree" and setting == "snow" else kind.colors
    return Thing(name, colors[rng.integers(len(colors))], (member,), looks_left)


def _foot(
    zone: str, *, setting: str, horizon: float, nearest: float, rng: np.random.Generator
) -> float:
    """Draw where something stands; `nearest` in [0, 1] keeps it away from the horizon."""
    if zone == "road":
        return 0.8 if rng.random() < 0.45 * (1 - nearest) else 0.935
    if zone == "rails":
        return RAILS + 0.016
    if setting == "lake" and zone == "ground":
        is_far = rng.random() < 0.6 * (nearest < 0.5)
        return horizon + LAKE_SHORE - 0.008 if is_far else rng.uniform(LAKE_BANK + 0.05, 0.985)
    if setting == "street" and zone == "ground":
        is_far = rng.random() < 0.6
        return rng.uniform(horizon + 0.09, ROAD_TOP - 0.02) if is_far else 0.985
    top, bottom = horizon + 0.04, 0.97
    if setting == "beach":
        top, bottom = (SEA_EDGE + 0.04, bottom) if zone == "ground" else (top, SEA_EDGE - 0.03)
    elif setting == "lake":
        top, bottom = horizon + LAKE_SHORE + 0.05, LAKE_BANK - 0.02
    elif setting == "railway":
        top = top if nearest < 0.5 else RAILS + 0.07
    return rng.uniform(top + (bottom - top) * nearest, bottom)


def _fits(thing: Thing, others: list[Thing], *, in_front: bool = False) -> bool:
    """Whether no earlier thing is covered too much, and the new one isn't either."""
    for other in others:
        near, far = (thing, other) if thing.nearness > other.nearness else (other, thing)
        share = 0.9 if in_front else MAX_HIDDEN
        if _overlap(near.box, far.box) > share * _area(far.box):
            return False
    left, _, right, _ = thing.box
    return min(right, 1.0) - max(left, 0.0) > 0.6 * (right - left) or in_front


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(
    first: tuple[float, float, float, float], second: tuple[float, float, float, float]
) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)
