"""The contact sheet: training samples side by side with what the ControlNet sees of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL_PX = 192
GAP_PX = 8
TEXT_PX = 280
LINE_PX = 18
LETTERS_PER_LINE = 36
MARK = (255, 0, 200)  # stands for -1, which is no colour
HEADINGS = ("picture", "hole", "seen (magenta: -1)", "prompt")


@dataclass(frozen=True)
class SheetRow:
    """One sample.

    Attributes:
        image: (H, W, 3) uint8 RGB, square.
        mask: (H, W) uint8, 1 = hole.
        conditioning: (3, H, W) float32, [0, 1] with -1 in the hole.
        title: which picture it is.
        prompt: in words, "" for none.
    """

    image: np.ndarray
    mask: np.ndarray
    conditioning: np.ndarray
    title: str
    prompt: str


def draw_contact_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """Draw one line a sample: the picture, its hole in white, what is seen, the prompt."""
    font = ImageFont.load_default(size=14)
    width = 3 * (CELL_PX + GAP_PX) + TEXT_PX
    sheet = Image.new("RGB", (width, LINE_PX + GAP_PX + len(rows) * (CELL_PX + GAP_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [column * (CELL_PX + GAP_PX) for column in range(4)]
    for left, heading in zip(lefts, HEADINGS, strict=True):
        draw.text((left, 0), heading, fill="black", font=font)
    for number, row in enumerate(rows):
        top = LINE_PX + GAP_PX + number * (CELL_PX + GAP_PX)
        hole = np.repeat(row.mask[..., None] * np.uint8(255), 3, axis=2)
        for left, panel in zip(lefts, (row.image, hole, show_conditioning(row)), strict=False):
            cell = Image.fromarray(panel).resize((CELL_PX, CELL_PX), Image.Resampling.BOX)
            sheet.paste(cell, (left, top))
        words = textwrap.wrap(row.prompt, LETTERS_PER_LINE) or ["(none)"]
        lines = [row.title, *words][: CELL_PX // LINE_PX]
        for line_number, line in enumerate(lines):
            draw.text((lefts[3], top + line_number * LINE_PX), line, fill="black", font=font)
    return sheet


def show_conditioning(row: SheetRow) -> np.ndarray:
    """Make what the ControlNet sees visible, (H, W, 3) uint8: what is -1 gets a colour."""
    seen = np.moveaxis(row.conditioning, 0, 2)
    shown = np.rint(seen.clip(0, 1) * 255).astype(np.uint8)
    shown[(seen == -1).all(axis=2)] = MARK
    return shown
