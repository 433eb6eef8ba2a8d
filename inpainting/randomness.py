"""Where every random number of a run comes from: an address, never a position.

A sample's generator depends on what the sample *is* (seed, purpose, epoch, image id), not on when,
where or beside what it is computed. So loader workers, ranks, batch size, accumulation and a
resume change nothing of a sample, and no generator state has to be stored.
"""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, *address: int) -> np.random.Generator:
    """Return the random generator that belongs to one purpose at one address.

    Each purpose ("crop", "mask", "noise", ...) has its own stream, so drawing more numbers for one
    of them moves none of the others.

    Args:
        seed: the run's seed, >= 0.
        purpose: what the numbers are for.
        address: non-negative integers, for a training sample (epoch, image id).
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *address])
