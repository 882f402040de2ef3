"""How good a classifier is: of all rows, and of each class, which the accuracy of an unbalanced set hides."""

from __future__ import annotations

import logging

import numpy as np
from transformers import Trainer

from .labels import Labels

COLUMNS = ("precision", "recall", "f1", "support")
CLASSES_IN_LOG = 50

Table = dict[str, dict[str, float]]  # by class, then by column


def first(logits: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    """The logits among a model's outputs, `(n, outputs)`."""
    return logits[0] if isinstance(logits, tuple) else logits


def predicted(logits: np.ndarray, labels: Labels) -> np.ndarray:
    """Classes `(n,)`; numbers `(n,)` of a regression; where several labels may hold 1 or 0 of each, `(n, classes)`."""
    if labels.regression:
        return logits[:, 0]
    return (logits > 0).astype(int) if labels.multi_label else logits.argmax(1)


def probabilities(logits: np.ndarray, labels: Labels) -> np.ndarray:
    """Of each class, `(n, classes)`: a softmax, or where several labels may hold a sigmoid."""
    logits = logits.astype(np.float64)
    if labels.multi_label:
        return 1 / (1 + np.exp(-logits.clip(-700, 700)))
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


class ClassificationMetrics:
    """Accuracy (of whole rows) and the mean F1 of the classes; then `table` has the figures of each class."""

    def __init__(self, labels: Labels, logger: logging.Logger):
        self.labels, self.logger = labels, logger
        self.table: Table = {}

    def __call__(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """The scores of what is `predicted`, against classes or 1 and 0 of each."""
        from sklearn.metrics import f1_score, precision_recall_fscore_support  # predictions alone do without it

        names, references = self.labels.names, references.astype(int)
        if self.labels.multi_label:
            right = (predictions == references).all(1)
            more = {"micro_f1": float(f1_score(references, predictions, average="micro", zero_division=0))}
        else:
            right, more = predictions == references, {}
            self.warn_of_one_class(predictions, references)
        columns = precision_recall_fscore_support(
            references, predictions, labels=list(range(len(names))), zero_division=0
        )
        self.table = {
            name: dict(zip(COLUMNS, map(float, values), strict=True))
            for name, *values in zip(names, *columns, strict=True)
        }
        found = [row["f1"] for row in self.table.values() if row["support"] > 0]
        return {"accuracy": float(right.mean()), **more, "macro_f1": float(np.mean(found))}

    def warn_of_one_class(self, predictions: np.ndarray, references: np.ndarray) -> None:
        """Say so if every row is taken for the same class, but is not."""
        if len(predictions) > 1 and len(set(predictions.tolist())) == 1 and len(set(references.tolist())) > 1:
            share = (references == predictions[0]).mean()
            self.logger.warning(
                f"all {len(predictions)} rows are taken for {self.labels.names[predictions[0]]!r}: the accuracy is "
                f"that class's share, {share:.1%}, no more; train longer, with another learning rate, or with as many "
                "rows of each class"
            )

    def log_table(self) -> None:
        """Write the figures of each class to the log."""
        width = max(map(len, self.table), default=0)
        lines = [f"{'':{width}}  {'  '.join(f'{column:>9}' for column in COLUMNS)}"]
        for name, row in list(self.table.items())[:CLASSES_IN_LOG]:
            lines.append(f"{name:{width}}  {'  '.join(f'{row[column]:9.3f}' for column in COLUMNS[:-1])}")
            lines[-1] += f"  {row['support']:9.0f}"
        if len(self.table) > CLASSES_IN_LOG:
            lines.append(f"({len(self.table) - CLASSES_IN_LOG} more classes in eval_results.json)")
        self.logger.info("each class:\n" + "\n".join(lines))


def save_evaluation(trainer: Trainer, metrics: dict[str, float], tables: dict[str, Table]) -> None:
    """Write eval_results.json, with the figures of each class by their keys, and all_results.json without them."""
    trainer.save_metrics("eval", metrics)
    if tables:
        trainer.save_metrics("eval", {**metrics, **tables}, combined=False)
