"""Train, evaluate and pack a binary text classifier on a GLUE task, a dataset of the Hub, or files of your own.

`scripts/run_glue.py` and `hf-bnn train text` run `main`. It writes the packed model, `checkpoint-N` folders (latent, to
resume from), `train_results.json`, `eval_results.json` (with the figures of each class), `all_results.json` and
`trainer_state.json`. With `--do_predict` it also writes `predict_results_TASK.tsv`: index, prediction, score, texts.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)

from ...training.allocator import keep_freed_memory
from ...training.checked_trainer import CheckedTrainer
from ...training.trainer import BinaryTrainer
from ..classification_metrics import ClassificationMetrics, first, predicted, save_evaluation
from ..commandline import checkpoint_to_resume, set_up_logging, user_errors
from ..errors import UsageError
from ..glue_metric import GlueMetric
from ..labels import Labels
from ..predictions import predict_in_order, write_predictions
from .arguments import Arguments, parse
from .data import Examples, load_data, prepare
from .models import load_config, load_model, load_teacher

logger = logging.getLogger("run_glue")


class Metrics:
    """`compute_metrics` for Trainer: the task's, or for a regression the error and correlations, or those of classes.

    `classes` has the figures of each class, also of a task; it is None for a regression.
    """

    def __init__(self, task: str | None, labels: Labels):
        self.task, self.labels = task, labels
        self.classes = None if labels.regression else ClassificationMetrics(labels, logger)
        self.metric = GlueMetric(task or "stsb") if task or labels.regression else None

    def __call__(self, outputs: EvalPrediction) -> dict[str, float]:
        values = predicted(first(outputs.predictions), self.labels)
        scores = self.classes(values, outputs.label_ids) if self.classes else {}
        if self.metric is None:
            return scores
        scores = self.metric.compute(predictions=values, references=outputs.label_ids)
        if self.task is None:
            scores = {"mse": float(((values - outputs.label_ids) ** 2).mean()), **scores}
        elif len(scores) > 1:
            scores["combined_score"] = float(np.mean(list(scores.values())))
        return scores


def make_trainer(
    arguments: Arguments, model: PreTrainedModel, examples: dict[str, Examples], labels: Labels, **kwargs: Any
) -> CheckedTrainer:
    """BinaryTrainer; CheckedTrainer where nothing binary is trained: a float model, or a packed one to evaluate."""
    data, training = arguments.data, arguments.training
    packed = getattr(model.config, "weight_format", None) == "packed"
    if packed and not training.do_train and (training.fp16 or training.bf16):
        raise UsageError("a binary model is evaluated in float32: leave out --fp16 and --bf16")
    teacher = load_teacher(arguments, model.config)
    kind = CheckedTrainer
    if arguments.model.binarize != "none" and (training.do_train or not packed):
        kind, kwargs = BinaryTrainer, {**kwargs, "teacher_model": teacher}
    if data.pad_to_max_length:
        collator = default_data_collator
    else:
        multiple = 8 if training.fp16 or training.bf16 else None
        collator = DataCollatorWithPadding(kwargs["processing_class"], pad_to_multiple_of=multiple)
    evaluated = [found.tokens for name, found in examples.items() if name.startswith("validation")]
    trainer = kind(
        model=model,
        args=training,
        train_dataset=examples["train"].tokens if "train" in examples else None,
        eval_dataset=evaluated[0] if evaluated else None,
        compute_metrics=Metrics(data.task_name, labels),
        data_collator=collator,
        **kwargs,
    )
    # BERT's head ignores num_items_in_batch: with accumulation the float model's gradient too would be a multiple.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def train(trainer: CheckedTrainer, resume: str | None) -> dict[str, float]:
    """Train, save the final model and write train_results.json."""
    result = trainer.train(resume_from_checkpoint=resume)
    metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def evaluate(trainer: CheckedTrainer, examples: dict[str, Examples]) -> dict[str, float]:
    """Evaluate every validation split and write eval_results.json; MNLI's second split has keys that end in _mm."""
    combined: dict[str, float] = {}
    tables = {}
    classes = trainer.compute_metrics.classes
    for name, found in examples.items():
        if not name.startswith("validation"):
            continue
        end = "_mm" if name.endswith("_mismatched") else ""
        metrics = {**trainer.evaluate(eval_dataset=found.tokens), "eval_samples": len(found.tokens)}
        metrics = {f"{key}{end}": value for key, value in metrics.items()}
        trainer.log_metrics("eval", metrics)
        combined.update(metrics)
        if classes:
            tables[f"eval_per_class{end}"] = classes.table
            classes.log_table()
    save_evaluation(trainer, combined, tables)
    return combined


