"""`hf-bnn predict`: labels and scores from a saved classifier."""

from __future__ import annotations

import sys

from ..tasks.errors import UsageError
from .common import Parser, dump, extras, load, optimized
from .inputs import add_inputs, batches, read_inputs


def predict(words: list[str]) -> int:
    """Print the labels and scores of texts or images.

    Args:
        words: MODEL, its inputs, and the options.

    Raises:
        UsageError: there is no such classifier, or its inputs cannot be read.
        CorruptCheckpointError: its files are damaged.
    """
    parser = Parser(
        "predict",
        "Label texts or images with a saved classifier, on the CPU, with the kernels for 1-bit weights.\n"
        "A table with tabs between its columns goes to stdout: prediction, score, the probability of each class, and "
        "the input.",
        'hf-bnn predict my-model --text "a fine film" "a dull plot"',
    )
    parser.add_model()
    add_inputs(parser)
    parser.add_json()
    arguments = parser.parse_args(words)
    import torch
    from tqdm import tqdm

    with extras():
        from ..tasks.labels import Labels, labels_of_model
        from ..tasks.predictions import prediction_columns, write_columns

    model = load(arguments.model, arguments.revision)
    if not hasattr(model.config, "num_labels") or "Classification" not in type(model).__name__:
        raise UsageError(f"{arguments.model} holds a {type(model).__name__}, which is no classifier of texts or images")
    if "Token" in type(model).__name__:
        raise UsageError(f"{arguments.model} labels tokens, not whole texts: use transformers' pipeline")
    inputs = read_inputs(arguments, model)
    if inputs is None:
        raise UsageError("nothing to predict: give --text, --file or --images")
    optimized(model, arguments.model)
    found = []
    with torch.no_grad(), tqdm(total=inputs.count, unit=" rows", disable=None, file=sys.stderr) as bar:
        for rows, batch in batches(arguments, model, inputs):
            found.append(model(**batch).logits.float())
            bar.update(len(rows))
    kind = getattr(model.config, "problem_type", None)
    names = labels_of_model(model.config, "string").names
    regression = kind == "regression" or (kind is None and len(names) == 1)
    classes = {} if regression else {name: index for index, name in enumerate(names)}
    labels = Labels([] if regression else names, classes, regression, kind == "multi_label_classification")
    columns = prediction_columns(torch.cat(found).numpy(), labels, inputs.columns)
    if arguments.json:
        dump([dict(zip(columns, row, strict=True)) for row in zip(*map(numbers, columns.values()), strict=True)])
    else:
        write_columns(sys.stdout, columns)
    return 0


def numbers(column: list[str]) -> list[str | float]:
    """The column as numbers if every value is written with a decimal point, else as text."""
    try:
        return [float(value) for value in column] if all("." in value for value in column) else list(column)
    except ValueError:
        return list(column)
