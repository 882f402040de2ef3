"""Metrics of a classifier over all rows and per class. Accuracy alone hides small classes of an unbalanced set."""

from __future__ import annotations

import logging

import numpy as np
from transformers import Trainer

from .labels import Labels

COLUMNS = ("precision", "recall", "f1", "support")
CLASSES_IN_LOG = 50

Table = dict[str, dict[str, float]]  # by class, then by column


def first(logits: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    """The logits in a model's outputs, `(n, outputs)`."""
    return logits[0] if isinstance(logits, tuple) else logits


def predicted(logits: np.ndarray, labels: Labels) -> np.ndarray:
    """Predicted classes `(n,)`; for a regression numbers `(n,)`; for several labels per row, 1 or 0 `(n, classes)`."""
    if labels.regression:
        return logits[:, 0]
    return (logits > 0).astype(int) if labels.multi_label else logits.argmax(1)


def probabilities(logits: np.ndarray, labels: Labels) -> np.ndarray:
    """The probability of each class, `(n, classes)`: a softmax, or a sigmoid if several labels may apply to a row."""
    logits = logits.astype(np.float64)
    if labels.multi_label:
        return 1 / (1 + np.exp(-logits.clip(-700, 700)))
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


class ClassificationMetrics:
    """Accuracy (of whole rows) and the mean F1 of the classes. A call fills `table` with the figures of each class."""

    def __init__(self, labels: Labels, logger: logging.Logger):
        self.labels, self.logger = labels, logger
        self.table: Table = {}

    def __call__(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """The scores of the output of `predicted`. `references` has the same form."""
        from sklearn.metrics import f1_score, precision_recall_fscore_support  # prediction alone does not need it

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
        """Warn if the model predicts one class for every row although the rows have several."""
        if len(predictions) > 1 and len(set(predictions.tolist())) == 1 and len(set(references.tolist())) > 1:
            share = (references == predictions[0]).mean()
            self.logger.warning(
                f"all {len(predictions)} rows are taken for {self.labels.names[predictions[0]]!r}: the accuracy is "
                f"that class's share, {share:.1%}, no more; train longer, with another learning rate, or with as many "
                "rows of each class"
            )

    def log_table(self) -> None:
        """Log the figures of each class."""
        width = max(map(len, self.table), default=0)
        lines = [f"{'':{width}}  {'  '.join(f'{column:>9}' for column in COLUMNS)}"]
        for name, row in list(self.table.items())[:CLASSES_IN_LOG]:
            lines.append(f"{name:{width}}  {'  '.join(f'{row[column]:9.3f}' for column in COLUMNS[:-1])}")
            lines[-1] += f"  {row['support']:9.0f}"
        if len(self.table) > CLASSES_IN_LOG:
            lines.append(f"({len(self.table) - CLASSES_IN_LOG} more classes in eval_results.json)")
        self.logger.info("each class:\n" + "\n".join(lines))


def save_evaluation(trainer: Trainer, metrics: dict[str, float], tables: dict[str, Table]) -> None:
    """Write eval_results.json, which includes the figures of each class, and all_results.json, which does not."""
    trainer.save_metrics("eval", metrics)
    if tables:
        trainer.save_metrics("eval", {**metrics, **tables}, combined=False)
