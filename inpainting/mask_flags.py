"""What the user may say of holes: their kinds, with weights, and their shares of the picture.

Imports no library: --help answers at once.
"""

from __future__ import annotations

import math

MASK_TYPES = ("irregular", "rectangle", "object", "outpaint")
MIN_SIZE = 64  # the smallest picture that `check_area_range` answers for, in pixels


def parse_mask_types(text: str) -> dict[str, float]:
    """Parse a mixture of mask types.

    Args:
        text: "irregular=0.5,object=0.5", or without weights "irregular,object" (equal shares).

    Returns:
        The probability of each type, in the order written; they sum to 1.

    Raises:
        ValueError: an unknown or repeated type, a weight that is no positive number, or weights
            for some types only.
    """
    must = f"--mask_types must be types of {', '.join(MASK_TYPES)} with or without weights"
    weights: dict[str, float] = {}
    has_weight = set()
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if name not in MASK_TYPES:
            raise ValueError(f"{must}, got {name!r}. Write for example irregular=0.5,object=0.5.")
        if name in weights:
            raise ValueError(f"{must}, got {name} twice. Name each type once.")
        try:
            weights[name] = float(number) if equals else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ValueError(
                f"{must}, got weight {number!r} for {name}. Give a number above 0, "
                "or leave the type out."
            )
        has_weight.add(bool(equals))
    if len(has_weight) == 2:
        raise ValueError(
            f"{must}, got {text!r} where only some have one. Give every type a weight, or none."
        )
    largest = max(weights.values())  # divided by first: the sum of huge weights would be infinite
    total = sum(weight / largest for weight in weights.values())
    return {name: weight / largest / total for name, weight in weights.items()}


def check_area_range(lo: float, hi: float, *, size: int = MIN_SIZE) -> None:
    """Refuse a range of shares that no mask can satisfy.

    Args:
        lo: the smallest share of the picture that may be hole.
        hi: the largest.
        size: side of the smallest picture to answer for, in pixels.

    Raises:
        ValueError: not 0 < lo < hi < 1, or narrower than one pixel of the picture.
    """
    if not 0 < lo < hi < 1:
        raise ValueError(
            "--mask_area_range must be two shares of the picture with 0 < low < high < 1, "
            f"got {lo} {hi}. The default is 0.1 0.3."
        )
    if (hi - lo) * size**2 < 1:
        raise ValueError(
            f"--mask_area_range must be at least {1 / size**2:.6f} wide (one pixel at {size} px), "
            f"got {lo} {hi}. Widen it, for example to {lo:.4g} {min(lo + 0.05, (lo + 1) / 2):.4g}."
        )
