"""The reports of the training scripts besides the accuracy: per-class figures, one class throughout, predictions."""

import csv
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import classification_report, f1_score

from hf_bnn.tasks.classification_metrics import ClassificationMetrics, predicted, probabilities, save_evaluation
from hf_bnn.tasks.labels import Labels
from hf_bnn.tasks.predictions import predict_in_order, write_predictions

THREE = Labels(["a", "b", "c"], {"a": 0, "b": 1, "c": 2})
SEVERAL = Labels(["a", "b", "c"], {"a": 0, "b": 1, "c": 2}, multi_label=True)
LOG = logging.getLogger("test_predictions")


def unbalanced() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    references = rng.choice(3, 60, p=[0.8, 0.15, 0.05])
    return np.where(rng.random(60) < 0.7, references, rng.choice(3, 60)), references


def test_each_class_has_its_figures():
    predictions, references = unbalanced()
    metrics = ClassificationMetrics(THREE, LOG)
    found = metrics(predictions, references)
    expected = classification_report(references, predictions, target_names=THREE.names, output_dict=True)
    for name in THREE.names:
        row = expected[name]
        row["f1"] = row.pop("f1-score")
        assert metrics.table[name] == pytest.approx(row)
    assert found == {
        "accuracy": pytest.approx((predictions == references).mean()),
        "macro_f1": pytest.approx(expected["macro avg"]["f1-score"]),
    }


def test_classes_that_do_not_occur_are_not_in_the_mean():
    metrics = ClassificationMetrics(THREE, LOG)
    assert metrics(np.array([0, 1, 0]), np.array([0, 1, 0])) == {"accuracy": 1.0, "macro_f1": 1.0}
    assert metrics.table["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0.0}


def test_several_labels_are_right_only_together():
    references = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]])
    predictions = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 0]])
    metrics = ClassificationMetrics(SEVERAL, LOG)
    found = metrics(predictions, references.astype(np.float32))
    assert found["accuracy"] == 0.5
    assert found["micro_f1"] == pytest.approx(f1_score(references, predictions, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1_score(references, predictions, average="macro"))
    assert metrics.table["a"]["recall"] == 0.5
    assert metrics.table["a"]["support"] == 2


def test_one_class_throughout_is_pointed_out(caplog: pytest.LogCaptureFixture):
    metrics = ClassificationMetrics(THREE, LOG)
    metrics(np.zeros(10, int), np.array([0] * 9 + [1]))
    assert "all 10 rows are taken for 'a': the accuracy is that class's share, 90.0%, no more; train" in caplog.text
    caplog.clear()
    metrics(np.zeros(10, int), np.zeros(10, int))
    metrics(np.array([0, 1]), np.array([0, 0]))
    assert not caplog.text


def test_the_table_is_in_the_log_and_in_the_results(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    metrics = ClassificationMetrics(THREE, LOG)
    found = metrics(*unbalanced())
    with caplog.at_level(logging.INFO, LOG.name):
        metrics.log_table()
    lines = caplog.messages[0].splitlines()
    assert lines[1].split() == ["precision", "recall", "f1", "support"]
    assert lines[2].split() == ["a", *(f"{metrics.table['a'][key]:.3f}" for key in ("precision", "recall", "f1")), "47"]

    def save_metrics(split: str, values: dict[str, Any], combined: bool = True) -> None:
        for name in (split, "all") if combined else (split,):
            (tmp_path / f"{name}.json").write_text(json.dumps(values))

    save_evaluation(SimpleNamespace(save_metrics=save_metrics), found, {"eval_per_class": metrics.table})
    assert json.loads((tmp_path / "all.json").read_text()) == found
    assert json.loads((tmp_path / "eval.json").read_text()) == {**found, "eval_per_class": metrics.table}


def test_probabilities_are_those_of_the_loss():
    logits = np.array([[2.0, -1.0, 800.0], [0.0, 0.0, 0.0]], np.float32)
    assert probabilities(logits, THREE).tolist() == [[0, 0, 1], [pytest.approx(1 / 3)] * 3]
    assert probabilities(logits, SEVERAL)[0].tolist() == pytest.approx([0.880797, 0.268941, 1.0], abs=1e-6)
    assert predicted(logits, SEVERAL).tolist() == [[1, 0, 1], [0, 0, 0]]


def test_predictions_are_a_table_that_any_text_goes_into(tmp_path: Path):
    texts = ['a "quoted"\ttext', "of two\nlines"]
    inputs = {"index": [0, 5], "text": texts}
    logits = np.array([[2.0, 0.0, -1.0], [0.0, 0.0, 3.0]])
    rows = {}
    number = Labels([], {}, regression=True)
    for name, labels, values in (("one", THREE, logits), ("several", SEVERAL, logits), ("number", number, logits)):
        write_predictions(tmp_path / name, values, labels, inputs)
        with (tmp_path / name).open(newline="") as file:
            rows[name] = list(csv.DictReader(file, delimiter="\t"))
        assert [row["text"] for row in rows[name]] == texts
        assert [row["index"] for row in rows[name]] == ["0", "5"]
    assert list(rows["one"][0]) == ["index", "prediction", "score", "p(a)", "p(b)", "p(c)", "text"]
    assert [row["prediction"] for row in rows["one"]] == ["a", "c"]
    assert float(rows["one"][1]["score"]) == pytest.approx(np.exp(3) / (np.exp(3) + 2), abs=1e-6)
    assert [row["prediction"] for row in rows["several"]] == ["a", "c"]
    assert list(rows["number"][0].items())[1] == ("prediction", "2")


def test_predictions_follow_the_rows_even_where_training_groups_them_by_length():
    class Recorded:
        """A trainer that says how it would sort the rows."""

        args = SimpleNamespace(train_sampling_strategy="group_by_length")

        def predict(self, dataset: Any, metric_key_prefix: str) -> Any:
            return SimpleNamespace(predictions=(np.array([[len(self.args.train_sampling_strategy)]]),))

    trainer = Recorded()
    assert predict_in_order(trainer, None).tolist() == [[len("random")]]
    assert trainer.args.train_sampling_strategy == "group_by_length"
