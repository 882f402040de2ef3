"""Loads the model of an image run (a checkpoint, or a new model), its teacher and its image processor."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.image_processing_utils import BaseImageProcessor

from ...models.plug_in import BinaryConfig
from ...models.resnet import BinaryResNetConfig, BinaryResNetForImageClassification
from ...models.vit import BinaryViTConfig, BinaryViTForImageClassification
from ...training.distillation import Distillation
from ...training.prediction_losses import head_of
from ..commandline import check_packed_structure, user_errors
from ..errors import UsageError
from ..labels import Labels, check_same_order, set_labels
from .arguments import Arguments, ModelArguments

# Fields that a config derives from others, or that describe the weights it was saved with.
NOT_INHERITED = ("stage_names", "out_features", "out_indices", "model_type", "architectures", "weight_format")
NOT_INHERITED += ("weights_sha256", "method", "dtype", "_name_or_path")
PLUGGED_IN = tuple(inspect.signature(BinaryConfig).parameters)


class Family(NamedTuple):
    """An architecture for which hf_bnn has binary classes."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]

    @property
    def types(self) -> tuple[str, ...]:
        """The `model_type` of every checkpoint that the family reads."""
        return (self.config.float_model_type, *self.config.also_reads, self.config.model_type)


FAMILIES = (
    Family(BinaryViTConfig, BinaryViTForImageClassification),
    Family(BinaryResNetConfig, BinaryResNetForImageClassification),
)


def family_of(model_type: str) -> Family | None:
    """The family that reads checkpoints of this type. None: transformers' own class does, with BinaryConfig."""
    return next((family for family in FAMILIES if model_type in family.types), None)


# Configs


def load_config(model: ModelArguments) -> PreTrainedConfig:
    """The config stored with the checkpoint; for a model from scratch, the config to start from."""
    name = model.model_name_or_path or model.config_name
    if name is not None:
        with user_errors(name):
            config = AutoConfig.from_pretrained(name, revision=model.model_revision, **model.hub)
    elif model.model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[model.model_type]()
    else:
        near = difflib.get_close_matches(model.model_type, CONFIG_MAPPING.keys(), 3)
        raise UsageError(f"unknown model_type {model.model_type!r}; expected vit, resnet or another like {near}")
    family = family_of(config.model_type)
    if family is None and type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UsageError(
            f"{name or model.model_type} is a {config.model_type!r} model, which classifies no images: expected vit, "
            "resnet, or another of transformers' image classifiers"
        )
    if family is not None and model.model_name_or_path is None:
        config = from_scratch(config, {}, family.config)
    return config


def check_fields(config: PreTrainedConfig, fields: dict[str, Any]) -> None:
    """Raise UsageError for a field that the config does not have."""
    known = config.to_dict()
    for key in fields:
        if key not in known and not hasattr(config, key):
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its fields: {', '.join(sorted(known))}"
            raise UsageError(f"config_overrides: {type(config).__name__} has no field {key!r}; {hint}")


def from_scratch(
    config: PreTrainedConfig, fields: dict[str, Any], kind: type[PreTrainedConfig] | None = None
) -> PreTrainedConfig:
    """A copy of the config for a new model, of the class `kind` if given, with `fields` replaced."""
    check_fields(config, fields)
    known = {key: value for key, value in config.to_dict().items() if key not in NOT_INHERITED}
    with user_errors():
        return (kind or type(config))(**{**known, **fields})


def sized(model: ModelArguments, config: PreTrainedConfig) -> dict[str, int]:
    """The config field that --image_size sets; empty if it is not given, or the config has no such field."""
    return {"image_size": model.image_size} if model.image_size is not None and hasattr(config, "image_size") else {}


