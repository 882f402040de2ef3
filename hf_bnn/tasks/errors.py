"""The error type for mistakes that the user can correct, and how it is printed. Imports nothing slow."""

from __future__ import annotations

import sys
from typing import Any


class UsageError(ValueError):
    """The user asked for something impossible. The message names the wrong value and what to do instead."""


def exit_code(error: Exception, name: str) -> int | None:
    """Print one line about an error to stderr, after the program's `name`.

    Returns:
        2 for an error that the user can correct, 1 for a damaged file or training that diverged, 75 for a run that a
        signal has ended early. None for any other error: it is a bug, and nothing is printed.
    """
    from ..integrity import CorruptCheckpointError
    from ..training.interruption import UNFINISHED, UnfinishedRunError
    from ..training.nonfinite import NonFiniteTrainingError

    if isinstance(error, UsageError):
        # An error from a DataLoader's worker starts with that worker's traceback.
        text = str(error).strip().splitlines()[-1].rpartition(f"{UsageError.__name__}: ")[2]
        print(f"{name}: error: {text}", file=sys.stderr)
        return 2
    if isinstance(error, CorruptCheckpointError | NonFiniteTrainingError):
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if isinstance(error, UnfinishedRunError):
        print(f"{name}: {error}", file=sys.stderr)
        return UNFINISHED
    return None


def shown(values: list[Any]) -> str:
    """The first ten values, separated by commas."""
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
