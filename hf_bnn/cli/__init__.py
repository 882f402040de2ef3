"""The command line: `hf-bnn COMMAND ...`, or `python -m hf_bnn COMMAND ...`.

    hf-bnn doctor
    hf-bnn train text --help

It is also an extension of the `hf` command. `hf extensions install OWNER/hf-bnn` takes a GitHub repository called
`hf-NAME` and installs its package into a separate environment. The package must have a console script of the same name:
`hf-bnn`, which pyproject.toml declares. `hf bnn COMMAND` then runs it.

Exit codes: 0 success; 1 a damaged file, or a check that found a problem; 2 a wrong command line; 130 stopped by the
user.
"""

from __future__ import annotations

import importlib
import os
import sys

from ..tasks.errors import UsageError, exit_code

PROGRAM = "hf-bnn"

# The module of each command, which is imported only when the command runs, and its purpose.
COMMANDS = {
    "train": ("train", "train, evaluate and pack a classifier of texts or images"),
    "predict": ("predict", "label texts or images with a saved classifier"),
    "pack": ("pack", "turn latent float weights into bits"),
    "summary": ("inspect", "count the binary weights of a model and their bytes"),
    "check": ("inspect", "find binary layers whose inputs carry no information"),
    "bench": ("bench", "time a binary model against its float form on this machine"),
    "compare": ("compare", "train with several methods and seeds, and compare them on your data"),
    "card": ("card", "write the model card"),
    "doctor": ("doctor", "show what is installed, and what will be slow"),
}


def usage() -> str:
    """The text of `hf-bnn --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Binary BERT, ViT and ResNet for Hugging Face: 1-bit weights and activations.",
            "",
            "commands:",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` explains a command. To begin: {PROGRAM} doctor",
        ]
    )


def main(command_line: list[str] | None = None) -> int:
    """Run a command.

    Args:
        command_line: the command and its arguments; None takes those of this process.

    Returns:
        The exit code. An error that the user can correct is not raised, but printed as one line on stderr.
    """
    words = sys.argv[1:] if command_line is None else list(command_line)
    if words[:1] in (["--help"], ["-h"]):
        print(usage())
        return 0
    if words[:1] == ["--version"]:
        print(f"{PROGRAM} {importlib.import_module('..', __name__).__version__}")
        return 0
    name = PROGRAM
    try:
        if not words or words[0] not in COMMANDS:
            given = f"unknown command {words[0]!r}" if words else "no command was given"
            raise UsageError(f"{given}; choose one of {', '.join(COMMANDS)} (see {PROGRAM} --help)")
        name = f"{PROGRAM} {words[0]}"
        module = importlib.import_module(f".{COMMANDS[words[0]][0]}", __name__)
        code = getattr(module, words[0])(words[1:])
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse, after --help
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hf-bnn ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code = exit_code(error, name)
        if code is None:
            raise
        return code
