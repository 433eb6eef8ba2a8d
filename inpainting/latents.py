"""The cache of the VAE's moments: what the frozen encoder says of a picture, kept on disk.

Moments are kept, never latents: each step still draws its own from the posterior. A hit and a miss
are the same bits, since a miss is encoded alone (a VAE's last bits depend on the batch around a
picture) and training takes the rounded value that is written.

Terms: *moments* are mean and log-variance of the VAE's posterior. A *view* is one way to cut a
picture, by its number. A *slot* is where the moments of one picture's view belong; its *tag* is a
hash of the very pixels that the VAE is given. So whatever changes them (file, decoder, crop) makes
the slot stale, and a stale, torn or empty slot is a miss, which is written anew.

Slots have fixed places in a few large files. These are read and written at an offset, not mapped:
behind a map a full disk or a cut file kills the process, here it is an error or a short read. Two
processes that write one slot write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from inpainting.atomic import alone_in, replace_atomically

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # raise it with every change of what is stored
PICTURES_PER_FILE = 16384  # 1 GB at 512 px: few files, none too large for any file system

_HEADER = struct.Struct("<qII")  # tag, CRC-32 of the moments, zero
_IDS_NAME = "image_ids.npy"


class Slot(NamedTuple):
    """Where the moments of one view of one picture belong, and of which pixels they must be.

    Attributes:
        picture: the picture's number in the cache, -1: nothing is to be written.
        view: the view's number, >= 0.
        tag: 64 bits of a hash of the pixels.
    """

    picture: int
    view: int
    tag: int


NO_SLOT = Slot(-1, -1, -1)


def tag_pixels(image: np.ndarray) -> int:
    """Hash what the VAE is given, (H, W, 3) uint8, to 64 signed bits."""
    digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def hash_encoder(vae: nn.Module) -> str:
    """Return the SHA-256 of all that a VAE encodes with, hexadecimal; fp32 weights on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cache_key(
    *, image_dir: Path, encoder: str, dtype: torch.dtype, device_type: str, image_size: int
) -> str:
    """Name the cache of these pictures under this VAE, 16 hexadecimal digits.

    Args:
        image_dir: ids are unique within it alone.
        encoder: hash_encoder's.
        dtype: what the VAE computes in.
        device_type: where it does: rounding differs.
        image_size: pixels along a side.
    """
    parts = [FORMAT_VERSION, str(image_dir.resolve()), encoder, str(dtype), device_type, image_size]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


class MomentsCache:
    """Moments by slot, in one folder that loader workers, ranks and runs share.

    Nothing that goes wrong with the disk ends a run: what can't be read is a miss, and when
    something can't be written, the run goes on without writing, and says so once.

    Args:
        folder: of this cache alone, made where it is missing.
        image_ids: (N,) int64, the id of each row of the index.
        moments_shape: (2C, h, w).
        min_free_bytes: writing ends before less than this is left of the disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        image_ids: np.ndarray,
        moments_shape: tuple[int, int, int],
        min_free_bytes: int = 0,
    ) -> None:
        self.folder = folder
        self.moments_shape = moments_shape
        self.min_free_bytes = min_free_bytes
        self.is_writable = True
        self._slot_bytes = _HEADER.size + 2 * int(np.prod(moments_shape))
        self._files: dict[tuple[str, int], int] = {}
        self._pictures = np.empty(0, dtype=np.int64)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with alone_in(folder):
                self._number_pictures(image_ids)
        except OSError as error:
            self._stop_writing(error.strerror or str(error))

    def _number_pictures(self, image_ids: np.ndarray) -> None:
        """Give each picture a number for ever: new ones come behind those that are known."""
        path = self.folder / _IDS_NAME
        try:
            known = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            known = np.empty(0, dtype=np.int64)
        ids = np.concatenate([known, np.setdiff1d(image_ids, known)])
        order = np.argsort(ids, kind="stable")
        self._pictures = order[np.searchsorted(ids, image_ids, sorter=order)]
        if len(ids) > len(known):
            with replace_atomically(path) as temporary, temporary.open("wb") as file:
                np.save(file, ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def slot(self, row: int, *, view: int, tag: int) -> Slot:
        """Return the slot of one view of an index's row."""
        picture = int(self._pictures[row]) if len(self._pictures) else row
        return Slot(picture, view, tag)

    def read(self, slot: Slot) -> np.ndarray | None:
        """Return a slot's moments, (2C, h, w) float16, or None where they must be encoded."""
        record = bytearray(self._slot_bytes)
        path, offset = self._place(slot)
        try:
            os.preadv(self._open(path, os.O_RDONLY), [record], offset)
        except OSError:  # not there yet, or a failing disk: encoding gives the same
            return None
        tag, checksum, _ = _HEADER.unpack_from(record)
        body = memoryview(record)[_HEADER.size :]
        if tag != slot.tag or zlib.crc32(body) != checksum:
            return None
        return np.frombuffer(body, dtype="<f2").reshape(self.moments_shape)

    def write(self, slot: Slot, moments: np.ndarray) -> None:
        """Keep a slot's moments, (2C, h, w) float16, if the disk has room."""
        if not self.is_writable:
            return
        body = np.ascontiguousarray(moments, dtype="<f2").tobytes()
        record = memoryview(_HEADER.pack(slot.tag, zlib.crc32(body), 0) + body)
        path, offset = self._place(slot)
        try:
            if self.min_free_bytes and free_bytes(self.folder) < self.min_free_bytes:
                self._stop_writing("half of the free disk is used")
                return
            descriptor = self._open(path, os.O_WRONLY | os.O_CREAT)
            while record:
                num_bytes = os.pwrite(descriptor, record, offset)
                record, offset = record[num_bytes:], offset + num_bytes
        except OSError as error:
            self._stop_writing(error.strerror or str(error))

    def full_bytes(self, *, num_slots: int) -> int:
        """Return what so many slots take on the disk."""
        return num_slots * self._slot_bytes

    def stored_bytes(self) -> int:
        """Return what the cache takes on the disk now."""
        if not self.folder.is_dir():
            return 0
        return sum(path.stat().st_blocks * 512 for path in self.folder.glob("*.moments"))

    def _place(self, slot: Slot) -> tuple[Path, int]:
        part, position = divmod(slot.picture, PICTURES_PER_FILE)
        name = f"view{slot.view:03d}-{part:05d}.moments"
        return self.folder / name, position * self._slot_bytes

    def _open(self, path: Path, flags: int) -> int:
        """Return a file's descriptor, opened once in each process."""
        key = (path.name, flags)
        if key not in self._files:
            self._files[key] = os.open(path, flags, 0o644)
        return self._files[key]

    def _stop_writing(self, reason: str) -> None:
        self.is_writable = False
        logger.warning("latents: no more are kept in %s: %s", self.folder, reason)


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk that a folder is, or would be, on."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def round_moments(moments: Tensor) -> np.ndarray:
    """Bring one picture's moments to what the cache keeps: (2C, h, w) -> float16 on the CPU.

    Raises:
        FloatingPointError: they are not finite: kept, they would spoil every later run.
    """
    rounded = moments.to(torch.float16)
    if not torch.isfinite(rounded).all():
        raise FloatingPointError(
            "the VAE must encode a picture to finite moments, got NaN or infinity. "
            "Use --precision 32."
        )
    return rounded.cpu().numpy()
