"""The labels of a text run, and the model's class for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from ..errors import UsageError, shown
from ..labels import Labels, as_model_has_them, labels_of_model
from .arguments import Arguments
from .models import has_trained_head
from .rows import Split

DTYPES = {"str": "string", "int": "int64", "bool": "bool", "list": "string"}


def read_labels(arguments: Arguments, splits: dict[str, Split], config: PreTrainedConfig) -> Labels:
    """The labels of the data, and the model's class for each. A row with an unknown label gets a fault.

    The dataset's declaration comes first, then the values in the training set, then (for evaluation alone) the
    model's own labels. Raises UsageError for labels that do not fit the model.
    """
    labelled = {name: split for name, split in splits.items() if split.labels is not None}
    if not labelled:  # prediction alone: the model knows its classes
        names = [str(config.id2label[index]) for index in range(config.num_labels)]
        return Labels(names, {}, config.num_labels == 1, config.problem_type == "multi_label_classification")
    model, trained = arguments.model, has_trained_head(config) and not arguments.model.ignore_mismatched_sizes
    source = labelled.get("train") or next(iter(labelled.values()))
    labels = labels_of_data(arguments, source, config)
    if trained:
        labels = as_model_has_them(labels, config, model.model_name_or_path)
    for split in labelled.values():
        note_unknown_labels(split, labels, arguments.data.label_column_name)
    return labels


def labels_of_data(arguments: Arguments, split: Split, config: PreTrainedConfig) -> Labels:
    """The labels that this split defines, in the order of their values."""
    task, several = arguments.data.task_name, split.kind == "list"
    of_model = split.name != "train" and has_trained_head(config)
    if task == "stsb" or (task is None and (split.kind == "float" or (of_model and config.num_labels == 1))):
        return Labels([], {}, True)
    if split.names is not None:
        labels = Labels(split.names, {index: index for index in range(len(split.names))})
    elif of_model:
        values = unique(split)
        labels = labels_of_model(config, "int64" if _all_numbers(values) else DTYPES[split.kind])
    else:
        values = unique(split)
        labels = Labels([str(value) for value in values], {value: index for index, value in enumerate(values)})
        if len(values) == 1 and not several:
            raise UsageError(
                f"{split.where} has only one label, {values[0]!r}: a classifier needs two or more; is "
                f"{arguments.data.label_column_name!r} the column of the labels?"
            )
    return replace(labels, multi_label=several)


def _all_numbers(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, int) for value in values)


def unique(split: Split) -> list[Any]:
    """The distinct labels of the usable rows, sorted."""
    usable = [value for row, value in enumerate(split.labels) if row not in split.faults]
    if split.kind == "list":
        usable = [label for value in usable for label in value]
    if len({type(label) for label in usable}) > 1:
        usable = [str(label) for label in usable]
    return sorted(set(usable))


def note_unknown_labels(split: Split, labels: Labels, column: str) -> None:
    """Add a fault to every row with an unknown label."""
    if labels.regression:
        return
    known = f"none of the {len(labels.classes)} labels ({shown(list(labels.classes))})"
    for row, value in enumerate(split.labels):
        if row in split.faults:
            continue
        if isinstance(value, list) != labels.multi_label:
            expected = "a list of labels" if labels.multi_label else "one label"
            split.add_fault(row, f"has the {column!r} {value!r}: expected {expected}, as in the training data")
            continue
        each = value if labels.multi_label else [value]
        unknown = [label for label in each if labels.class_of(label) is None]
        if unknown:
            split.add_fault(row, f"has the label {unknown[0]!r}, which is {known}")
        elif len(set(each)) < len(each):
            split.add_fault(row, f"has a label twice in {value}: expected those that hold, not 1 or 0 of each")
