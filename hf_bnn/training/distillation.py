"""Losses between a student and its teacher, chosen by what the student's head predicts. Needs torch only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # transformers' label of what is not to be predicted
STACKS = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")

Inputs = Mapping[str, Any]
Loss = Callable[[Tensor, Tensor, Inputs, float], Tensor]


class Outputs(NamedTuple):
    """What is compared of a model's outputs: the predictions by name, and each stack's hidden states by name.

    Hidden states are `(batch, tokens, dim)`, or feature maps, of the embeddings and of each layer. `per_token`:
    predictions are `(batch, tokens, ...)`.
    """

    predictions: dict[str, Tensor]
    hidden_states: dict[str, tuple[Tensor, ...]]
    per_token: bool = False


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each prediction (arXiv 1503.02531): `(..., classes) -> (...)`."""
    log_p, log_q = (F.log_softmax(logits.float() / temperature, -1) for logits in (teacher, student))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


def label_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each label, which is true or not whatever the others are. Same shape."""
    student, teacher = student.float() / temperature, teacher.float() / temperature
    p = teacher.sigmoid()
    # The cross-entropy of the student less the teacher's own: 0 where they agree.
    cross = F.binary_cross_entropy_with_logits(student, p, reduction="none")
    own = F.binary_cross_entropy_with_logits(teacher, p, reduction="none")
    return (cross - own) * temperature**2


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values where the mask is true; 0 if it is nowhere."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


# What counts as a prediction. All masks are True where there is one.


def _real(inputs: Inputs, shape: torch.Size, labels: Tensor | None, masks: Sequence[Tensor | None]) -> Tensor:
    """Which predictions of this shape count, by the labels and the masks that there are."""
    given = [labels.ne(IGNORED) if labels is not None else None, *(m if m is None else m.ne(0) for m in masks)]
    given = [mask for mask in given if mask is not None]
    fitting = [mask for mask in given if mask.shape == shape]
    if given and not fitting:
        raise ValueError(
            f"the model makes predictions of shape {tuple(shape)}, but its labels and masks are of "
            f"{[tuple(mask.shape) for mask in given]}: nothing tells which count. Set distillation_logits_weight=0"
        )
    real = torch.ones(shape, dtype=torch.bool, device=inputs_device(inputs))
    for mask in fitting:
        real = real & mask
    return real


def inputs_device(inputs: Inputs) -> torch.device:
    """The device of a batch's tensors."""
    return next(value.device for value in inputs.values() if isinstance(value, Tensor))


def _tensor(inputs: Inputs, name: str) -> Tensor | None:
    value = inputs.get(name)
    return value if isinstance(value, Tensor) else None


def _next(tensor: Tensor | None, end: int) -> Tensor | None:
    """Each token's successor, `(batch, tokens)`."""
    return None if tensor is None or tensor.dim() != 2 else F.pad(tensor, (0, 1), value=end)[:, 1:]


