"""The one kind of error that a user can set right, and what is said of it. Needs nothing that takes time to import."""

from __future__ import annotations

import sys
from typing import Any


class UsageError(ValueError):
    """The user asked for what cannot be. The text names the value and the way out."""


def exit_code(error: Exception, name: str) -> int | None:
    """Print one line about an error to stderr, after the program's `name`.

    Returns:
        2 for what the user can set right, 1 for bad files and training that diverged. None for any other error, of
        which nothing is printed: it is a fault of the program.
    """
    from ..integrity import CorruptCheckpointError
    from ..training.checked_trainer import NonFiniteTrainingError

    if isinstance(error, UsageError):
        # From a worker of a DataLoader it comes with a traceback before it.
        text = str(error).strip().splitlines()[-1].rpartition(f"{UsageError.__name__}: ")[2]
        print(f"{name}: error: {text}", file=sys.stderr)
        return 2
    if isinstance(error, CorruptCheckpointError | NonFiniteTrainingError):
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return None


def shown(values: list[Any]) -> str:
    """The first of many values."""
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
