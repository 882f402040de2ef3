"""Train, evaluate and pack a binary text classifier on a GLUE task, a dataset of the Hub, or files of your own.

`scripts/run_glue.py` and `hf-bnn train text` run `main`. It writes the packed model, `checkpoint-N` folders (latent, to
resume from), `train_results.json`, `eval_results.json` (with the figures of each class), `all_results.json` and
`trainer_state.json`. With `--do_predict` it also writes `predict_results_TASK.tsv`: index, prediction, score, texts.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)

from ...training.checked_trainer import CheckedTrainer
from .. import stages
from ..classification_metrics import ClassificationMetrics, first, predicted
from ..commandline import checkpoint_to_resume, set_up_process, user_errors
from ..glue_metric import GlueMetric
from ..labels import Labels
from .arguments import Arguments, parse
from .data import load_data
from .inputs import load_tokenizer, make_datasets
from .models import load_config, load_model, load_teacher
from .rows import Split

logger = logging.getLogger("run_glue")


class Metrics:
    """`compute_metrics` for Trainer: a GLUE task's own metric; else the figures of classes, or of a regression.

    `classes` has the figures of each class, for a GLUE task too. It is None for a regression.
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
    arguments: Arguments, model: PreTrainedModel, splits: dict[str, Split], labels: Labels
) -> tuple[CheckedTrainer, dict[str, stages.PreparedSplit]]:
    """The trainer for this model, and the splits as it takes them."""
    data, training = arguments.data, arguments.training
    kind = stages.trainer_class(model, training, arguments.model.teacher_model_name_or_path)
    tokenizer = load_tokenizer(arguments.model)
    prepared = make_datasets(arguments, splits, labels, tokenizer, model.config)
    teacher = load_teacher(arguments, model)
    if data.pad_to_max_length:
        collator = default_data_collator
    else:
        multiple = 8 if training.fp16 or training.bf16 else None
        collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
    evaluated = [split.dataset for name, split in prepared.items() if name.startswith("validation")]
    trainer = kind(
        model=model,
        args=training,
        train_dataset=prepared["train"].dataset if "train" in prepared else None,
        eval_dataset=evaluated[0] if evaluated else None,
        compute_metrics=Metrics(data.task_name, labels),
        data_collator=collator,
        processing_class=tokenizer,
        **({} if teacher is None else {"teacher_model": teacher}),
    )
    # BERT's head ignores num_items_in_batch: with accumulation the float model's gradient too would be a multiple.
    trainer.model_accepts_loss_kwargs = False
    return trainer, prepared


def train_and_evaluate(
    arguments: Arguments, config: PreTrainedConfig, splits: dict[str, Split], labels: Labels, resume: str | None
) -> dict[str, float]:
    """A whole run once its data is loaded; what all_results.json holds."""
    set_seed(arguments.training.seed)
    with user_errors():
        model = load_model(arguments.model, config, labels)
        trainer, prepared = make_trainer(arguments, model, splits, labels)
    return stages.run_stages(
        trainer, prepared, labels, logger, resume, card_fields(arguments), arguments.data.task_name
    )


def card_fields(arguments: Arguments) -> dict[str, str]:
    """The fields of the model card. A run that --max_steps cut short claims no result."""
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
    """Run the task on these arguments (None: the command line's); return what all_results.json holds.

    Raises UsageError, a ValueError, for an error that the user can correct.
    """
    arguments = parse(command_line, __doc__.splitlines()[0])
    set_up_process(arguments.training, logger)
    resume = checkpoint_to_resume(arguments.training) if arguments.training.do_train else None
    with user_errors():
        config = load_config(arguments.model)
        splits, labels = load_data(arguments, config)
    return train_and_evaluate(arguments, config, splits, labels, resume)
