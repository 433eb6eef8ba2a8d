"""The table of everything that a scene can hold, and of where it is at home."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from demo import artefacts, creatures
from demo.pen import Color, Pen

VIVID = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
FURS = ("brown", "black", "white", "grey")
OPEN_LAND = ("meadow", "field", "snow", "desert")
GREEN_LAND = ("meadow", "field", "lake", "railway")


class Draw(Protocol):
    """What draws one kind."""

    def __call__(self, pen: Pen, *, color: Color, rng: np.random.Generator) -> None:
        """Draw in thing units; `rng` chooses between looks of the same name."""
        ...


@dataclass(frozen=True)
class Kind:
    """One category.

    Attributes:
        draw: draws it in thing units.
        height: picture units, of one that stands near us beside others; far ones shrink.
        width: in units of its height.
        colors: the names that captions use.
        homes: the settings it belongs to.
        zone: where it is there: "ground", "road", "rails", "water" or "sky".
        crowd: what captions call many of them; None when they never crowd.
    """

    draw: Draw
    height: float
    width: float
    colors: tuple[str, ...]
    homes: tuple[str, ...]
    zone: str = "ground"
    crowd: str | None = None


KINDS: dict[str, Kind] = {
    "house": Kind(
        artefacts.draw_house, 0.56, 1.16, ("white", "yellow", "red", "orange", "blue", "pink"),
        ("meadow", "field", "snow", "lake", "street", "railway"),
    ),
    "building": Kind(
        artefacts.draw_building, 0.78, 0.54, ("grey", "brown", "blue", "red", "white"), ("street",)
    ),
    "tree": Kind(
        artefacts.draw_tree, 0.58, 0.78, ("green", "green", "green", "orange", "red"),
        (*GREEN_LAND, "snow", "street"),
    ),
    "palm tree": Kind(artefacts.draw_palm, 0.58, 0.8, ("green",), ("beach", "desert")),
    "person": Kind(
        artefacts.draw_person, 0.42, 0.62, (*VIVID, "white", "black"),
        (*OPEN_LAND, "beach", "lake", "street", "railway"), crowd="crowd",
    ),
    "car": Kind(
        artefacts.draw_car, 0.21, 2.08, (*VIVID, "white", "black", "grey"), ("street",), "road"
    ),
    "bus": Kind(
        artefacts.draw_bus, 0.31, 1.98, ("red", "yellow", "green", "blue"), ("street",), "road"
    ),
    "train": Kind(
        artefacts.draw_train, 0.26, 3.8, ("red", "green", "blue", "black"), ("railway",), "rails"
    ),
    "boat": Kind(
        artefacts.draw_boat, 0.4, 1.06, ("red", "blue", "white", "brown", "green"),
        ("sea", "lake", "beach"), "water",
    ),
    "airplane": Kind(
        artefacts.draw_airplane, 0.15, 2.62, ("red", "blue", "orange", "green"),
        (*OPEN_LAND, "sea", "beach", "street"), "sky",
    ),
    "balloon": Kind(
        artefacts.draw_balloon, 0.32, 0.7, VIVID, (*OPEN_LAND, "sea", "lake", "railway"), "sky"
    ),
    "bird": Kind(
        artefacts.draw_bird, 0.12, 1.85, ("black", "red", "blue", "yellow"),
        (*OPEN_LAND, "sea", "beach", "lake"), "sky", "flock",
    ),
    "dog": Kind(
        creatures.draw_dog, 0.23, 1.6, FURS, ("meadow", "snow", "beach", "lake", "street", "field")
    ),
    "cat": Kind(
        creatures.draw_cat, 0.22, 0.86, ("orange", *FURS), ("meadow", "field", "street", "railway")
    ),
    "cow": Kind(creatures.draw_cow, 0.28, 1.7, ("brown", "white", "black"), GREEN_LAND),
    "sheep": Kind(
        creatures.draw_sheep, 0.21, 1.26, ("white", "white", "black"), GREEN_LAND, crowd="flock"
    ),
    "flower": Kind(
        creatures.draw_flower, 0.2, 0.62, ("red", "yellow", "pink", "purple", "white", "blue"),
        ("meadow", "lake", "railway"), crowd="bed",
    ),
    "lighthouse": Kind(
        creatures.draw_lighthouse, 0.7, 0.36, ("red", "blue", "black"), ("beach", "lake")
    ),
    "windmill": Kind(
        creatures.draw_windmill, 0.66, 0.76, ("white", "brown", "grey", "red"), GREEN_LAND
    ),
    "snowman": Kind(
        creatures.draw_snowman, 0.36, 0.84, ("red", "green", "blue", "purple"), ("snow",)
    ),
    "umbrella": Kind(creatures.draw_umbrella, 0.42, 1.2, VIVID, ("beach",)),
    "fence": Kind(
        creatures.draw_fence, 0.17, 3.05, ("white", "brown", "green"), ("meadow", "field", "snow")
    ),
}  # fmt: skip
CATEGORY_NAMES = tuple(KINDS)
