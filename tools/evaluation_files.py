"""What an evaluation leaves in its folder, and how it goes on where it was stopped.

settings.json   what the numbers depend on      scores.jsonl   one line a picture and hole
pictures/       first samples, as PNG           results.json, results.md, sheet*.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from inpainting.atomic import replace_atomically, write_text_atomically
from inpainting.scoreboard import Score, Summary

GAP_PX, HEADING_PX = 4, 20
SHORT_SHEET = ("given", "hole", "base alone", "ControlNet", "truth")
MIN_CELL_PX = 128  # small pictures are shown larger, pixel by pixel


@dataclass(frozen=True)
class Case:
    """One hole in one picture.

    Attributes:
        kind: the kind of hole.
        image_id: of the picture.
        truth: (H, W, 3) uint8, for the metrics alone.
        given: (H, W, 3) uint8, grey in the hole: what candidates see.
        mask: (H, W) uint8, 1 = hole.
        prompt: what the picture shows, in words.
    """

    kind: str
    image_id: int
    truth: np.ndarray
    given: np.ndarray
    mask: np.ndarray
    prompt: str


class Evaluation:
    """The scores so far, and the folder they are kept in.

    Attributes:
        folder: made when missing.
        settings: what the numbers depend on.
        scores: of all cases that are done.
    """

    def __init__(self, folder: Path, *, settings: Mapping[str, object]) -> None:
        """Open a new folder, or one that was stopped.

        Raises:
            FileExistsError: the folder holds an evaluation with other settings.
        """
        self.folder, self.settings = folder, dict(settings)
        path = folder / "settings.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(
                name for name in settings if found.get(name) != _plain(settings[name])
            )
            if differing:
                name = differing[0]
                raise FileExistsError(
                    f"--output_dir must be new or hold the same evaluation, got {folder} with "
                    f"another {', '.join(differing)} ({found.get(name)} there, {settings[name]} "
                    "now). Name another folder."
                )
        write_text_atomically(path, json.dumps(self.settings, indent=2) + "\n")
        self.scores = self._read_scores()

    def _read_scores(self) -> list[Score]:
        """Read what is done; a line that a kill has torn is written anew without it."""
        path = self.folder / "scores.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        write_text_atomically(path, "".join(whole))
        return [Score(**score) for line in whole for score in json.loads(line)]

    def add(
        self,
        case: Case,
        *,
        scores: Mapping[str, tuple[dict[str, float], int]],
        pictures: Mapping[str, np.ndarray],
    ) -> None:
        """Keep a case: its pictures first, its line of scores last.

        Args:
            case: what was filled.
            scores: candidate -> metrics and number of changed known pixels.
            pictures: candidate -> its first sample, (H, W, 3) uint8.
        """
        hole = np.repeat(case.mask[..., None] * np.uint8(255), 3, axis=2)
        for name, picture in {"given": case.given, "hole": hole, "truth": case.truth,
                              **pictures}.items():  # fmt: skip
            path = picture_path(self.folder, case.kind, image_id=case.image_id, name=name)
            with replace_atomically(path) as temporary:
                Image.fromarray(picture).save(temporary, format="PNG")
        new = [
            Score(case.kind, case.image_id, name, values, num_changed)
            for name, (values, num_changed) in scores.items()
        ]
        with (self.folder / "scores.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([asdict(score) for score in new]) + "\n")
        self.scores += new

    @property
    def candidates(self) -> list[str]:
        """Who filled the holes, in their order."""
        return list(dict.fromkeys(score.candidate for score in self.scores))

    def image_ids(self, kind: str) -> list[int]:
        """Return the pictures that have such a hole, ascending."""
        return sorted({score.image_id for score in self.scores if score.kind == kind})

    def write_results(
        self,
        summaries: Mapping[str, Sequence[Summary]],
        *,
        table: str,
        perceptual: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    ) -> None:
        """Write results.json and results.md.

        Args:
            summaries: kind of hole -> one summary a candidate.
            table: the same as Markdown.
            perceptual: kind -> candidate -> metric -> value, or None.
        """
        content: dict[str, Any] = {
            "settings": self.settings,
            "summaries": {k: [asdict(s) for s in of_kind] for k, of_kind in summaries.items()},
        }
        text = f"# How well the holes are filled\n\n{table}\n"
        if perceptual is not None:
            content["perceptual"] = perceptual
            text += f"\n```json\n{json.dumps(perceptual, indent=2)}\n```\n"
        text += f"\nSettings:\n\n```json\n{json.dumps(self.settings, indent=2)}\n```\n"
        write_text_atomically(self.folder / "results.json", json.dumps(content, indent=2) + "\n")
        write_text_atomically(self.folder / "results.md", text)


def picture_path(folder: Path, kind: str, *, image_id: int, name: str) -> Path:
    """Return where a case's picture lies: given, hole, truth, or a candidate's name."""
    return folder / "pictures" / kind / f"{image_id:012d}_{name.replace(' ', '_')}.png"


def write_sheets(evaluation: Evaluation, *, num_rows: int) -> None:
    """Write sheet_<kind>.png, everybody's first samples, and sheet.png, the networks' of all kinds.

    Args:
        evaluation: with at least one case.
        num_rows: pictures on each sheet.
    """
    folder = evaluation.folder
    kinds = list(dict.fromkeys(score.kind for score in evaluation.scores))
    for kind in kinds:
        cases = [(kind, image_id) for image_id in evaluation.image_ids(kind)[:num_rows]]
        names = ["given", *evaluation.candidates, "truth"]
        _write_sheet(folder / f"sheet_{kind}.png", folder=folder, cases=cases, names=names)
    ids = {kind: evaluation.image_ids(kind) for kind in kinds}
    turns = [kinds[row % len(kinds)] for row in range(num_rows)]
    cases = [(kind, ids[kind][row]) for row, kind in enumerate(turns) if row < len(ids[kind])]
    _write_sheet(folder / "sheet.png", folder=folder, cases=cases, names=SHORT_SHEET)


def _write_sheet(
    path: Path, *, folder: Path, cases: Sequence[tuple[str, int]], names: Sequence[str]
) -> None:
    """Put an evaluation's pictures on one sheet: a row a case, a column a name, with its heading.

    Args:
        path: a .png file.
        folder: the evaluation's.
        cases: kind of hole and id of the picture.
        names: as `picture_path` knows them.
    """
    rows = [
        [Image.open(picture_path(folder, kind, image_id=i, name=name)) for name in names]
        for kind, i in cases
    ]
    width, height = rows[0][0].size
    scale = max(1, round(MIN_CELL_PX / width))
    width, height = width * scale, height * scale
    size = ((width + GAP_PX) * len(names) - GAP_PX, HEADING_PX + (height + GAP_PX) * len(rows))
    sheet = Image.new("RGB", size, "white")
    ink = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        left = column * (width + GAP_PX)
        ink.text((left + width / 2, HEADING_PX / 2), name, fill="black", anchor="mm")
        for row, pictures in enumerate(rows):
            enlarged = pictures[column].resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, HEADING_PX + row * (height + GAP_PX)))
    with replace_atomically(path) as temporary:
        sheet.save(temporary, format="PNG")


def _plain(value: object) -> object:
    """Return a value as it comes back from JSON."""
    return json.loads(json.dumps(value))
