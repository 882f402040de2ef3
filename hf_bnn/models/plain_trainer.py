"""A warning for binary models that transformers' own Trainer trains, as if they were float."""

from __future__ import annotations

import sys
from functools import cache

from torch import nn
from transformers.utils import logging

from ..nn.layers import binary_layers

logger = logging.get_logger(__name__)

FRAMES = 12  # between Trainer.training_step and the model's own train()


def notice_plain_trainer(model: nn.Module) -> None:
    """Warn, once per class of models, if a Trainer other than BinaryTrainer is about to train `model`.

    A Trainer does not announce itself to the model, so the call stack is searched for one.
    """
    trainer = _calling_trainer()
    if trainer is None or getattr(trainer, "trains_binary_models", False):
        return
    if any(parameter.requires_grad for layer in binary_layers(model) for parameter in layer.parameters()):
        _warn(type(trainer).__name__, type(model).__name__)


def _calling_trainer() -> object | None:
    """The transformers Trainer that called, if any."""
    kind = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)  # None: never imported
    frame = None if kind is None else sys._getframe(2)
    for _ in range(FRAMES):
        if frame is None:
            return None
        if isinstance(owner := frame.f_locals.get("self"), kind):
            return owner
        frame = frame.f_back
    return None


@cache
def _warn(trainer: str, model: str) -> None:
    logger.warning(
        f"{trainer} trains this binary {model} as if it were float: levels are not fitted to the data, a method other "
        "than the straight-through estimator is not told of its steps, accumulated and distributed losses may be "
        "scaled wrongly, and the final model is not packed. Use hf_bnn.BinaryTrainer, which takes the same arguments"
    )
