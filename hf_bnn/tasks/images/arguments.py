"""The command-line arguments of an image run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...training.arguments import BinaryTrainingArguments
from ..argument_checks import check_doing, check_kind_of_training, check_limits, check_output_dir
from ..arguments import OutputArguments, SharedDataArguments, SharedModelArguments
from ..commandline import Parser
from ..errors import UsageError

PAIR = re.compile(r"\s*(\w+)\s*=\s*(\[[^\]]*\]|[^,\[\]]*)\s*(?:,|$)")


@dataclass
class DataTrainingArguments(SharedDataArguments):
    """The images that the model is trained and evaluated on, and how training alters them."""

    train_dir: str | None = field(
        default=None, metadata={"help": "A folder with one subfolder of training images per class."}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "A folder like train_dir, with the images to evaluate on."}
    )
    test_dir: str | None = field(
        default=None,
        metadata={"help": "For --do_predict: a folder of images without labels, which may have subfolders."},
    )
    test_split_name: str = field(
        default="test",
        metadata={"help": "For --do_predict without --test_dir: the dataset's split. It needs no labels."},
    )
    validation_split_name: str | None = field(
        default=None, metadata={"help": "The split to evaluate on. Default: validation."}
    )
    train_val_split: float | None = field(
        default=None, metadata={"help": "Split this fraction (0 to 1) off the training data, to evaluate on."}
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "The column of the images. Default: the only one that holds images."}
    )
    label_column_name: str = field(default="label", metadata={"help": "The column of the labels: integers or strings."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the dataset during training instead of storing it. Needs --max_steps."},
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "With --streaming: shuffle within N images."})
    images_in_memory_gb: float = field(
        default=2.0, metadata={"help": "Keep the decoded images of a split in memory up to this size."}
    )
    augmentation: Literal["auto", "cifar", "imagenet", "none"] = field(
        default="auto",
        metadata={
            "help": "cifar: shifts of up to --crop_padding pixels, and flips; imagenet: resized crops, and flips. "
            "auto: cifar for images of at most 64 pixels, else imagenet."
        },
    )
    crop_padding: int = field(default=4, metadata={"help": "For cifar: pixels of zeros around the image."})
    crop_min_scale: float = field(
        default=0.08, metadata={"help": "For imagenet: the smallest crop's share of the area."}
    )
    flip_probability: float = field(
        default=0.5, metadata={"help": "Probability of a horizontal flip. 0 for digits and text."}
    )
    color_jitter: float = field(default=0.0, metadata={"help": "Strength of random colour changes, 0 to 1."})
    torchvision_transform: str | None = field(
        default=None,
        metadata={"help": "A torchvision transform that runs before all others, e.g. TrivialAugmentWide."},
    )
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mix pairs of images with a share drawn from Beta(alpha, alpha). 0: off."}
    )


@dataclass
class ModelArguments(SharedModelArguments):
    """Which model is trained, and which parts of it become binary."""

    STRUCTURE = ("binarize", "attention", "levels", "weight_scaling")

    model_type: str | None = field(default=None, metadata={"help": "From scratch: vit, resnet, convnext, ..."})
    config_name: str | None = field(
        default=None, metadata={"help": "From scratch: the Hub name, folder or file of a config."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'Fields of the config: "hidden_size=96,depths=[3,3,3]".'}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "The image processor, if it is stored elsewhere."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "From scratch: height and width of the input, in pixels."}
    )
    levels: str | None = field(
        default=None, metadata={"help": "The two values that a binary input takes: elastic, signed, ..."}
    )
    weight_scaling: Literal["channel", "layer", "none"] | None = field(
        default=None, metadata={"help": "What shares one scale of the binary weights. Default: channel."}
    )
    two_step: bool = field(
        default=False,
        metadata={"help": "Train with binary activations and float weights first, then with both binary."},
    )
    two_step_fraction: float = field(default=0.5, metadata={"help": "The first step's share of the training."})

    @property
    def structure(self) -> dict[str, Any]:
        """The fields of the config that were given. Named arguments override --config_overrides."""
        return {**parse_overrides(self.config_overrides), **super().structure}


class Arguments(NamedTuple):
    """Everything on the command line."""

    model: ModelArguments
    data: DataTrainingArguments
    training: BinaryTrainingArguments
    output: OutputArguments


def parse_overrides(text: str | dict[str, Any] | None) -> dict[str, Any]:
    """The fields in "name=value,name=[value,value]"; values are JSON, else strings. Returns a dictionary unchanged."""
    if text is None or isinstance(text, dict):
        return text or {}
    found, end = {}, 0
    while end < len(text):
        match = PAIR.match(text, end)
        if match is None:
            raise UsageError(
                f"config_overrides: cannot read {text[end:]!r}; expected name=value pairs with commas between them, "
                'as in "hidden_size=96,depths=[3,3,3]"'
            )
        found[match[1]], end = _value(match[2].strip()), match.end()
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        if text.startswith("["):
            return [_value(part.strip()) for part in text[1:-1].split(",")]
        return None if text == "None" else text


def parse(command_line: list[str] | None = None, description: str | None = None) -> Arguments:
    """The parsed arguments. Raises UsageError for every mistake that shows before anything is loaded."""
    kinds = (ModelArguments, DataTrainingArguments, BinaryTrainingArguments, OutputArguments)
    arguments = Arguments(*Parser(kinds, description=description).parse(command_line))
    check_data_arguments(arguments.data, arguments.training)
    check_model_arguments(arguments.model, arguments.training)
    check_output_dir(arguments.training, arguments.output)
    return arguments


def check_data_arguments(data: DataTrainingArguments, training: BinaryTrainingArguments) -> None:
    """Raise UsageError unless the arguments say what to do and on which data."""
    check_doing(training)
    if training.do_predict and data.test_dir is None and (data.dataset_name is None or data.streaming):
        raise UsageError("--do_predict needs --test_dir, a folder of images; or --dataset_name without --streaming")
    labelled = training.do_train or training.do_eval
    if labelled and data.dataset_name is None and data.train_dir is None and data.validation_dir is None:
        raise UsageError(
            "no data: give --dataset_name (a dataset of the Hub, or a folder), or --train_dir and --validation_dir "
            "(folders of images)"
        )
    if data.dataset_name is None and training.do_train and data.train_dir is None:
        raise UsageError("--do_train needs --train_dir; given: validation_dir")
    if data.train_val_split is not None and not 0 < data.train_val_split < 1:
        raise UsageError(f"train_val_split={data.train_val_split}: expected a share between 0 and 1")
    if data.streaming and training.do_train and training.max_steps <= 0:
        raise UsageError("--streaming does not know how long an epoch is: give --max_steps")
    if data.streaming and data.train_val_split is not None:
        raise UsageError("--streaming cannot cut off --train_val_split: name a split in --validation_split_name")
    for name, low, high in (("flip_probability", 0, 1), ("color_jitter", 0, 1), ("crop_min_scale", 0, 1)):
        if not low <= getattr(data, name) <= high:
            raise UsageError(f"{name}={getattr(data, name)}: expected a number from {low} to {high}")
    for name in ("crop_padding", "mixup_alpha", "shuffle_buffer"):
        if getattr(data, name) < 0:
            raise UsageError(f"{name}={getattr(data, name)}: expected 0 or more")
    check_limits(data, "max_train_samples", "max_eval_samples", "max_predict_samples")


def check_model_arguments(model: ModelArguments, training: BinaryTrainingArguments) -> None:
    """Raise UsageError if arguments of the model contradict each other."""
    given = [name for name in ("model_name_or_path", "config_name", "model_type") if getattr(model, name) is not None]
    if not given:
        raise UsageError("no model: give --model_name_or_path, or to start from scratch --model_type or --config_name")
    if "model_name_or_path" in given and len(given) > 1:
        raise UsageError(
            f"--model_name_or_path has its own config: leave out --{given[1]}, or leave it out to start anew"
        )
    if "model_name_or_path" in given and model.image_size is not None:
        raise UsageError("--image_size is for a model from scratch: a checkpoint has a size, in its image processor")
    if model.config_name is not None and not Path(model.config_name).exists() and model.config_name.endswith(".json"):
        raise UsageError(f"config_name {model.config_name!r} does not exist")
    parse_overrides(model.config_overrides)
    check_kind_of_training(model, training, "attention")
    if model.two_step:
        if model.binarize not in (None, "both"):
            raise UsageError(f"--two_step ends with binarize='both': leave out --binarize {model.binarize}")
        if not 0 < model.two_step_fraction < 1:
            raise UsageError(f"two_step_fraction={model.two_step_fraction}: expected a share between 0 and 1")
        if not training.do_train:
            raise UsageError("--two_step is a way of training: give --do_train, or leave it out")
