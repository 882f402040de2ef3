"""`hf-bnn train`: the same tasks as scripts/run_glue.py and scripts/run_image_classification.py."""

from __future__ import annotations

import importlib
import sys

from ..tasks.errors import UsageError
from .common import Parser, extras

KINDS = ("text", "images")


def train(words: list[str]) -> int:
    """Train, evaluate or predict.

    Args:
        words: "text" or "images", then the arguments of the task.

    Raises:
        UsageError: an argument is wrong, or a package is missing.
    """
    parser = Parser(
        "train",
        "Train, evaluate and pack a binary classifier. All further arguments belong to the task: "
        "`hf-bnn train text --help` lists them.",
        "hf-bnn train text --model_name_or_path google-bert/bert-base-uncased --train_file train.csv "
        "--validation_file test.csv --method surge --do_train --do_eval --output_dir my-model",
    )
    parser.add_argument("kind", choices=KINDS, help="what the classifier reads")
    kind = parser.parse_args(words[:1]).kind
    train_task(kind, words[1:])
    return 0


def train_task(kind: str, words: list[str]) -> dict[str, float]:
    """Train, evaluate or predict with the text or the image task. Returns what all_results.json holds."""
    if kind not in KINDS:
        raise UsageError(f"{kind!r} is no kind of data: choose one of {', '.join(KINDS)}")
    with extras():
        task = importlib.import_module(f"..tasks.{kind}.run", __package__)
    before = sys.argv
    sys.argv = [f"hf-bnn train {kind}", *words]  # the task's help and its messages name the program
    try:
        with extras():
            return task.main(words)
    finally:
        sys.argv = before
