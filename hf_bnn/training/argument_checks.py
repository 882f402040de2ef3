"""Checks of a training run's arguments and data, made before anything is computed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sized
from functools import cache
from typing import Any

from torch import nn

from ..nn.layers import binary_layers

logger = logging.getLogger(__name__)

AT_LEAST = {  # the smallest valid value, and advice for those who tried a smaller one
    "per_device_train_batch_size": (1, "where memory is short, raise gradient_accumulation_steps"),
    "per_device_eval_batch_size": (1, "it changes the speed only"),
    "gradient_accumulation_steps": (1, "1 makes a step of every batch"),
    "learning_rate": (0, "about 1e-3 for a binary model"),
    "weight_decay": (0, "0 is none"),
    "max_grad_norm": (0, "0 does not clip"),
    "warmup_steps": (0, "0 begins at the full rate"),
    "dataloader_num_workers": (0, "0 loads in the main process"),
    "adam_epsilon": (0, "1e-8 is usual"),
}
SLOW_RATE = 1e-4


def check_numbers(args: Any) -> None:
    """Raise ValueError for training arguments that no run can have. Fields that are not set yet pass."""
    if args.output_dir is None:
        raise ValueError(
            "output_dir is missing: name the folder for the checkpoints and the trained model, --output_dir FOLDER"
        )
    for name, (least, hint) in AT_LEAST.items():
        value = getattr(args, name, None)
        if isinstance(value, int | float) and not (value >= least and math.isfinite(value)):
            raise ValueError(f"{name}={value}: expected a number of at least {least}; {hint}")
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs} and max_steps={args.max_steps}: expected one of them above 0"
        )


def refuse_empty(dataset: object, name: str) -> None:
    """Raise ValueError for a dataset of known length that has no row."""
    for part, found in dataset.items() if isinstance(dataset, dict) else ((None, dataset),):
        if isinstance(found, Sized) and not isinstance(found, str) and len(found) == 0:
            where = name if part is None else f"{name}[{part!r}]"
            raise ValueError(f"{where} is empty: expected at least one row; check how its rows were filtered")


def warn_of_recipe(model: nn.Module, learning_rate: float, has_teacher: bool) -> None:
    """Warn, once per process, of the two settings that usually cost a binary model most of its accuracy."""
    if not any(layer.binary_weight and layer.weight.requires_grad for layer in binary_layers(model)):
        return
    if 0 < learning_rate <= SLOW_RATE:
        _warn_of_rate(learning_rate)
    if not has_teacher:
        _warn_of_missing_teacher()


@cache
def _warn_of_rate(learning_rate: float) -> None:
    logger.warning(
        f"learning_rate={learning_rate} suits float models. The latent weights of a binary model hardly change "
        "their signs at this rate. 1e-3 is a good first choice"
    )


@cache
def _warn_of_missing_teacher() -> None:
    logger.warning(
        "no teacher_model: a binary model trained on labels alone ends several points lower. Give the float model, "
        "fine-tuned on the same task, as teacher_model (in the scripts --teacher_model_name_or_path)"
    )
