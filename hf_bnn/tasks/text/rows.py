"""The splits of a text run: rows of a dataset or a file, and which of them are unusable, with their positions."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from datasets import List as ListOf

from ..errors import UsageError
from ..labels import check_has_labels
from .arguments import TASK_COLUMNS, DataTrainingArguments
from .files import Table, converted, kind_of, shortened

logger = logging.getLogger(__name__)

# The text columns if none are named: the first of these tuples whose columns all exist.
USUAL_COLUMNS = (*dict.fromkeys(c for c in TASK_COLUMNS.values() if len(c) == 2), ("sentence",), ("text",))
STRINGS = ("string", "large_string", "string_view")
KINDS = {"int": "int", "uint": "int", "bool": "bool", "float": "float", **dict.fromkeys(STRINGS, "str")}
PLURALS = {"int": "integers", "bool": "true or false", "float": "numbers", "str": "strings", "list": "lists"}
EXPECTED = "one integer, string or float per row, or lists of integers or strings"
LIST = re.compile(r"\[.*\]", re.DOTALL)
SHOWN = 10  # faults of a split that a message lists


@dataclass
class Split:
    """Rows with their texts and, unless these are to be predicted, their labels."""

    name: str
    where: str  # a file, or "the train data"
    rows: Dataset
    texts: tuple[str, ...]  # the columns of the texts
    labels: list[Any] | None = None
    kind: str = "int"  # of the labels: int, bool, str, float, or list
    names: list[str] | None = None  # the names of the labels 0, 1, ..., if the dataset declares them
    lines: list[int] | None = None
    faults: dict[int, list[str]] = field(default_factory=dict)
    indices: np.ndarray | None = None  # the usable rows; None: all

    def place(self, row: int) -> str:
        """The position of a row, for messages."""
        return f"row {row}" if self.lines is None else f"line {self.lines[row]}"

    def add_fault(self, row: int, fault: str) -> None:
        """Record why a row cannot be used."""
        self.faults.setdefault(row, []).append(fault)


def from_table(name: str, path: str, table: Table, data: DataTrainingArguments, labelled: bool) -> Split:
    """The rows of a file. A value of another type than its column's is a fault."""
    written, label = not path_is_json(path), data.label_column_name
    is_text = {column: kind_of(values, written) == "str" for column, values in table.columns.items()}
    texts = text_columns(data, is_text)
    kept = {column: [_text(value) for value in table.columns[column]] for column in texts}
    split = Split(name, path, Dataset.from_dict(kept), texts, lines=table.lines)
    for row, fault in table.faults.items():
        split.add_fault(row, fault)
    for column in texts:
        for row, value in enumerate(table.columns[column]):
            if not isinstance(value, str) or not value.strip():
                found = "" if value is None or isinstance(value, str) else f" (but {shortened(value)})"
                split.add_fault(row, f"has no text in {column!r}{found}")
    if labelled:
        check_has_labels(label, path, list(table.columns))
        take_labels(split, table.columns[label], data, written)
    return split


def path_is_json(path: str) -> bool:
    """Whether a file has types of its own."""
    return ".json" in path.rpartition("/")[2].lower()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def take_labels(split: Split, values: list[Any], data: DataTrainingArguments, written: bool) -> None:
    """The labels of a file, all of the type that most of them have."""
    column = data.label_column_name
    split.kind = {"class": "str", "number": "float"}.get(data.label_type) or kind_of(values, written)
    if split.kind not in PLURALS:
        raise UsageError(f"the column {column!r} of {split.where} holds {split.kind}s: expected {EXPECTED}")
    if written and split.kind == "str" and all(value is None or LIST.fullmatch(value.strip()) for value in values):
        raise UsageError(
            f"the column {column!r} of {split.where} holds lists, which a csv has as text only: save the data as jsonl "
            "or parquet"
        )
    split.labels = []
    for row, value in enumerate(values):
        try:
            if data.label_type == "class" and value is not None and not isinstance(value, list):
                value = str(value)
            split.labels.append(converted(value, split.kind, written))
            if split.kind == "list" and not all(type(label) in (str, int) for label in value or ()):
                split.add_fault(row, f"has the {column!r} {shortened(value)}: expected a list of strings or integers")
        except ValueError:
            split.add_fault(
                row,
                f"has the {column!r} {shortened(value)}, but most are {PLURALS[split.kind]} (--label_type class takes "
                "each as it is written)",
            )
            split.labels.append(None)
    note_empty_labels(split, column)


