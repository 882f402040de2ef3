"""Loads the model of a text run and its teacher."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from ...models.bert import BinaryBertConfig, BinaryBertForSequenceClassification
from ..commandline import check_packed_structure, user_errors
from ..errors import UsageError
from ..labels import Labels, check_same_order, set_labels
from .arguments import Arguments, ModelArguments


def has_trained_head(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint of this config is a trained classifier."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def load_config(model: ModelArguments) -> PreTrainedConfig:
    """The config stored with the checkpoint."""
    name = model.config_name or model.model_name_or_path
    with user_errors(name):
        return AutoConfig.from_pretrained(name, revision=model.model_revision, **model.hub)


def load_model(model: ModelArguments, stored: PreTrainedConfig, labels: Labels) -> PreTrainedModel:
    """The model, with a head for these labels: float for `--binarize none`, packed if the checkpoint is, else latent.

    Always in float32: updates of latent weights are far smaller than bfloat16's steps.
    """
    loading = {
        "revision": model.model_revision,
        "dtype": torch.float32,
        "ignore_mismatched_sizes": model.ignore_mismatched_sizes,
        **model.hub,
    }
    set_labels(stored, labels)
    if model.binarize == "none":
        if isinstance(stored, BinaryBertConfig):
            raise UsageError(
                f"{model.model_name_or_path} is a binary checkpoint, which --binarize none cannot make float: "
                "leave the argument out, or start from a float checkpoint"
            )
        kind = AutoModelForSequenceClassification
        return kind.from_pretrained(model.model_name_or_path, config=stored, **loading)
    kind, name = BinaryBertForSequenceClassification, model.config_name or model.model_name_or_path
    config = BinaryBertConfig.from_pretrained(name, **model.structure, revision=model.model_revision, **model.hub)
    set_labels(config, labels)
    check_packed_structure(model.model_name_or_path, model.structure, stored)
    return kind.from_pretrained(model.model_name_or_path, config=config, **loading)


def load_teacher(arguments: Arguments, student: PreTrainedModel) -> PreTrainedModel | None:
    """The teacher; None if none is named or nothing is trained. Raises UsageError if it cannot teach this student."""
    name = arguments.model.teacher_model_name_or_path
    if name is None or not arguments.training.do_train:
        return None
    with user_errors(name):
        config = AutoConfig.from_pretrained(name, **arguments.model.hub)
    what = f"the teacher {name}"
    if not has_trained_head(config):
        raise UsageError(f"{what} is no trained classifier ({config.architectures}): train one with --binarize none")
    own = student.config
    check_same_order(what, config, own)
    if config.vocab_size != own.vocab_size:
        raise UsageError(
            f"{what} has {config.vocab_size} tokens in its vocabulary, the student {own.vocab_size}: "
            "both must use the same tokenizer"
        )
    if config.hidden_size != own.hidden_size and arguments.training.distillation_hidden_weight > 0:
        raise UsageError(
            f"{what} has hidden states of {config.hidden_size}, the student of {own.hidden_size}: "
            "they can only be compared by their logits, with --distillation_hidden_weight 0"
        )
    return AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, **arguments.model.hub)
