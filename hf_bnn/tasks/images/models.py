"""The models of run_image_classification.py: from a checkpoint or from scratch, a teacher, the image processor."""

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
from ...training.distillation import Distillation, head_of
from ..commandline import check_packed_structure, user_errors
from ..errors import UsageError
from ..labels import Labels, check_same_order, set_labels
from .arguments import Arguments, ModelArguments

# What a config works out from its other fields, or says of weights that it was saved with.
NOT_INHERITED = ("stage_names", "out_features", "out_indices", "model_type", "architectures", "weight_format")
NOT_INHERITED += ("weights_sha256", "method", "dtype", "_name_or_path")
PLUGGED_IN = tuple(inspect.signature(BinaryConfig).parameters)


class Family(NamedTuple):
    """An architecture that has a binary class of its own."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]

    @property
    def types(self) -> tuple[str, ...]:
        """The model_type of the checkpoints that it reads."""
        return (self.config.float_model_type, *self.config.also_reads, self.config.model_type)


FAMILIES = (
    Family(BinaryViTConfig, BinaryViTForImageClassification),
    Family(BinaryResNetConfig, BinaryResNetForImageClassification),
)


def family_of(model_type: str) -> Family | None:
    """The family that reads checkpoints of this type; None: transformers' own classes and BinaryConfig do."""
    return next((family for family in FAMILIES if model_type in family.types), None)


# Configs


def load_config(model: ModelArguments) -> PreTrainedConfig:
    """The config of the checkpoint as it is, or for a model from scratch the one to start from."""
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
    """A copy of the config, of the class `kind` if given, for a new model, with other values in some fields."""
    check_fields(config, fields)
    known = {key: value for key, value in config.to_dict().items() if key not in NOT_INHERITED}
    with user_errors():
        return (kind or type(config))(**{**known, **fields})


def sized(model: ModelArguments, config: PreTrainedConfig) -> dict[str, int]:
    """The field of a config from scratch that --image_size sets, if it has one."""
    return {"image_size": model.image_size} if model.image_size is not None and hasattr(config, "image_size") else {}


def has_trained_head(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint of this config is a classifier already."""
    return any(name.endswith("ForImageClassification") for name in config.architectures or ())


def float_one(config: PreTrainedConfig) -> bool:
    """Whether the config is of a model without anything binary."""
    binary = getattr(config, "quantization_config", None) is not None or family_of_binary(config)
    return not binary or getattr(config, "binarize", None) == "none"


def family_of_binary(config: PreTrainedConfig) -> bool:
    """Whether the config is that of one of our own classes."""
    return any(isinstance(config, family.config) for family in FAMILIES)


# Models


def load_model(model: ModelArguments, stored: PreTrainedConfig, labels: Labels) -> PreTrainedModel:
    """The model with the head that the labels need: float if `--binarize none`, else latent, or packed as it is.

    In float32 whatever the checkpoint's type: updates of latent weights are far smaller than bfloat16's steps.
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
    """What the model's from_pretrained takes."""
    mismatched = {"ignore_mismatched_sizes": model.ignore_mismatched_sizes}
    return {"revision": model.model_revision, "dtype": torch.float32, **mismatched, **model.hub}


def load_own(model: ModelArguments, family: Family, stored: PreTrainedConfig, labels: Labels) -> PreTrainedModel:
    """A model of a binary class of its own."""
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
    """A model of one of transformers' classes, binary through BinaryConfig."""
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
    """The teacher, if one is named and there is training to do. Raises UsageError if it cannot teach this student."""
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
    """Raise UsageError if a teacher, called `what`, takes images in another size or scale than the student."""
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
    """The processor that is named, else that of the model or of the teacher; None for a model from scratch."""
    name = model.image_processor_name or model.model_name_or_path or model.teacher_model_name_or_path
    if name is None:
        return None
    revision = {} if name != model.model_name_or_path else {"revision": model.model_revision}
    with user_errors(name):
        return AutoImageProcessor.from_pretrained(name, **revision, **model.hub)


def make_processor(size: int, mean: list[float], std: list[float]) -> ViTImageProcessorPil:
    """The processor of a model from scratch: squares of this size."""
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=mean, image_std=std)
