"""The table of predictions that `--do_predict` writes."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from transformers import Trainer

from .classification_metrics import first, predicted, probabilities
from .labels import Labels

SCORED_CLASSES = 20  # with more classes, the table has no columns for their probabilities


def predict_in_order(trainer: Trainer, dataset: Any) -> np.ndarray:
    """The logits of a dataset, `(n, outputs)`, in the order of its rows."""
    strategy = trainer.args.train_sampling_strategy
    trainer.args.train_sampling_strategy = "random"  # "group_by_length" would sort the rows of predictions too
    try:
        return first(trainer.predict(dataset, metric_key_prefix="predict").predictions)
    finally:
        trainer.args.train_sampling_strategy = strategy


def prediction_columns(
    logits: np.ndarray, labels: Labels, inputs: dict[str, Iterable[Any]]
) -> dict[str, Iterable[Any]]:
    """The table of predictions, by column. `inputs`: the columns that identify each row.

    Order: `index`, if `inputs` has it; `prediction`; for classes `score` (the probability of the prediction) and the
    probability of each class; then the remaining inputs.
    """
    inputs, values = dict(inputs), predicted(logits, labels)
    columns: dict[str, Iterable[Any]] = {"index": inputs.pop("index")} if "index" in inputs else {}
    if labels.regression:
        columns["prediction"] = [f"{value:.6g}" for value in values]
    else:
        chances = probabilities(logits, labels)
        columns["prediction"] = [said(value, labels) for value in values]
        if not labels.multi_label:
            columns["score"] = [f"{row.max():.6f}" for row in chances]
        if len(labels.names) <= SCORED_CLASSES or labels.multi_label:
            columns |= {f"p({name})": [f"{p:.6f}" for p in chances[:, i]] for i, name in enumerate(labels.names)}
    return columns | inputs


def write_columns(file: TextIO, columns: dict[str, Iterable[Any]]) -> None:
    """Write a tsv file. Fields with tabs, quotes or line breaks are quoted as in a csv file."""
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))


def write_predictions(path: Path, logits: np.ndarray, labels: Labels, inputs: dict[str, Iterable[Any]]) -> None:
    """Write the columns of `prediction_columns` as a tsv file with a row for each prediction."""
    with path.open("w", encoding="utf-8", newline="") as file:
        write_columns(file, prediction_columns(logits, labels, inputs))


def said(value: Any, labels: Labels) -> str:
    """The name of the predicted class, or the names of all classes that apply."""
    if labels.multi_label:
        return ",".join(name for name, holds in zip(labels.names, value, strict=True) if holds)
    return labels.names[value]