def note_empty_labels(split: Split, column: str) -> None:
    """Add a fault to every row without a label, or with a label that is not finite."""
    for row, value in enumerate(split.labels):
        if row not in split.faults and (value is None or (split.kind == "float" and not np.isfinite(value))):
            split.add_fault(row, f"has no {column!r}" if value is None else f"has the {column!r} {value}")


def from_dataset(name: str, where: str, rows: Dataset, data: DataTrainingArguments, labelled: bool) -> Split:
    """The rows of a dataset, with the types that it declares."""
    is_text = {column: getattr(kind, "dtype", None) in STRINGS for column, kind in rows.features.items()}
    split = Split(name, where, rows, text_columns(data, is_text))
    for column in split.texts:
        if not is_text[column]:
            raise UsageError(f"the column {column!r} of {where} holds {rows.features[column]}: expected text")
        values = rows.with_format("arrow")[column][:]
        for row in np.flatnonzero(values.is_null().to_numpy()):
            split.add_fault(int(row), f"has no text in {column!r}")
    if labelled:
        label = data.label_column_name
        check_has_labels(label, where, rows.column_names)
        feature, split.labels = rows.features[label], rows[label][:]
        split.kind, split.names = kind_of_feature(feature, label, where)
        if data.label_type == "number" and split.kind in ("int", "float"):
            split.kind, split.names = "float", None
        elif data.label_type == "class" and split.names is None and split.kind != "list":
            split.kind, split.labels = "str", [None if value is None else str(value) for value in split.labels]
        note_empty_labels(split, label)
    return split


def kind_of_feature(feature: Any, column: str, where: str) -> tuple[str, list[str] | None]:
    """The kind of labels in a column, and the names that it declares."""
    each = feature.feature if isinstance(feature, ListOf) else feature
    dtype = getattr(each, "dtype", "") if isinstance(each, Value | ClassLabel) else ""
    kind = next((kind for start, kind in KINDS.items() if dtype.startswith(start)), None)
    if kind is None or (isinstance(feature, ListOf) and kind in ("float", "bool")):
        raise UsageError(f"the column {column!r} of {where} holds {feature}: expected {EXPECTED}")
    names = list(each.names) if isinstance(each, ClassLabel) else None
    return "list" if isinstance(feature, ListOf) else kind, names


def text_columns(data: DataTrainingArguments, is_text: dict[str, bool]) -> tuple[str, ...]:
    """The one or two columns that hold the text. `is_text`: whether a column holds strings, by name."""
    if data.text_column_names is not None:
        chosen = tuple(name.strip() for name in data.text_column_names.split(","))
        unknown = [name for name in chosen if name not in is_text]
        if unknown or len(chosen) > 2:
            what = f"there is no column {unknown[0]!r}" if unknown else "at most two columns can be read"
            raise UsageError(f"text_column_names={data.text_column_names!r}: {what}; columns: {', '.join(is_text)}")
        return chosen
    if data.task_name is not None:
        return TASK_COLUMNS[data.task_name]
    texts = [name for name, holds_text in is_text.items() if holds_text and name != data.label_column_name]
    for usual in USUAL_COLUMNS:
        if set(usual) <= set(texts):
            return usual
    if len(texts) not in (1, 2):
        raise UsageError(
            f"cannot tell which columns hold the text; columns: {', '.join(is_text)}: "
            "name one, or two separated by a comma, in --text_column_names"
        )
    return tuple(texts)


# Rows that cannot be used


def without_faults(splits: dict[str, Split], drop: bool) -> None:
    """Leave out the rows with faults if `drop` is true, else raise a UsageError that describes them."""
    faulty = [split for split in splits.values() if split.faults]
    if faulty and not drop:
        told = "; ".join(dict.fromkeys(map(described, faulty)))  # one file may serve as two splits
        raise UsageError(f"{told}: correct these rows, or leave them out with --drop_empty_rows")
    for split in faulty:
        logger.warning(f"left out: {described(split)}")
        split.indices = np.setdiff1d(np.arange(len(split.rows)), list(split.faults))
        if not len(split.indices):
            raise UsageError(f"no row is left of {described(split)}")


def described(split: Split) -> str:
    """A description of the faults of a split. It lists the first ones."""
    rows = sorted(split.faults)
    texts = [f"{split.place(row)} {' and '.join(split.faults[row])}" for row in rows[:SHOWN]]
    more = f", and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{split.where} ({len(rows)} of {len(split.rows)} rows): {', '.join(texts)}{more}"
