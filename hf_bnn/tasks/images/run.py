"""Train, evaluate and pack a binary image classifier on a dataset of the Hub, a folder of images, or a dataset on disk.

`scripts/run_image_classification.py` and `hf-bnn train images` run `main`. It writes the packed model with its image
processor, `checkpoint-N` folders (latent, to resume from), `train_results.json`, `eval_results.json`,
`all_results.json` and `trainer_state.json`. With `--do_predict` it also writes `predict_results.tsv`. The first step of
`--two_step` writes the same files into `first_step`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, set_seed

from ...training.checked_trainer import CheckedTrainer
from .. import stages
from ..classification_metrics import ClassificationMetrics, first, predicted
from ..commandline import checkpoint_to_resume, set_up_process, user_errors
from ..errors import UsageError
from ..labels import Labels
from .arguments import Arguments, parse
from .data import Splits, load_data
from .inputs import check_size, load_or_make_processor, make_datasets
from .models import family_of, load_config, load_model, load_teacher
from .pictures import AugmentedPictures, Collator, EpochCallback, SoftCrossEntropy
from .streams import SharedStreams
from .transforms import Preprocessing
from .two_steps import first_step, second_step, steps_to_resume

logger = logging.getLogger("run_image_classification")


class Metrics:
    """`compute_metrics` for Trainer: the figures of classes."""

    def __init__(self, labels: Labels):
        self.labels, self.classes = labels, ClassificationMetrics(labels, logger)

    def __call__(self, outputs: EvalPrediction) -> dict[str, float]:
        return self.classes(predicted(first(outputs.predictions), self.labels), outputs.label_ids)


def make_trainer(
    arguments: Arguments, model: PreTrainedModel, splits: Splits, labels: Labels
) -> tuple[CheckedTrainer, dict[str, stages.PreparedSplit]]:
    """The trainer for this model, and the splits as it takes them."""
    data, training = arguments.data, arguments.training
    kind = stages.trainer_class(model, training, arguments.model.teacher_model_name_or_path)
    processor = load_or_make_processor(arguments, splits, model.config)
    preprocessing = Preprocessing(processor, model.config.num_channels)
    check_size(model.config, preprocessing)
    prepared = make_datasets(arguments, splits, labels, preprocessing)
    teacher = load_teacher(arguments, model, processor)
    train, validation = (prepared[name].dataset if name in prepared else None for name in ("train", "validation"))
    if data.mixup_alpha > 0:
        # Trainer's own smoothing takes classes only, not shares of them.
        model.loss_function = SoftCrossEntropy(training.label_smoothing_factor)
        training.label_smoothing_factor = 0.0
    training.dataloader_pin_memory &= training.device.type != "cpu"
    training.remove_unused_columns = False  # items become the model's arguments in the collator
    if data.streaming:
        kind = type(kind.__name__, (SharedStreams, kind), {})
    trainer = kind(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=Metrics(labels),
        data_collator=Collator(preprocessing, labels.count, data.mixup_alpha),
        processing_class=processor,
        callbacks=[EpochCallback(train)] if isinstance(train, AugmentedPictures) else None,
        **({} if teacher is None else {"teacher_model": teacher}),
    )
    # Most heads ignore num_items_in_batch: with accumulation the float model's gradient too would be a multiple.
    trainer.model_accepts_loss_kwargs = False
    return trainer, prepared


def train_and_evaluate(
    arguments: Arguments, config: PreTrainedConfig, splits: Splits, labels: Labels, resume: str | None
) -> dict[str, float]:
    """A whole run once its data is loaded, or one of the two of --two_step; what all_results.json holds."""
    set_seed(arguments.training.seed)
    with user_errors():
        model = load_model(arguments.model, config, labels)
        trainer, prepared = make_trainer(arguments, model, splits, labels)
    return stages.run_stages(trainer, prepared, labels, logger, resume, card_fields(arguments))


def train_in_two_steps(
    arguments: Arguments, config: PreTrainedConfig, splits: Splits, labels: Labels
) -> dict[str, float]:
    """Both steps of --two_step, or the part of them that a resumed run has left to do."""
    if family_of(config.model_type) is None:
        raise UsageError(f"--two_step is for ViT and ResNet: leave it out with a {config.model_type!r} model")
    skips_first, resumes_second = steps_to_resume(arguments.training)
    if not skips_first:
        begin = first_step(arguments)
        train_and_evaluate(begin, config, splits, labels, checkpoint_to_resume(begin.training))
    second = second_step(arguments)
    resume = checkpoint_to_resume(second.training) if resumes_second else None
    return train_and_evaluate(second, load_config(second.model), splits, labels, resume)


def card_fields(arguments: Arguments) -> dict[str, Any]:
    """The fields of the model card."""
    fields: dict[str, Any] = {"tasks": "image-classification", "tags": ["image-classification", "vision"]}
    if arguments.model.model_name_or_path is not None:
        fields["finetuned_from"] = arguments.model.model_name_or_path
    name = arguments.data.dataset_name
    if name is not None and not Path(name).exists():
        fields.update(dataset_tags=name, dataset=name)
    return fields


def main(command_line: list[str] | None = None) -> dict[str, float]:
    """Run the task on these arguments (None: the command line's); return what all_results.json holds.

    Raises UsageError, a ValueError, for an error that the user can correct.
    """
    arguments = parse(command_line, __doc__.splitlines()[0])
    two_steps = arguments.model.two_step
    set_up_process(arguments.training, logger)
    resume = checkpoint_to_resume(arguments.training) if arguments.training.do_train and not two_steps else None
    with user_errors():
        config = load_config(arguments.model)
        splits, labels = load_data(arguments, config)
    if two_steps:
        return train_in_two_steps(arguments, config, splits, labels)
    return train_and_evaluate(arguments, config, splits, labels, resume)
