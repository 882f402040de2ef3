"""The metrics of GLUE (arXiv 1804.07461) as an `evaluate.Metric` that downloads nothing."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Scores = dict[str, float]


def accuracy(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """The fraction of correct labels."""
    return {"accuracy": float(accuracy_score(references, predictions))}


def accuracy_and_f1(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """The fraction of correct labels, and the F1 score of label 1."""
    return {**accuracy(predictions, references), "f1": float(f1_score(references, predictions))}


def correlations(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """Pearson's and Spearman's correlation. If one side is constant: NaN, with a warning from scipy."""
    return {
        "pearson": float(pearsonr(predictions, references)[0]),
        "spearmanr": float(spearmanr(predictions, references)[0]),
    }


def matthews(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """Matthews' correlation coefficient. If one side is constant: 0."""
    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


GLUE_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Scores]] = {
    "cola": matthews,
    "sst2": accuracy,
    "mrpc": accuracy_and_f1,
    "qqp": accuracy_and_f1,
    "stsb": correlations,
    "mnli": accuracy,
    "mnli_matched": accuracy,
    "mnli_mismatched": accuracy,
    "qnli": accuracy,
    "rte": accuracy,
    "wnli": accuracy,
    "hans": accuracy,
    "ax": accuracy,
}


class GlueMetric(evaluate.Metric):
    """`evaluate.load("glue", task)` without the download: the same keys, computed by scikit-learn and scipy.

    Predictions are kept in memory, so processes do not wait for each other's lock files. Each process scores the rows
    that it receives: pass gathered predictions, as `Trainer` does. Raises ValueError for an unknown task.

    >>> GlueMetric("mrpc").compute(predictions=[1, 0, 1, 1], references=[1, 0, 0, 1])
    {'accuracy': 0.75, 'f1': 0.8}
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any):
        if config_name not in GLUE_METRICS:
            raise ValueError(f"unknown GLUE task {config_name!r}; known tasks: {', '.join(GLUE_METRICS)}")
        super().__init__(config_name, keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The metrics of the GLUE benchmark",
            citation="arXiv 1804.07461",
            inputs_description="predictions, references: labels, or numbers for stsb, `(n,)` each",
            features=datasets.Features({"predictions": number, "references": number}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> Scores:
        return GLUE_METRICS[self.config_name](np.asarray(predictions), np.asarray(references))
