"""The stages that text and image runs share: training, evaluation, prediction and publication, with their files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..nn.layers import binary_layers
from ..nn.packed import is_packed
from ..training.arguments import BinaryTrainingArguments
from ..training.checked_trainer import CheckedTrainer
from ..training.interruption import STOP_SIGNALS, UnfinishedRunError
from ..training.trainer import BinaryTrainer
from .classification_metrics import save_evaluation
from .errors import UsageError
from .labels import Labels
from .predictions import predict_in_order, write_predictions


class PreparedSplit(NamedTuple):
    """A split as Trainer takes it."""

    dataset: Any
    identifying_columns: Callable[[], dict[str, Iterable[Any]]]  # of a table of predictions: what each row is about


def trainer_class(
    model: PreTrainedModel, training: BinaryTrainingArguments, teacher: str | None
) -> type[CheckedTrainer]:
    """BinaryTrainer; CheckedTrainer for a float model, or for a packed one that is only evaluated.

    Raises UsageError if a packed model is to be evaluated in half precision, or a float one to learn from a `teacher`.
    """
    if is_packed(model) and not training.do_train and (training.fp16 or training.bf16):
        raise UsageError("a binary model is evaluated in float32: leave out --fp16 and --bf16")
    binary = bool(binary_layers(model)) or (is_packed(model) and training.do_train)
    if teacher is not None and training.do_train and not binary:
        raise UsageError("a teacher is for a binary student: leave --teacher_model_name_or_path out, or --binarize it")
    return BinaryTrainer if binary else CheckedTrainer


def train(trainer: CheckedTrainer, resume: str | None) -> dict[str, float]:
    """Train, save the final model and write train_results.json.

    Raises UnfinishedRunError, and saves no final model, if a signal has ended the run: SIGTERM, SIGUSR1 or Ctrl-C.
    """
    trainer.stop_signals = STOP_SIGNALS
    metrics = dict(trainer.train(resume_from_checkpoint=resume).metrics)
    if (step := trainer.interruption.stopped_at) is not None:
        raise UnfinishedRunError(
            f"the run was stopped at step {step} of {trainer.state.max_steps}; {trainer.args.output_dir}/checkpoint-"
            f"{step} is complete. Give the same command with --resume_from_checkpoint auto to go on"
        )
    if hasattr(trainer.train_dataset, "__len__"):  # a stream has no length
        metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def evaluate(trainer: CheckedTrainer, splits: dict[str, PreparedSplit]) -> dict[str, float]:
    """Evaluate every validation split and write eval_results.json. The keys of MNLI's second split end in _mm."""
    combined: dict[str, float] = {}
    tables = {}
    classes = trainer.compute_metrics.classes
    for name, split in splits.items():
        if not name.startswith("validation"):
            continue
        end = "_mm" if name.endswith("_mismatched") else ""
        metrics = trainer.evaluate(eval_dataset=split.dataset)
        if hasattr(split.dataset, "__len__"):
            metrics["eval_samples"] = len(split.dataset)
        metrics = {f"{key}{end}": value for key, value in metrics.items()}
        trainer.log_metrics("eval", metrics)
        combined.update(metrics)
        if classes:
            tables[f"eval_per_class{end}"] = classes.table
            classes.log_table()
    save_evaluation(trainer, combined, tables)
    return combined


def predict(
    trainer: CheckedTrainer,
    splits: dict[str, PreparedSplit],
    labels: Labels,
    logger: logging.Logger,
    task: str | None = None,
) -> None:
    """Write the predictions for every test split to predict_results.tsv.

    The files of a GLUE task are named predict_results_TASK.tsv, that of MNLI's second split ends in -mm.
    """
    for name, split in splits.items():
        if not name.startswith("test"):
            continue
        logits = predict_in_order(trainer, split.dataset)
        if trainer.is_world_process_zero():
            end = "-mm" if name.endswith("_mismatched") else ""
            path = Path(trainer.args.output_dir) / ("_".join(filter(None, ["predict_results", task])) + f"{end}.tsv")
            write_predictions(path, logits, labels, split.identifying_columns())
            logger.info(f"{len(logits)} predictions of {name} in {path}")


def run_stages(
    trainer: CheckedTrainer,
    splits: dict[str, PreparedSplit],
    labels: Labels,
    logger: logging.Logger,
    resume: str | None,
    card_fields: dict[str, Any],
    task: str | None = None,
) -> dict[str, float]:
    """The stages that the arguments ask for, in their order; what all_results.json holds."""
    training = trainer.args
    metrics: dict[str, float] = {}
    if training.do_train:
        metrics.update(train(trainer, resume))
    if training.do_eval:
        metrics.update(evaluate(trainer, splits))
    if training.do_predict:
        predict(trainer, splits, labels, logger, task)
    if training.do_train:
        publish(trainer, card_fields)
    return metrics


def publish(trainer: CheckedTrainer, card_fields: dict[str, Any]) -> None:
    """Write the model card; with --push_to_hub, push the model and its card."""
    write = trainer.push_to_hub if trainer.args.push_to_hub else trainer.create_model_card
    write(**card_fields)
