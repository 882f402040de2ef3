#!/usr/bin/env python
"""Train, evaluate and pack a binary image classifier on a dataset of the Hub, a folder of images, or a dataset on disk.

    python scripts/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name uoft-cs/cifar10 --validation_split_name test --method surge --do_train --do_eval \
        --learning_rate 5e-4 --output_dir cifar10-binary-vit
    python scripts/run_image_classification.py scripts/recipes/cifar10_resnet20.json --output_dir cifar10-resnet20

The arguments are named as in transformers' example of this name; a json file of them may come first, and what follows
overrides it. Without a checkpoint, `--model_type vit|resnet --config_overrides "hidden_size=96,..."` starts from
scratch. `--binarize none` trains the float model (a teacher). What is written: the packed model with its image
processor, `checkpoint-N` folders (latent, to be resumed), `train_results.json`, `eval_results.json`,
`all_results.json`, `trainer_state.json`; the first step of `--two_step` writes the same into `first_step`.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from commandline import checkpoint_to_resume, run, set_up_logging, user_errors
from datasets import Dataset
from errors import UsageError
from image_arguments import Arguments, parse
from image_data import (
    AugmentedPictures,
    Collator,
    EpochCallback,
    Pictures,
    SoftCrossEntropy,
    StreamedPictures,
    picture,
)
from image_models import (
    family_of,
    has_trained_head,
    load_model,
    load_processor,
    load_teacher,
    make_processor,
    stored_config,
)
from image_splits import Splits, image_column, load_splits, measured, read_labels
from image_transforms import Augmentation, Preprocessing, torchvision_transform
from labels import Labels
from PIL import Image
from stream_trainer import SharedStreams, rows_per_turn
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from hf_bnn import BinaryTrainer, BinaryTrainingArguments
from hf_bnn.allocator import keep_freed_memory
from hf_bnn.checked_trainer import CheckedTrainer, last_complete_checkpoint
from hf_bnn.layers import binary_layers
from hf_bnn.packed import is_packed

logger = logging.getLogger("run_image_classification")

FIRST_STEP = "first_step"
SMALL = 64  # pixels: up to here images are shifted rather than cropped, and taken as large as they are
SAMPLE, STREAM_SAMPLE = 2000, 200  # images whose mean and standard deviation stand for all


class Run(NamedTuple):
    """What a run works with, beside its arguments: the same in both steps of --two_step."""

    splits: Splits
    labels: Labels
    stored: PreTrainedConfig


# The data


def find_processor(arguments: Arguments, splits: Splits, config: PreTrainedConfig) -> BaseImageProcessor:
    """The checkpoint's image processor, or one made for this data and model."""
    processor = load_processor(arguments.model)
    if processor is not None:
        return processor
    images = sample(arguments, *next(iter(splits.items())), config.num_channels)
    size = getattr(config, "image_size", None) or arguments.model.image_size
    if size is None:
        sizes = {side for image in images for side in image.size}
        size = sizes.pop() if len(sizes) == 1 and max(sizes) <= SMALL else 224
    plain = [0.5] * config.num_channels
    geometry = Preprocessing(make_processor(size, plain, plain), config.num_channels)
    return make_processor(size, *measured(np.stack([geometry.arranged(image) for image in images])))


def sample(arguments: Arguments, split: str, rows: Any, channels: int) -> list[Image.Image]:
    """Images from all over a split; of a stream, the first ones."""
    column = image_column(arguments.data, rows)
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if isinstance(rows, Dataset):
        indices = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int).tolist()
        rows = rows.select(indices)
    else:
        indices, rows = range(STREAM_SAMPLE), rows.take(STREAM_SAMPLE)
    named = zip(indices, rows, strict=False)  # a stream may be shorter
    return [picture(row[column], channels, f"row {index} of the {split} data") for index, row in named]


def make_augmentation(arguments: Arguments, size: tuple[int, int]) -> Augmentation:
    """What training does to images that the model takes in this size."""
    data = arguments.data
    kind = data.augmentation
    if kind == "auto":
        kind = "cifar" if max(size) <= SMALL else "imagenet"
    name = data.torchvision_transform
    return Augmentation(
        kind,
        data.crop_padding,
        (data.crop_min_scale, 1.0),
        data.flip_probability,
        data.color_jitter,
        torchvision_transform(name) if name else None,
    )


