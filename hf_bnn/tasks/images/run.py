"""Train, evaluate and pack a binary image classifier on a dataset of the Hub, a folder of images, or a dataset on disk.

`scripts/run_image_classification.py` and `hf-bnn train images` run `main`. It writes the packed model with its image
processor, `checkpoint-N` folders (latent, to resume from), `train_results.json`, `eval_results.json`,
`all_results.json` and `trainer_state.json`. With `--do_predict` it also writes `predict_results.tsv`. The first step of
`--two_step` writes the same files into `first_step`.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import EvalPrediction, PreTrainedModel, set_seed

from ...nn.layers import binary_layers
from ...nn.packed import is_packed
from ...training.allocator import keep_freed_memory
from ...training.arguments import BinaryTrainingArguments
from ...training.checked_trainer import CheckedTrainer, last_complete_checkpoint
from ...training.trainer import BinaryTrainer
from ..classification_metrics import ClassificationMetrics, first, predicted, save_evaluation
from ..commandline import checkpoint_to_resume, set_up_logging, user_errors
from ..errors import UsageError
from ..labels import Labels
from ..predictions import predict_in_order, write_predictions
from .arguments import Arguments, parse
from .data import AugmentedPictures, Collator, EpochCallback, SoftCrossEntropy
from .inputs import Run, check_size, find_processor, make_datasets, prediction_inputs
from .models import family_of, has_trained_head, load_model, load_teacher, stored_config
from .splits import load_splits, read_labels
from .streams import SharedStreams
from .transforms import Preprocessing

logger = logging.getLogger("run_image_classification")

FIRST_STEP = "first_step"


# The run


class Metrics:
    """`compute_metrics` for Trainer."""

    def __init__(self, labels: Labels):
        self.classes, self.labels = ClassificationMetrics(labels, logger), labels

    def __call__(self, outputs: EvalPrediction) -> dict[str, float]:
        return self.classes(predicted(first(outputs.predictions), self.labels), outputs.label_ids)


def make_trainer(arguments: Arguments, found: Run, model: PreTrainedModel) -> tuple[CheckedTrainer, dict[str, Any]]:
    """BinaryTrainer; CheckedTrainer where nothing binary is trained: a float model, or a packed one to evaluate.

    And the splits as it takes them.
    """
    training = arguments.training
    if is_packed(model) and not training.do_train and (training.fp16 or training.bf16):
        raise UsageError("a binary model is evaluated in float32: leave out --fp16 and --bf16")
    processor = find_processor(arguments, found.splits, model.config)
    preprocessing = Preprocessing(processor, model.config.num_channels)
    check_size(model.config, preprocessing)
    images = make_datasets(arguments, found, preprocessing)
    train = images.get("train")
    if arguments.data.mixup_alpha > 0:
        # Trainer's own smoothing takes classes only, not shares of them.
        model.loss_function = SoftCrossEntropy(training.label_smoothing_factor)
        training.label_smoothing_factor = 0.0
    training.dataloader_pin_memory &= training.device.type != "cpu"
    training.remove_unused_columns = False  # items become the model's arguments in the collator
    binary = bool(binary_layers(model)) or (is_packed(model) and training.do_train)
    kind, more = (BinaryTrainer if binary else CheckedTrainer), {}
    if arguments.data.streaming:
        kind = type(kind.__name__, (SharedStreams, kind), {})
    if arguments.model.teacher_model_name_or_path is not None and training.do_train:
        if not binary:
            raise UsageError(
                "a teacher is for a binary student: leave --teacher_model_name_or_path out, or --binarize it"
            )
        hidden = training.distillation_hidden_weight > 0
        more = {"teacher_model": load_teacher(arguments.model, model, processor, hidden)}
    trainer = kind(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=images.get("validation"),
        compute_metrics=Metrics(found.labels),
        data_collator=Collator(preprocessing, found.labels.count, arguments.data.mixup_alpha),
        processing_class=processor,
        callbacks=[EpochCallback(train)] if isinstance(train, AugmentedPictures) else None,
        **more,
    )
    # Most heads ignore num_items_in_batch: with accumulation the float model's gradient too would be a multiple.
    trainer.model_accepts_loss_kwargs = False
    return trainer, images


def train(trainer: CheckedTrainer, resume: str | None) -> dict[str, float]:
    """Train, save the final model and write train_results.json."""
    metrics = dict(trainer.train(resume_from_checkpoint=resume).metrics)
    if hasattr(trainer.train_dataset, "__len__"):
        metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def evaluate(trainer: CheckedTrainer) -> dict[str, float]:
    """Evaluate and write eval_results.json."""
    metrics = trainer.evaluate()
    if hasattr(trainer.eval_dataset, "__len__"):
        metrics["eval_samples"] = len(trainer.eval_dataset)
    trainer.log_metrics("eval", metrics)
    classes = trainer.compute_metrics.classes
    classes.log_table()
    save_evaluation(trainer, metrics, {"eval_per_class": classes.table})
    return metrics


def predict(trainer: CheckedTrainer, arguments: Arguments, found: Run, images: Any) -> None:
    """Write the predictions for the images to predict_results.tsv."""
    logits = predict_in_order(trainer, images)
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "predict_results.tsv"
        write_predictions(path, logits, found.labels, prediction_inputs(arguments, found.splits["test"]))
        logger.info(f"{len(logits)} predictions in {path}")


def run_step(arguments: Arguments, found: Run, resume: str | None) -> dict[str, float]:
    """One whole run: all there is, or one of the two of --two_step."""
    training = arguments.training
    set_seed(training.seed)
    with user_errors():
        model = load_model(arguments.model, found.stored, found.labels)
        trainer, images = make_trainer(arguments, found, model)
    metrics: dict[str, float] = {}
    if training.do_train:
        metrics.update(train(trainer, resume))
    if training.do_eval:
        metrics.update(evaluate(trainer))
    if training.do_predict:
        predict(trainer, arguments, found, images["test"])
    if training.do_train:
        publish = trainer.push_to_hub if training.push_to_hub else trainer.create_model_card
        publish(**card_fields(arguments))
    return metrics


def card_fields(arguments: Arguments) -> dict[str, Any]:
    """What the model card says of the model."""
    fields: dict[str, Any] = {"tasks": "image-classification", "tags": ["image-classification", "vision"]}
    if arguments.model.model_name_or_path is not None:
        fields["finetuned_from"] = arguments.model.model_name_or_path
    name = arguments.data.dataset_name
    if name is not None and not Path(name).exists():
        fields.update(dataset_tags=name, dataset=name)
    return fields


# Two steps: binary activations and float weights first, then both (Real-to-Binary Net, arXiv 2003.11535; ReActNet).


def first_step(arguments: Arguments) -> Arguments:
    """The arguments of the first step of --two_step."""
    training = part(arguments.training, arguments.model.two_step_fraction)
    training.output_dir = str(Path(training.output_dir) / FIRST_STEP)
    training.push_to_hub = training.save_packed = training.do_predict = False
    return arguments._replace(model=replace(arguments.model, binarize="activations"), training=training)


def second_step(arguments: Arguments) -> Arguments:
    """The arguments of the second step, which begins with what the first has learned."""
    done = str(Path(arguments.training.output_dir) / FIRST_STEP)
    scratch = {"model_type": None, "config_name": None, "image_size": None, "image_processor_name": None}
    model = replace(arguments.model, binarize="both", model_name_or_path=done, config_overrides=None, **scratch)
    return arguments._replace(model=model, training=part(arguments.training, 1 - arguments.model.two_step_fraction))


def part(training: BinaryTrainingArguments, fraction: float) -> BinaryTrainingArguments:
    """The arguments for a share of the training."""
    result = copy.copy(training)
    if training.max_steps > 0:
        result.max_steps = max(1, round(training.max_steps * fraction))
    result.num_train_epochs = training.num_train_epochs * fraction
    return result


def run_two_steps(arguments: Arguments, found: Run) -> dict[str, float]:
    """Both steps, or what of them is left to do when a run is resumed."""
    if family_of(found.stored.model_type) is None:
        raise UsageError(f"--two_step is for ViT and ResNet: leave it out with a {found.stored.model_type!r} model")
    first, output = first_step(arguments), Path(arguments.training.output_dir)
    asked = arguments.training.resume_from_checkpoint
    resuming = asked is not None and asked.lower() != "false"
    begun = last_complete_checkpoint(output) is not None or (
        resuming and Path(asked).parent.resolve() == output.resolve()
    )
    done = (output / FIRST_STEP / "train_results.json").is_file()
    if not (resuming and (done or begun)):
        run_step(first, found, checkpoint_to_resume(first.training))
        begun = False
    second = second_step(arguments)
    second_run = found._replace(stored=stored_config(second.model))
    return run_step(second, second_run, checkpoint_to_resume(second.training) if resuming and begun else None)


def main(command_line: list[str] | None = None) -> dict[str, float]:
    """Run the script on these arguments (None: the command line's); return what all_results.json holds.

    Raises UsageError, a ValueError, for what the user can set right.
    """
    arguments = parse(command_line, __doc__.splitlines()[0])
    training = arguments.training
    set_up_logging(training, logger)
    if training.device.type == "cpu":
        keep_freed_memory()
    set_seed(training.seed)
    alone = training.do_train and not arguments.model.two_step
    resume = checkpoint_to_resume(training) if alone else None
    with user_errors():
        stored = stored_config(arguments.model)
        splits = load_splits(arguments)
        trained = arguments.model.model_name_or_path is not None and has_trained_head(stored)
        found = Run(splits, read_labels(arguments, splits, stored, trained), stored)
    if arguments.model.two_step:
        return run_two_steps(arguments, found)
    return run_step(arguments, found, resume)
