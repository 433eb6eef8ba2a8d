"""Pictures that can't be read: tried again where that may help, or left out and named once."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Sequence

import torch
from PIL import Image

from inpainting.coco import CocoIndex

logger = logging.getLogger(__name__)

# Errors that belong to the moment, not to the picture: it is read again, after so many seconds.
PASSING_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
PAUSES_S = (1.0, 5.0)
# Errors of the machine: to leave pictures out for them would hide a fault.
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UnreadablePictureError(ValueError):
    """A picture can't be read, and none may take its place."""

    def __str__(self) -> str:
        """Leave out the traceback that an error brings along from a loader process."""
        return super().__str__().rpartition("UnreadablePictureError: ")[2].strip()


class UnreadablePictures:
    """Which pictures turned out to be unreadable: one byte a row that loader processes share.

    Args:
        num_rows: of the index.
        known: the rows that are known to be, and have been named.
        is_error: refuse the first one that isn't known (--strict_data).
    """

    def __init__(self, num_rows: int, *, known: Sequence[int] = (), is_error: bool) -> None:
        self.flags = torch.zeros(num_rows, dtype=torch.uint8).share_memory_()
        self.flags[list(known)] = 1
        self.is_error = is_error

    def __contains__(self, row: int) -> bool:
        return bool(self.flags[row])

    def add(self, row: int, reason: Exception) -> None:
        """Leave a picture out from now on, and name it.

        Raises:
            UnreadablePictureError: none may be left out.
        """
        if self.is_error:
            raise UnreadablePictureError(f"--strict_data: {reason}") from reason
        if row not in self:
            self.flags[row] = 1
            logger.warning("left out: %s", reason)

    def open_picture(self, index: CocoIndex, row: int) -> Image.Image | None:
        """Open a picture; None where it can't be read, which is said the first time.

        Raises:
            UnreadablePictureError: none may be left out.
            OSError: the machine is out of files or memory.
        """
        if row in self:
            return None
        try:
            return _open_patiently(index, row)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
                raise
            self.add(row, error)
        return None


def _open_patiently(index: CocoIndex, row: int) -> Image.Image:
    """Open a picture, again where the disk or the network stumbles."""
    for pause_s in PAUSES_S:
        try:
            return index.open_picture(row)
        except OSError as error:
            if error.errno not in PASSING_ERRORS:
                raise
            time.sleep(pause_s)
    return index.open_picture(row)
