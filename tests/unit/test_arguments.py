"""A command answers what its user can cause in one line, and by its exit code."""

from __future__ import annotations

import pytest

from inpainting import flags, infer_flags
from inpainting.arguments import answer
from tools import evaluate, export


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("--seed must\nbe so,   got 1."), 2, "error: --seed must be so, got 1."),
        (FileNotFoundError("no such file"), 2, "error: no such file"),
        (FloatingPointError("too large"), 2, "error: too large"),
        (KeyboardInterrupt(), 130, "stopped. To go on: the same command again"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(lambda: fail(error)) == code
    assert capsys.readouterr().err == line + "\n"


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        answer(lambda: fail(KeyError("ours")))
    assert answer(lambda: None) == 0


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--learnig_rate", "1e-5"], " (did you mean --learning_rate?)"),
        (["--learning-rate=1e-5"], " (did you mean --learning_rate?)"),
        (["stray.jpg"], ""),
        ([""], ""),
        (["--lr", "1e-5"], ""),  # --find_lr would be another thing
    ],
)
def test_an_unknown_flag_is_answered_with_the_nearest_one(
    typed: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        flags.build_parser().parse_args(typed)
    expected = f"error: unrecognized arguments: {' '.join(typed)}{meant}. --help shows every flag."
    assert capsys.readouterr().err == expected + "\n"


@pytest.mark.parametrize(
    ("command", "speaker"), [(evaluate, "error"), (export, "error"), (infer_flags, "infer.py")]
)
def test_a_mistake_in_the_flags_is_one_line(
    command, speaker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.build_parser().parse_args(["--no_such_flag"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{speaker}: "), line
    assert line.endswith(". --help shows every flag."), line
