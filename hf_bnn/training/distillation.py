"""Distillation: the losses between a student's outputs and its teacher's. Needs torch only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .prediction_losses import (
    CLASSIFICATION,
    IGNORED,
    PROBLEMS,
    Head,
    Inputs,
    head_by_shape,
    inputs_device,
    problem_type,
    tensor_of,
)

STACKS = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


class Outputs(NamedTuple):
    """The outputs of a model that are compared: predictions by name, and hidden states by the name of their stack.

    Hidden states are `(batch, tokens, dim)`, or feature maps, of the embeddings and of each layer. `per_token`:
    predictions are `(batch, tokens, ...)`.
    """

    predictions: dict[str, Tensor]
    hidden_states: dict[str, tuple[Tensor, ...]]
    per_token: bool = False


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """The MSE between hidden states divided by the teacher's variance, averaged over layers. Padding does not count.

    A student with fewer layers is compared with evenly spaced layers of the teacher. `mask` is `(batch, tokens)`, for
    a multiple choice `(batch, choices, tokens)`. The states may also be feature maps,
    `(batch, channels, height, width)`. Raises ValueError if the shapes differ.
    """
    if student[0].shape[-1] != teacher[0].shape[-1]:
        raise ValueError(
            f"the teacher's hidden states are {teacher[0].shape[-1]} wide, the student's {student[0].shape[-1]}: "
            "set distillation_hidden_weight=0"
        )
    mask = None if mask is None else mask.reshape(-1, mask.shape[-1]).bool()
    steps = (len(teacher) - 1) / max(1, len(student) - 1)
    losses = []
    for index, own in enumerate(student):
        other = teacher[round(index * steps)].float()
        own = own.float()
        if own.shape != other.shape:
            raise ValueError(
                f"the teacher's hidden states are {tuple(other.shape)}, the student's {tuple(own.shape)}: "
                "set distillation_hidden_weight=0"
            )
        if mask is not None:
            if mask.shape != own.shape[:2]:
                raise ValueError(
                    f"the hidden states are {tuple(own.shape)}, the mask {tuple(mask.shape)}: it is unclear which of "
                    "them are padding; set distillation_hidden_weight=0"
                )
            own, other = own[mask], other[mask]
        losses.append(F.mse_loss(own, other) / other.var().clamp_min(1e-8))
    return torch.stack(losses).mean()


def _stack_mask(stack: str, states: Sequence[Tensor], inputs: Inputs) -> Tensor | None:
    """The mask of real tokens for a stack of layers."""
    if stack == "decoder_hidden_states":
        mask, labels = tensor_of(inputs, "decoder_attention_mask"), tensor_of(inputs, "labels")
        if mask is None and labels is not None and labels.shape == states[0].shape[:2]:
            return labels.ne(IGNORED)
        return mask
    return tensor_of(inputs, "attention_mask") if states[0].dim() == 3 else None


@dataclass(frozen=True)
class Distillation:
    """How a student learns from a teacher's predictions and hidden states. `head` and `config` are the student's.

    >>> distillation = Distillation(logits_weight=1.0, hidden_weight=0.0)
    >>> batch = {"x": torch.zeros(2, 8)}
    >>> own, teacher = (distillation.read({"logits": torch.zeros(2, 3)}, batch) for _ in range(2))
    >>> distillation.loss(own, teacher, batch)
    tensor(0.)
    """

    logits_weight: float = 1.0
    hidden_weight: float = 1.0
    temperature: float = 1.0
    head: Head | None = None
    config: Any = None

    def read(self, output: Any, inputs: Inputs, whose: str = "teacher") -> Outputs:
        """The parts of a model's output that the losses need. Raises ValueError if one is missing."""
        get = output.get if isinstance(output, Mapping) else partial(getattr, output)
        predictions, hidden, per_token = {}, {}, False
        if self.logits_weight > 0:
            head = CLASSIFICATION if self.head is None else self.head
            for name in head.outputs:
                value = get(name, None)
                if not isinstance(value, Tensor):
                    names = list(output) if isinstance(output, Mapping) else type(output).__name__
                    raise ValueError(
                        f"the {whose} returns no {name!r}, only {names}: take a model with the student's head, or set "
                        "distillation_logits_weight=0"
                    )
                predictions[name] = value
            per_token = (self.head or head_by_shape(next(iter(predictions.values())), inputs)).per_token
        if self.hidden_weight > 0:
            stacks = {name: get(name, None) for name in STACKS}
            hidden = {name: tuple(states) for name, states in stacks.items() if states is not None}
            if not hidden:
                raise ValueError(f"the {whose} returns no hidden states: set distillation_hidden_weight=0")
        return Outputs(predictions, hidden, per_token)

    def loss(self, student: Outputs, teacher: Outputs, inputs: Inputs) -> Tensor:
        """The weighted sum of both losses. Raises ValueError if the two models' outputs cannot be compared."""
        losses = []
        if self.logits_weight > 0:
            losses.append(self.logits_weight * self.prediction_loss(student.predictions, teacher.predictions, inputs))
        if self.hidden_weight > 0:
            losses.append(self.hidden_weight * self._hidden_loss(student.hidden_states, teacher.hidden_states, inputs))
        return sum(losses, torch.zeros((), device=inputs_device(inputs)))

    def prediction_loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """The mean distance between the student's and the teacher's predictions, without padding."""
        losses = []
        for name, own in student.items():
            if own.shape != teacher[name].shape:
                raise ValueError(
                    f"the teacher's {name} are {tuple(teacher[name].shape)}, the student's {tuple(own.shape)}"
                )
            head = self.head or head_by_shape(own, inputs)
            loss = head.loss or PROBLEMS[problem_type(self.config, own, tensor_of(inputs, "labels"))]
            losses.append(loss(own, teacher[name], inputs, self.temperature))
        return torch.stack(losses).mean()

    @staticmethod
    def _hidden_loss(student: dict[str, tuple], teacher: dict[str, tuple], inputs: Inputs) -> Tensor:
        if student.keys() != teacher.keys():
            raise ValueError(
                f"the teacher returns {list(teacher)}, the student {list(student)}: set distillation_hidden_weight=0"
            )
        losses = [
            hidden_loss(own, teacher[name], _stack_mask(name, own, inputs)) * len(own) for name, own in student.items()
        ]
        return torch.stack(losses).sum() / sum(len(own) for own in student.values())
