"""`hf-bnn card`: the model card of a binary model."""

from __future__ import annotations

import sys
from pathlib import Path

from ..tasks.errors import UsageError
from .common import Parser, load, one_line

HEADER = "---\nlibrary_name: transformers\ntags:\n- binary\n- hf_bnn\n---\n\n"


def card(words: list[str]) -> int:
    """Print a model card, or write it to a file.

    Args:
        words: MODEL and the options.

    Raises:
        UsageError: there is no such binary model, or the file exists already.
        CorruptCheckpointError: its files are damaged.
    """
    parser = Parser(
        "card",
        "Print the card of a binary model: its binary parts, its size, and how to load it.",
        "hf-bnn card my-model --name me/my-model --output my-model/README.md",
    )
    parser.add_model()
    parser.add_argument("--name", help="name of the repository on the Hub (default: the folder's name)")
    parser.add_argument("--output", metavar="FILE", help="write the card to a file, such as README.md")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    arguments = parser.parse_args(words)
    if arguments.output and Path(arguments.output).exists() and not arguments.overwrite:
        raise UsageError(f"{arguments.output} exists already: name another file, or give --overwrite")
    from ..model_card import body, facts_of
    from ..nn.packed import is_packed

    model = load(arguments.model, arguments.revision)
    path = Path(arguments.model)
    name = arguments.name or (path.resolve().name if path.is_dir() else arguments.model)
    text = HEADER + body(facts_of(model, packed=is_packed(model)), name)
    if not arguments.output:
        print(text, end="")
        return 0
    with one_line(arguments.output):
        Path(arguments.output).write_text(text, encoding="utf-8")
    print(f"written: {arguments.output}", file=sys.stderr)
    return 0