def has_trained_head(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint of this config is a trained classifier."""
    return any(name.endswith("ForImageClassification") for name in config.architectures or ())


def float_one(config: PreTrainedConfig) -> bool:
    """Whether the config describes a model without any binary layer."""
    binary = getattr(config, "quantization_config", None) is not None or family_of_binary(config)
    return not binary or getattr(config, "binarize", None) == "none"


def family_of_binary(config: PreTrainedConfig) -> bool:
    """Whether the config is of one of hf_bnn's own classes."""
    return any(isinstance(config, family.config) for family in FAMILIES)


# Models


def load_model(model: ModelArguments, stored: PreTrainedConfig, labels: Labels) -> PreTrainedModel:
    """The model, with a head for these labels: float for `--binarize none`, packed if the checkpoint is, else latent.

    Always in float32: updates of latent weights are far smaller than bfloat16's steps.
    """
    name, family = model.model_name_or_path, family_of(stored.model_type)
    if model.binarize == "none" and not float_one(stored) and name is not None:
        raise UsageError(
            f"{name} is a binary checkpoint, which --binarize none cannot make float: leave the argument out, or start "
            "from a float checkpoint"
        )
    if name is not None:
        check_packed_structure(name, model.structure, stored)
    if family is not None and not (model.binarize == "none" and name is not None and not family_of_binary(stored)):
        return load_own(model, family, stored, labels)
    return load_other(model, stored, labels)


def loading(model: ModelArguments) -> dict[str, Any]:
    """The arguments of the model's `from_pretrained`."""
    mismatched = {"ignore_mismatched_sizes": model.ignore_mismatched_sizes}
    return {"revision": model.model_revision, "dtype": torch.float32, **mismatched, **model.hub}


def load_own(model: ModelArguments, family: Family, stored: PreTrainedConfig, labels: Labels) -> PreTrainedModel:
    """A model of one of hf_bnn's own classes."""
    name = model.model_name_or_path
    if name is None:
        config = from_scratch(stored, {**model.structure, **sized(model, stored)})
        set_labels(config, labels)
        return family.model(config)
    check_fields(family.config(), model.structure)
    config = family.config.from_pretrained(name, **model.structure, revision=model.model_revision, **model.hub)
    set_labels(config, labels)
    return family.model.from_pretrained(name, config=config, **loading(model))


def load_other(model: ModelArguments, stored: PreTrainedConfig, labels: Labels) -> PreTrainedModel:
    """A model of one of transformers' classes, made binary by BinaryConfig."""
    if model.attention is not None:
        raise UsageError(f"--attention is for ViT: leave it out with a {stored.model_type!r} model")
    plug = {key: value for key, value in model.structure.items() if key in PLUGGED_IN}
    fields = {key: value for key, value in model.structure.items() if key not in plug}
    check_fields(stored, fields)
    name = model.model_name_or_path
    if name is None:
        config = from_scratch(stored, {**fields, **sized(model, stored)})
    else:
        config = AutoConfig.from_pretrained(name, **fields, revision=model.model_revision, **model.hub)
    set_labels(config, labels)
    binary = None
    if plug.get("binarize") != "none" and getattr(stored, "quantization_config", None) is None:
        binary = BinaryConfig(**plug)
    if name is None:
        made = AutoModelForImageClassification.from_config(config)
        return made if binary is None else binary.apply_(made)
    more = {} if binary is None else {"quantization_config": binary}
    return AutoModelForImageClassification.from_pretrained(name, config=config, **more, **loading(model))


def load_teacher(
    arguments: Arguments, student: PreTrainedModel, processor: BaseImageProcessor
) -> PreTrainedModel | None:
    """The teacher; None if none is named or nothing is trained. Raises UsageError if it cannot teach this student."""
    model = arguments.model
    name = model.teacher_model_name_or_path
    if name is None or not arguments.training.do_train:
        return None
    hidden = arguments.training.distillation_hidden_weight > 0
    what = f"the teacher {name}"
    with user_errors(name):
        config = AutoConfig.from_pretrained(name, **model.hub)
        if not has_trained_head(config):
            raise UsageError(
                f"{what} is no trained image classifier ({config.architectures}): train one with --binarize none"
            )
        check_same_order(what, config, student.config)
        check_same_images(what, load_processor(replace(model, image_processor_name=name)), processor)
        teacher = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32, **model.hub)
    with user_errors():
        image = Image.new("RGB" if student.config.num_channels == 3 else "L", (32, 32))
        inputs = processor(image, return_tensors="pt", do_rescale=True)
        with torch.no_grad():
            outputs = [net.eval()(**inputs, output_hidden_states=True) for net in (student, teacher)]
        lesson = Distillation(1.0, float(hidden), head=head_of(student), config=student.config)
        lesson.loss(*(lesson.read(output, inputs) for output in outputs), inputs)
    return teacher


def check_same_images(what: str, theirs: BaseImageProcessor, own: BaseImageProcessor) -> None:
    """Raise UsageError if a teacher (called `what`) takes images of another size or scale than the student."""
    for field in ("size", "crop_size", "image_mean", "image_std"):
        needed, given = (getattr(processor, field, None) for processor in (theirs, own))
        needed, given = (list(value) if isinstance(value, tuple) else value for value in (needed, given))
        if needed != given:
            raise UsageError(
                f"{what} takes images of {field} {needed}, the student of {given}: name the teacher's image processor "
                "in --image_processor_name"
            )


# Image processors


def load_processor(model: ModelArguments) -> BaseImageProcessor | None:
    """The processor that is named, else the model's or the teacher's. None for a model from scratch without either."""
    name = model.image_processor_name or model.model_name_or_path or model.teacher_model_name_or_path
    if name is None:
        return None
    revision = {} if name != model.model_name_or_path else {"revision": model.model_revision}
    with user_errors(name):
        return AutoImageProcessor.from_pretrained(name, **revision, **model.hub)


def make_processor(size: int, mean: list[float], std: list[float]) -> ViTImageProcessorPil:
    """The processor of a model from scratch: it resizes to squares of this size."""
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=mean, image_std=std)