def make_datasets(arguments: Arguments, found: Run, preprocessing: Preprocessing) -> dict[str, Any]:
    """The splits as Trainer takes them."""
    data, training = arguments.data, arguments.training
    augmentation = make_augmentation(arguments, preprocessing.size)
    result = {}
    for split, rows in found.splits.items():
        columns = (image_column(data, rows), data.label_column_name)
        given = (rows, split, *columns, found.labels.classes, preprocessing)
        augmented = {"augmentation": augmentation, "seed": training.seed} if split == "train" else {}
        if isinstance(rows, Dataset):
            kind = AugmentedPictures if augmented else Pictures
            result[split] = kind(*given, memory=data.images_in_memory_gb * 2**30, **augmented)
            logger.info(f"{split}: {len(rows)} images, in memory: {result[split].kept is not None}")
        else:
            buffer = {"shuffle_buffer": data.shuffle_buffer} if augmented else {}
            turn = rows_per_turn(training, endless=bool(augmented))
            result[split] = StreamedPictures(*given, **augmented, **buffer, rows_per_turn=turn)
            logger.info(f"{split}: streamed")
    return result


# The run


def accuracy(outputs: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for Trainer."""
    logits = outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions
    return {"accuracy": float((logits.argmax(-1) == outputs.label_ids).mean())}


def make_trainer(arguments: Arguments, found: Run, model: PreTrainedModel) -> CheckedTrainer:
    """BinaryTrainer; CheckedTrainer where nothing binary is trained: a float model, or a packed one to evaluate."""
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
        compute_metrics=accuracy,
        data_collator=Collator(preprocessing, found.labels.count, arguments.data.mixup_alpha),
        processing_class=processor,
        callbacks=[EpochCallback(train)] if isinstance(train, AugmentedPictures) else None,
        **more,
    )
    # Most heads ignore num_items_in_batch: with accumulation the float model's gradient too would be a multiple.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def check_size(config: PreTrainedConfig, preprocessing: Preprocessing) -> None:
    """Raise UsageError if the processor's images are not of the size that the model takes."""
    size = getattr(config, "image_size", None)
    expected = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if size is not None and preprocessing.size != expected:
        raise UsageError(
            f"the image processor makes images of {preprocessing.size}, the model takes {expected}: "
            "name another one in --image_processor_name"
        )


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
    trainer.save_metrics("eval", metrics)
    return metrics


def run_step(arguments: Arguments, found: Run, resume: str | None) -> dict[str, float]:
    """One whole run: all there is, or one of the two of --two_step."""
    training = arguments.training
    set_seed(training.seed)
    with user_errors():
        model = load_model(arguments.model, found.stored, found.labels)
        trainer = make_trainer(arguments, found, model)
    metrics: dict[str, float] = {}
    if training.do_train:
        metrics.update(train(trainer, resume))
    if training.do_eval:
        metrics.update(evaluate(trainer))
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
    training.push_to_hub = training.save_packed = False
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
        run_step(first, found, checkpoint_to_resume(first.training, logger))
        begun = False
    second = second_step(arguments)
    second_run = found._replace(stored=stored_config(second.model))
    return run_step(second, second_run, checkpoint_to_resume(second.training, logger) if resuming and begun else None)


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
    with user_errors():
        stored = stored_config(arguments.model)
        splits = load_splits(arguments)
        trained = arguments.model.model_name_or_path is not None and has_trained_head(stored)
        found = Run(splits, read_labels(arguments, splits, stored, trained), stored)
    if arguments.model.two_step:
        return run_two_steps(arguments, found)
    resume = checkpoint_to_resume(training, logger) if training.do_train else None
    return run_step(arguments, found, resume)


def _mp_fn(index: int) -> None:
    """What xla_spawn calls on each TPU core."""
    main()


if __name__ == "__main__":
    run(main)
