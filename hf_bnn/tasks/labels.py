"""Maps the values of a label column to the classes of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig

from .errors import UsageError, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """The labels of a dataset, and the model's class for each of their values."""

    names: list[str]  # by the model's class; empty for a regression
    classes: dict[Any, int]  # by value in the data
    regression: bool = False
    multi_label: bool = False  # several labels may apply to a row

    @property
    def count(self) -> int:
        """The model's number of outputs."""
        return 1 if self.regression else len(self.names)

    @property
    def problem_type(self) -> str:
        """The name in transformers' configs."""
        if self.regression:
            return "regression"
        return "multi_label_classification" if self.multi_label else "single_label_classification"

    @cached_property
    def by_text(self) -> dict[str, int]:
        """Classes by label text. One file may hold numbers where another holds the same numbers as strings."""
        return {str(value): index for value, index in self.classes.items()}

    def class_of(self, value: Any) -> int | None:
        """The class of a label; None for an unknown label."""
        found = self.classes.get(value)
        return self.by_text.get(str(value)) if found is None else found

    def target(self, value: Any) -> float | int | list[float]:
        """The loss's target for a label: a number, a class, or for several labels a 1 or 0 per class."""
        if self.regression:
            return float(value)
        if not self.multi_label:
            return self.class_of(value)
        holds = {self.class_of(label) for label in value}
        return [float(index in holds) for index in range(len(self.names))]


def names_of(config: PreTrainedConfig) -> list[str] | None:
    """The names of a classifier's classes, in order; None if they are only LABEL_0, LABEL_1, ..."""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names


def labels_of_model(config: PreTrainedConfig, dtype: str) -> Labels:
    """The labels of a trained classifier, as values of a column of this type."""
    names = names_of(config) or [f"LABEL_{index}" for index in range(config.num_labels)]
    if "string" in dtype:
        return Labels(names, {name: index for index, name in enumerate(names)})
    if all(name.lstrip("-").isdigit() for name in names):
        return Labels(names, {int(name): index for index, name in enumerate(names)})
    return Labels(names, {index: index for index in range(len(names))})


def as_model_has_them(labels: Labels, config: PreTrainedConfig, model: str) -> Labels:
    """The labels in the order of a trained classifier's classes. Raises UsageError if their counts differ."""
    if labels.count != config.num_labels:
        what = "numbers (a regression)" if labels.regression else f"{labels.count} labels ({shown(labels.names)})"
        raise UsageError(
            f"the data has {what}, but {model} was trained for {config.num_labels} "
            f"({shown(list(config.id2label.values()))}): choose another model, or train a new head with "
            "--ignore_mismatched_sizes"
        )
    names = names_of(config)
    if labels.regression or names is None:
        return labels
    by_name = {name.lower(): index for index, name in enumerate(names)}
    if by_name.keys() == {name.lower() for name in labels.names}:
        classes = {value: by_name[labels.names[index].lower()] for value, index in labels.classes.items()}
        return replace(labels, names=names, classes=classes)
    logger.warning(
        f"{model} was trained for the labels {shown(names)}, the data has {shown(labels.names)}: they are taken in "
        "this order, which may exchange classes"
    )
    return labels


def set_labels(config: PreTrainedConfig, labels: Labels) -> None:
    """Set the number and the names of a config's outputs, in place."""
    config.num_labels = labels.count
    config.problem_type = labels.problem_type
    if labels.names:
        config.id2label = dict(enumerate(labels.names))
        config.label2id = {name: index for index, name in enumerate(labels.names)}


def check_label_values(labels: Labels, split: str, values: list[Any]) -> None:
    """Raise UsageError for the first row with an unknown label."""
    known = labels.classes
    unknown = [] if labels.regression else [row for row, value in enumerate(values) if value not in known]
    if unknown:
        raise UsageError(
            f"row {unknown[0]} of the {split} data has the label {values[unknown[0]]!r}, which is none of the "
            f"{len(known)} labels ({shown(list(known))}); {len(unknown)} rows have such a label: correct or drop them"
        )


def check_has_labels(name: str, where: str, columns: Iterable[str]) -> None:
    """Raise UsageError unless there is a column of this name."""
    if name not in columns:
        raise UsageError(
            f"{where} has no column {name!r}; columns: {', '.join(columns)}: name the one with the labels in "
            "--label_column_name"
        )


def check_label_column(name: str, split: str, found: Any, kinds: tuple[str, ...], expected: str) -> None:
    """Raise UsageError unless the split has a column of this name and of one of these types."""
    check_has_labels(name, f"the {split} data", found.features)
    kind = getattr(found.features[name], "dtype", None)
    if kind is None or not kind.startswith(kinds):
        raise UsageError(f"the column {name!r} of the {split} data holds {found.features[name]}: expected {expected}")


def check_no_label_is_empty(name: str, split: str, values: list[Any]) -> None:
    """Raise UsageError for the first row without a label."""
    empty = [row for row, value in enumerate(values) if value is None or value != value]  # NaN is not itself
    if empty:
        raise UsageError(f"row {empty[0]} of the {split} data has no {name!r} ({len(empty)} rows in all)")


def check_same_order(what: str, teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raise UsageError if a teacher (called `what`) has a different number or order of labels than the student."""
    if teacher.num_labels != student.num_labels:
        raise UsageError(f"{what} has {teacher.num_labels} labels, the data has {student.num_labels}: they must agree")
    own, theirs = names_of(student), names_of(teacher)
    if own and theirs and own != theirs and {n.lower() for n in own} == {n.lower() for n in theirs}:
        ordered = [name.lower() for name in own] == [name.lower() for name in theirs]
        if not ordered:
            raise UsageError(
                f"{what} has the labels in the order {shown(theirs)}, the student in the order {shown(own)}: "
                "train the teacher on the same data"
            )