def predict(trainer: CheckedTrainer, examples: dict[str, Examples], task: str | None, labels: Labels) -> None:
    """Write the predictions for every test split to predict_results_TASK.tsv."""
    for split, found in examples.items():
        if not split.startswith("test"):
            continue
        logits = predict_in_order(trainer, found.tokens)
        if trainer.is_world_process_zero():
            name = "_".join(filter(None, ["predict_results", task])) + ("-mm" if split.endswith("_mismatched") else "")
            path = Path(trainer.args.output_dir) / f"{name}.tsv"
            write_predictions(path, logits, labels, found.inputs)
            logger.info(f"{len(logits)} predictions of {split} in {path}")


def card_fields(arguments: Arguments) -> dict[str, str]:
    """What the model card says of the model. A run that was cut short by --max_steps claims no result."""
    data, training = arguments.data, arguments.training
    fields = {"finetuned_from": arguments.model.model_name_or_path, "tasks": "text-classification"}
    if training.max_steps > 0:
        name = (training.hub_model_id or Path(training.output_dir).resolve().name).split("/")[-1]
        fields["model_name"] = f"{name} (stopped after {training.max_steps} steps: its figures are no result)"
    elif data.task_name is not None:
        glue = {"dataset_tags": "glue", "dataset_args": data.task_name, "dataset": f"GLUE {data.task_name.upper()}"}
        fields.update(language="en", **glue)
    elif data.dataset_name is not None:
        fields.update(dataset_tags=data.dataset_name, dataset=data.dataset_name)
    return fields


def main(command_line: list[str] | None = None) -> dict[str, float]:
    """Run the script on these arguments (None: the command line's); return what all_results.json holds.

    Raises UsageError, a ValueError, for what the user can set right.
    """
    arguments = parse(command_line, __doc__.splitlines()[0])
    model_arguments, data, training = arguments.model, arguments.data, arguments.training
    set_up_logging(training, logger)
    if training.device.type == "cpu":
        keep_freed_memory()
    set_seed(training.seed)
    resume = checkpoint_to_resume(training) if training.do_train else None
    with user_errors():
        config = load_config(arguments)
        splits, labels = load_data(arguments, config)
        tokenizer = AutoTokenizer.from_pretrained(
            model_arguments.tokenizer_name or model_arguments.model_name_or_path,
            use_fast=model_arguments.use_fast_tokenizer,
            revision=model_arguments.model_revision,
            **model_arguments.hub,
        )
        model = load_model(arguments, config, labels)
        positions = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        longest = min(tokenizer.model_max_length, positions)
        examples = prepare(arguments, splits, labels, tokenizer, longest)
        trainer = make_trainer(arguments, model, examples, labels, processing_class=tokenizer)
    metrics: dict[str, float] = {}
    if training.do_train:
        metrics.update(train(trainer, resume))
    if training.do_eval:
        metrics.update(evaluate(trainer, examples))
    if training.do_predict:
        predict(trainer, examples, data.task_name, labels)
    if training.do_train:
        publish = trainer.push_to_hub if training.push_to_hub else trainer.create_model_card
        publish(**card_fields(arguments))
    return metrics
