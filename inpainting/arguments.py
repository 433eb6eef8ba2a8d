"""How a command answers a mistake in its arguments: in one line, with exit code 2."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """argparse would print every flag first.

    Attributes:
        speaker: what the line begins with; None for the command's name.
    """

    speaker: str | None = None

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        flag, _, words = message.partition(": ")
        if words.startswith(flag.removeprefix("argument ") + " "):
            message = words  # it names the flag itself
        speaker = self.speaker or self.prog
        self.exit(2, f"{speaker}: {message.rstrip('.')}. --help shows every flag.\n")