def _tokens(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    masks = [_tensor(inputs, "attention_mask")]
    real = _real(inputs, student.shape[:-1], _tensor(inputs, "labels"), masks)
    return masked_mean(divergence(student, teacher, temperature), real)


def _next_tokens(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    mask, shifted = _tensor(inputs, "attention_mask"), _tensor(inputs, "shift_labels")
    labels = _next(_tensor(inputs, "labels"), IGNORED) if shifted is None else shifted
    real = _real(inputs, student.shape[:-1], labels, [mask, _next(mask, 0)])
    if shifted is None:
        real[:, -1] = False  # what follows the last token is not in the data
    return masked_mean(divergence(student, teacher, temperature), real)


def _target_tokens(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    masks = [_tensor(inputs, "decoder_attention_mask")]
    real = _real(inputs, student.shape[:-1], _tensor(inputs, "labels"), masks)
    return masked_mean(divergence(student, teacher, temperature), real)


def _spans(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    """The tokens are the classes here; those of padding are out of the question."""
    real = _real(inputs, student.shape, None, [_tensor(inputs, "attention_mask")])
    never = torch.finfo(torch.float32).min * min(1.0, temperature)
    student, teacher = (torch.where(real, logits.float(), never) for logits in (student, teacher))
    return divergence(student, teacher, temperature).mean()


def _pixels(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    """The squared error of the pixels of masked patches, or of all pixels if none is masked."""
    error = (student.float() - teacher.float()) ** 2
    masked = _tensor(inputs, "bool_masked_pos")
    if masked is None:
        return error.mean()
    side = round(masked.shape[1] ** 0.5)
    height, width = student.shape[-2] // side, student.shape[-1] // side
    mask = masked.bool().view(-1, 1, side, side).repeat_interleave(height, 2).repeat_interleave(width, 3)
    return masked_mean(error, mask.expand_as(error))


def _classes(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    return divergence(student, teacher, temperature).mean()


def _labels(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    return label_divergence(student, teacher, temperature).mean()


def _values(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    """The squared error; a temperature says nothing of values."""
    return F.mse_loss(student.float(), teacher.float())


PROBLEMS: dict[str, Loss] = {
    "single_label_classification": _classes,
    "multi_label_classification": _labels,
    "regression": _values,
}


@dataclass(frozen=True)
class Head:
    """What a model predicts: the names of its outputs, and their loss (None: it depends on the problem type)."""

    task: str
    loss: Loss | None = None
    outputs: tuple[str, ...] = ("logits",)
    per_token: bool = False


CLASSIFICATION = Head("classification")
TOKENS = Head("token classification", _tokens, per_token=True)
NEXT_TOKENS = Head("causal language modelling", _next_tokens, per_token=True)
TARGET_TOKENS = Head("sequence to sequence", _target_tokens, per_token=True)
HEADS = {  # by the ending of the class's name
    "ForSequenceClassification": CLASSIFICATION,
    "ForImageClassification": CLASSIFICATION,
    "ForAudioClassification": CLASSIFICATION,
    "ForVideoClassification": CLASSIFICATION,
    "ForMultipleChoice": Head("multiple choice", _classes),
    "ForNextSentencePrediction": Head("next sentence prediction", _classes),
    "ForTokenClassification": TOKENS,
    "ForMaskedLM": Head("masked language modelling", _tokens, per_token=True),
    "ForCausalLM": NEXT_TOKENS,
    "LMHeadModel": NEXT_TOKENS,
    "ForConditionalGeneration": TARGET_TOKENS,
    "ForQuestionAnswering": Head("question answering", _spans, ("start_logits", "end_logits"), per_token=True),
    "ForMaskedImageModeling": Head("masked image modelling", _pixels, ("reconstruction",)),
}


def head_of(model: nn.Module) -> Head | None:
    """The head of a model, by the names of its class and of those that it comes from; None for an unknown one."""
    model = getattr(model, "get_base_model", lambda: model)()  # without peft's wrapper
    for cls in type(model).__mro__:
        found = re.search(f"({'|'.join(HEADS)})(WithTeacher)?$", cls.__name__)
        if found is None:
            continue
        head = HEADS[found[1]]
        # Llava and its like are named as encoder-decoders are, but go on with the text that they are given.
        decoder = head is TARGET_TOKENS and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return NEXT_TOKENS if decoder else head
    return None


def _head_by_shape(logits: Tensor, inputs: Inputs) -> Head:
    """The head of a class of one's own, from the logits that it puts out."""
    described = [_tensor(inputs, name) for name in ("labels", "attention_mask", "input_ids")]
    if logits.dim() == 2:
        return CLASSIFICATION
    if logits.dim() == 3 and any(given is not None and given.shape == logits.shape[:2] for given in described):
        return TOKENS
    raise ValueError(
        f"nothing tells what logits of shape {tuple(logits.shape)} predict: name the model's class after its task, as "
        f"transformers does ({', '.join(list(HEADS)[:3])}, ...), or set distillation_logits_weight=0"
    )


def problem_type(config: Any, logits: Tensor, labels: Tensor | None) -> str:
    """What a classifier's logits `(batch, labels)` mean: config.problem_type; unless set, as transformers infers it."""
    given = getattr(config, "problem_type", None)
    if given is not None:
        if given not in PROBLEMS:
            raise ValueError(f"problem_type={given!r}: expected one of {', '.join(PROBLEMS)}")
        return given
    if logits.shape[-1] == 1:
        return "regression"
    whole = labels is None or not labels.is_floating_point()
    return "single_label_classification" if whole else "multi_label_classification"


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over layers of the MSE between hidden states, over the teacher's variance; padded tokens do not count.

    A student of fewer layers is held against evenly spaced layers of the teacher. `mask` is `(batch, tokens)`, of a
    multiple choice `(batch, choices, tokens)`. The states may also be feature maps, `(batch, channels, height, width)`.
    Raises ValueError where the shapes differ.
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
                    f"the hidden states are {tuple(own.shape)}, the mask {tuple(mask.shape)}: nothing tells which of "
                    "them are padding; set distillation_hidden_weight=0"
                )
            own, other = own[mask], other[mask]
        losses.append(F.mse_loss(own, other) / other.var().clamp_min(1e-8))
    return torch.stack(losses).mean()


def _stack_mask(stack: str, states: Sequence[Tensor], inputs: Inputs) -> Tensor | None:
    """Which tokens of a stack of layers are real."""
    if stack == "decoder_hidden_states":
        mask, labels = _tensor(inputs, "decoder_attention_mask"), _tensor(inputs, "labels")
        if mask is None and labels is not None and labels.shape == states[0].shape[:2]:
            return labels.ne(IGNORED)
        return mask
    return _tensor(inputs, "attention_mask") if states[0].dim() == 3 else None


@dataclass(frozen=True)
class Distillation:
    """How a student learns from a teacher's predictions and hidden states. `head`, `config`: the student's.

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
        """What the losses need of a model's output. Raises ValueError if it is not there."""
        get = output.get if isinstance(output, Mapping) else partial(getattr, output)
        predictions, hidden, per_token = {}, {}, False
        if self.logits_weight > 0:
            head = CLASSIFICATION if self.head is None else self.head
            for name in head.outputs:
                value = get(name, None)
                if not isinstance(value, Tensor):
                    names = list(output) if isinstance(output, Mapping) else type(output).__name__
                    raise ValueError(
                        f"the {whose} puts out no {name!r}, only {names}: take a model with the student's head, or set "
                        "distillation_logits_weight=0"
                    )
                predictions[name] = value
            per_token = (self.head or _head_by_shape(next(iter(predictions.values())), inputs)).per_token
        if self.hidden_weight > 0:
            stacks = {name: get(name, None) for name in STACKS}
            hidden = {name: tuple(states) for name, states in stacks.items() if states is not None}
            if not hidden:
                raise ValueError(f"the {whose} puts out no hidden states: set distillation_hidden_weight=0")
        return Outputs(predictions, hidden, per_token)

    def loss(self, student: Outputs, teacher: Outputs, inputs: Inputs) -> Tensor:
        """The weighted sum of both losses. Raises ValueError where the two models' outputs cannot be compared."""
        losses = []
        if self.logits_weight > 0:
            losses.append(self.logits_weight * self.prediction_loss(student.predictions, teacher.predictions, inputs))
        if self.hidden_weight > 0:
            losses.append(self.hidden_weight * self._hidden_loss(student.hidden_states, teacher.hidden_states, inputs))
        return sum(losses, torch.zeros((), device=inputs_device(inputs)))

    def prediction_loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """The mean over the real predictions of how far the student's are from the teacher's."""
        losses = []
        for name, own in student.items():
            if own.shape != teacher[name].shape:
                raise ValueError(
                    f"the teacher's {name} are {tuple(teacher[name].shape)}, the student's {tuple(own.shape)}"
                )
            head = self.head or _head_by_shape(own, inputs)
            loss = head.loss or PROBLEMS[problem_type(self.config, own, _tensor(inputs, "labels"))]
            losses.append(loss(own, teacher[name], inputs, self.temperature))
        return torch.stack(losses).mean()

    @staticmethod
    def _hidden_loss(student: dict[str, tuple], teacher: dict[str, tuple], inputs: Inputs) -> Tensor:
        if student.keys() != teacher.keys():
            raise ValueError(
                f"the teacher puts out {list(teacher)}, the student {list(student)}: set distillation_hidden_weight=0"
            )
        losses = [
            hidden_loss(own, teacher[name], _stack_mask(name, own, inputs)) * len(own) for name, own in student.items()
        ]
        return torch.stack(losses).sum() / sum(len(own) for own in student.values())
