"""How a command answers what its user can cause: in one line, and by its exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import NoReturn

UNKNOWN = "unrecognized arguments: "  # argparse's words
LEAST_LIKENESS = 0.7  # of 1; --find_lr is to --lr 0.62


class OneLineParser(argparse.ArgumentParser):
    """argparse would print every flag first.

    Attributes:
        speaker: what the line begins with.
    """

    speaker = "error"

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        flag, _, words = message.partition(": ")
        if words.startswith(flag.removeprefix("argument ") + " "):
            message = words  # it names the flag itself
        if message.startswith(UNKNOWN):
            message += self._nearest_to(message.removeprefix(UNKNOWN).split(" ")[0])
        self.exit(2, f"{self.speaker}: {message.rstrip('.')}. --help shows every flag.\n")

    def _nearest_to(self, unknown: str) -> str:
        """Return in brackets the flag that was probably meant; "" where none comes near."""
        typed = unknown.partition("=")[0]
        names = get_close_matches(typed, self._option_string_actions, n=1, cutoff=LEAST_LIKENESS)
        return f" (did you mean {names[0]}?)" if names else ""


def module_parser(module: str, *, manual: str | None) -> OneLineParser:
    """Return an empty parser for `python -m MODULE`, whose docstring is its manual."""
    return OneLineParser(
        prog=f"python -m {module}", allow_abbrev=False, description=manual,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def answer(work: Callable[[], None]) -> int:
    """Do a tool's work.

    Returns:
        The exit code: 0; 2 where the user can put it right, which is said in one line; 130 after
        Ctrl-C.
    """
    try:
        work()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped. To go on: the same command again", file=sys.stderr)
        return 130
    return 0
