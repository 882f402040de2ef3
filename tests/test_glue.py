"""GlueMetric against the formulas, and against metrics that are wrong."""

import math
from pathlib import Path

import numpy as np
import pytest

from hf_bnn.tasks.glue_metric import GLUE_METRICS, GlueMetric

PREDICTIONS, REFERENCES = [1, 0, 1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 1, 0, 1]
NUMBERS, TARGETS = [0.5, 2.0, 1.5, 4.0, 3.0], [0.0, 1.0, 2.0, 5.0, 4.5]


def confusion(predictions: list[int], references: list[int]) -> tuple[int, int, int, int]:
    """True positives, true negatives, false positives, false negatives."""
    pairs = list(zip(predictions, references, strict=True))
    return tuple(pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))


def accuracy(predictions: list[int], references: list[int]) -> dict[str, float]:
    hits = [p == r for p, r in zip(predictions, references, strict=True)]
    return {"accuracy": sum(hits) / len(hits)}


def accuracy_and_f1(predictions: list[int], references: list[int]) -> dict[str, float]:
    tp, _, fp, fn = confusion(predictions, references)
    return {**accuracy(predictions, references), "f1": 2 * tp / (2 * tp + fp + fn)}


def matthews(predictions: list[int], references: list[int]) -> dict[str, float]:
    tp, tn, fp, fn = confusion(predictions, references)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {"matthews_correlation": (tp * tn - fp * fn) / root}


def pearson(x: list[float], y: list[float]) -> float:
    dx, dy = np.array(x) - np.mean(x), np.array(y) - np.mean(y)
    return float((dx * dy).sum() / math.sqrt((dx**2).sum() * (dy**2).sum()))


def correlations(predictions: list[float], references: list[float]) -> dict[str, float]:
    ranks = [[sorted(values).index(value) for value in values] for values in (predictions, references)]
    return {"pearson": pearson(predictions, references), "spearmanr": pearson(*ranks)}


ORACLES = {
    "cola": matthews,
    "mrpc": accuracy_and_f1,
    "qqp": accuracy_and_f1,
    "stsb": correlations,
    **dict.fromkeys(("sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "hans", "ax"), accuracy),
}


def data_of(task: str) -> dict[str, list]:
    values = (NUMBERS, TARGETS) if task == "stsb" else (PREDICTIONS, REFERENCES)
    return dict(zip(("predictions", "references"), values, strict=True))


def test_every_task_has_an_oracle():
    assert ORACLES.keys() == GLUE_METRICS.keys()


@pytest.mark.parametrize("task", GLUE_METRICS)
def test_the_metric_is_the_formula(task: str):
    scores = GlueMetric(task).compute(**data_of(task))
    assert scores == pytest.approx(ORACLES[task](*data_of(task).values()), abs=1e-6)


@pytest.mark.parametrize("task", GLUE_METRICS)
def test_a_prediction_that_is_changed_changes_the_metric(task: str):
    data = data_of(task)
    data["predictions"] = [3.5 if task == "stsb" else 0, *data["predictions"][1:]]
    for key, score in GlueMetric(task).compute(**data).items():
        assert score < GlueMetric(task).compute(**data_of(task))[key] - 0.05


def test_spearmans_correlation_sees_order_alone():
    scores = GlueMetric("stsb").compute(predictions=[1.0, 2.0, 50.0], references=[1.0, 2.0, 3.0])
    assert scores["spearmanr"] == pytest.approx(1.0)
    assert scores["pearson"] < 0.9


@pytest.mark.parametrize("convert", [list, np.array], ids=["lists", "arrays"])
def test_batches_give_what_one_call_gives(convert):
    metric = GlueMetric("mrpc")
    for rows in (slice(0, 3), slice(3, 8)):
        metric.add_batch(predictions=convert(PREDICTIONS[rows]), references=convert(REFERENCES[rows]))
    assert metric.compute() == GlueMetric("mrpc").compute(predictions=PREDICTIONS, references=REFERENCES)


def test_a_metric_can_be_used_again():
    metric = GlueMetric("sst2")
    assert metric.compute(predictions=[1, 1], references=[1, 1]) == {"accuracy": 1.0}
    assert metric.compute(predictions=[0, 1], references=[1, 1]) == {"accuracy": 0.5}


def test_an_unknown_task_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown GLUE task 'sst3'; known tasks: cola, sst2, mrpc"):
        GlueMetric("sst3")


def test_predictions_and_references_must_be_as_many():
    with pytest.raises(ValueError, match=r"number of predictions \(2\) and references \(1\)"):
        GlueMetric("sst2").compute(predictions=[1, 0], references=[1])


def test_two_metrics_work_side_by_side_without_lock_files(tmp_path: Path):
    metrics = [GlueMetric("sst2", cache_dir=str(tmp_path)) for _ in range(2)]
    for metric in metrics:
        metric.add_batch(predictions=[1, 0], references=[1, 1])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert [metric.compute() for metric in metrics] == [{"accuracy": 0.5}] * 2
