"""Whether a binary model is being trained by transformers' own Trainer, which knows nothing of it."""

from __future__ import annotations

import sys
from functools import cache

from torch import nn
from transformers.utils import logging

from ..layers import binary_layers

logger = logging.get_logger(__name__)

FRAMES = 12  # between Trainer.training_step and the model's own train()


def notice_plain_trainer(model: nn.Module) -> None:
    """Warn, once for a class of models, if a Trainer that is no BinaryTrainer is about to train `model`.

    A Trainer does not tell the models that it trains: it is looked for among the callers.
    """
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None or not any(p.requires_grad for layer in binary_layers(model) for p in layer.parameters()):
        return
    frame = sys._getframe(1)
    for _ in range(FRAMES):
        if frame is None:
            return
        owner = frame.f_locals.get("self")
        if isinstance(owner, trainer):
            if not getattr(owner, "trains_binary_models", False):
                _warn(type(owner).__name__, type(model).__name__)
            return
        frame = frame.f_back


@cache
def _warn(trainer: str, model: str) -> None:
    logger.warning(
        f"{trainer} trains this binary {model} as if it were float: levels are not fitted to the data, a method other "
        "than the straight-through estimator is not told of its steps, accumulated and distributed losses may be "
        "scaled wrongly, and the final model is not packed. Use hf_bnn.BinaryTrainer, which takes the same arguments"
    )
