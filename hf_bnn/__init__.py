"""hf_bnn: binary BERT, ViT and ResNet for Hugging Face. Importing it registers them with the Auto classes."""

import importlib

from . import adapters  # noqa: F401 (checks PEFT's adapters around binary layers)
from .convert import binarize_, pack_, unpack_
from .diagnostics import InputReport, check_inputs
from .execution import bypassed_layers, check_layers_run
from .fused import optimize_
from .install import calibrate_, install_method
from .method_table import METHOD_CLASSES
from .models import (
    BinaryBertConfig,
    BinaryBertForMaskedLM,
    BinaryBertForMultipleChoice,
    BinaryBertForQuestionAnswering,
    BinaryBertForSequenceClassification,
    BinaryBertForTokenClassification,
    BinaryBertModel,
    BinaryResNetBackbone,
    BinaryResNetConfig,
    BinaryResNetForImageClassification,
    BinaryResNetModel,
    BinaryViTConfig,
    BinaryViTForImageClassification,
    BinaryViTForMaskedImageModeling,
    BinaryViTModel,
)
from .models.plug_in import BinaryConfig
from .moved import register as _register_moved
from .summary import Summary, summary

__version__ = "0.1.0"
_register_moved()

# Loaded on first use: packed models run without the training side.
_LAZY = {
    "BinaryTrainer": "training.trainer",
    "BinaryTrainingArguments": "training.arguments",
    "METHODS": "methods",
    "Method": "methods",
    "make_method": "methods",
    "register_method": "methods",
    **dict.fromkeys(METHOD_CLASSES, "methods"),
}

__all__ = [
    "BinaryBertConfig",
    "BinaryBertForMaskedLM",
    "BinaryBertForMultipleChoice",
    "BinaryBertForQuestionAnswering",
    "BinaryBertForSequenceClassification",
    "BinaryBertForTokenClassification",
    "BinaryBertModel",
    "BinaryConfig",
    "BinaryResNetBackbone",
    "BinaryResNetConfig",
    "BinaryResNetForImageClassification",
    "BinaryResNetModel",
    "BinaryViTConfig",
    "BinaryViTForImageClassification",
    "BinaryViTForMaskedImageModeling",
    "BinaryViTModel",
    "InputReport",
    "Summary",
    "binarize_",
    "bypassed_layers",
    "calibrate_",
    "check_inputs",
    "check_layers_run",
    "install_method",
    "optimize_",
    "pack_",
    "summary",
    "unpack_",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
