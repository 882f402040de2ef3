"""The labels of an image run, and the model's class for each."""

from __future__ import annotations

from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedConfig

from ..errors import UsageError
from ..labels import (
    Labels,
    as_model_has_them,
    check_label_column,
    check_label_values,
    check_no_label_is_empty,
    labels_of_model,
)
from .arguments import Arguments
from .models import has_trained_head


def read_labels(arguments: Arguments, splits: dict[str, Any], config: PreTrainedConfig) -> Labels:
    """The labels of the data, and the model's class for each. Raises UsageError for labels that do not fit the model.

    The dataset's declaration comes first, then the values in the training set, then (for evaluation alone) the
    model's own labels.
    """
    column, model = arguments.data.label_column_name, arguments.model.model_name_or_path
    trained = model is not None and has_trained_head(config)
    for split, rows in splits.items():
        if rows.features is None:
            splits[split] = rows._resolve_features()
    splits = {split: rows for split, rows in splits.items() if split != "test"}
    if not splits:  # prediction alone: the model knows its classes
        if not trained:
            raise UsageError(
                f"--do_predict needs a trained classifier, and {model or 'a model from scratch'} is none: give "
                "--do_train too, or name one in --model_name_or_path"
            )
        return Labels([str(config.id2label[index]) for index in range(config.num_labels)], {})
    for split in splits:
        kinds = ("int", "uint", "bool", "string", "large_string")
        check_label_column(column, split, splits[split], kinds, "one integer or string per row")
    first = next(iter(splits.values()))
    kind, stored = first.features[column], isinstance(first, Dataset)
    if stored:
        for split, rows in splits.items():
            check_no_label_is_empty(column, split, rows[column][:])
    if isinstance(kind, ClassLabel):
        labels = Labels(list(kind.names), {index: index for index in range(kind.num_classes)})
    elif trained and ("train" not in splits or not stored):
        labels = labels_of_model(config, kind.dtype)
    elif stored:
        values = sorted(first.unique(column))
        labels = Labels([str(value) for value in values], {value: index for index, value in enumerate(values)})
    else:
        raise UsageError(
            f"the stream does not say which classes its column {column!r} has: leave out --streaming, or start from a "
            "model that was trained for them"
        )
    if trained and not arguments.model.ignore_mismatched_sizes:
        labels = as_model_has_them(labels, config, model)
    if stored:
        for split, rows in splits.items():
            check_label_values(labels, split, rows[column][:])
    return labels
