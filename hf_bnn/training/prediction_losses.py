"""Losses between the predictions of a student and its teacher, chosen by the student's head. Needs torch only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label with which transformers marks positions that are not predicted

Inputs = Mapping[str, Any]
Loss = Callable[[Tensor, Tensor, Inputs, float], Tensor]


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each prediction (arXiv 1503.02531): `(..., classes) -> (...)`."""
    log_p, log_q = (F.log_softmax(logits.float() / temperature, -1) for logits in (teacher, student))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


def label_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each label, independent of the other labels. Same shape as the input."""
    student, teacher = student.float() / temperature, teacher.float() / temperature
    p = teacher.sigmoid()
    # The student's cross-entropy minus the teacher's own: 0 where they agree.
    cross = F.binary_cross_entropy_with_logits(student, p, reduction="none")
    own = F.binary_cross_entropy_with_logits(teacher, p, reduction="none")
    return (cross - own) * temperature**2


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values where the mask is true; 0 if it is true nowhere."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


# Which positions count as predictions: the masks are True there.


def _real(inputs: Inputs, shape: torch.Size, labels: Tensor | None, masks: Sequence[Tensor | None]) -> Tensor:
    """The mask of predictions of this shape that count, from the labels and masks that exist."""
    given = [labels.ne(IGNORED) if labels is not None else None, *(m if m is None else m.ne(0) for m in masks)]
    given = [mask for mask in given if mask is not None]
    fitting = [mask for mask in given if mask.shape == shape]
    if given and not fitting:
        raise ValueError(
            f"the model makes predictions of shape {tuple(shape)}, but its labels and masks are of "
            f"{[tuple(mask.shape) for mask in given]}: it is unclear which predictions count. Set "
            "distillation_logits_weight=0"
        )
    real = torch.ones(shape, dtype=torch.bool, device=inputs_device(inputs))
    for mask in fitting:
        real = real & mask
    return real


def inputs_device(inputs: Inputs) -> torch.device:
    """The device of a batch's tensors."""
    return next(value.device for value in inputs.values() if isinstance(value, Tensor))


def tensor_of(inputs: Inputs, name: str) -> Tensor | None:
    value = inputs.get(name)
    return value if isinstance(value, Tensor) else None


def _next(tensor: Tensor | None, end: int) -> Tensor | None:
    """Each token's successor, `(batch, tokens)`."""
    return None if tensor is None or tensor.dim() != 2 else F.pad(tensor, (0, 1), value=end)[:, 1:]


def _tokens(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    masks = [tensor_of(inputs, "attention_mask")]
    real = _real(inputs, student.shape[:-1], tensor_of(inputs, "labels"), masks)
    return masked_mean(divergence(student, teacher, temperature), real)


def _next_tokens(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    mask, shifted = tensor_of(inputs, "attention_mask"), tensor_of(inputs, "shift_labels")
    labels = _next(tensor_of(inputs, "labels"), IGNORED) if shifted is None else shifted
    real = _real(inputs, student.shape[:-1], labels, [mask, _next(mask, 0)])
    if shifted is None:
        real[:, -1] = False  # the data does not contain the last token's successor
    return masked_mean(divergence(student, teacher, temperature), real)


def _target_tokens(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    masks = [tensor_of(inputs, "decoder_attention_mask")]
    real = _real(inputs, student.shape[:-1], tensor_of(inputs, "labels"), masks)
    return masked_mean(divergence(student, teacher, temperature), real)


def _spans(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    """The loss of a span's start or end: the classes are the tokens, without padding."""
    real = _real(inputs, student.shape, None, [tensor_of(inputs, "attention_mask")])
    never = torch.finfo(torch.float32).min * min(1.0, temperature)
    student, teacher = (torch.where(real, logits.float(), never) for logits in (student, teacher))
    return divergence(student, teacher, temperature).mean()


def _pixels(student: Tensor, teacher: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    """The squared error over the pixels of masked patches, or over all pixels if none is masked."""
    error = (student.float() - teacher.float()) ** 2
    masked = tensor_of(inputs, "bool_masked_pos")
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
    """The squared error. The temperature does not apply to values."""
    return F.mse_loss(student.float(), teacher.float())


PROBLEMS: dict[str, Loss] = {
    "single_label_classification": _classes,
    "multi_label_classification": _labels,
    "regression": _values,
}


@dataclass(frozen=True)
class Head:
    """The predictions of a model: the names of its outputs, and their loss (None: it depends on the problem type)."""

    task: str
    loss: Loss | None = None
    outputs: tuple[str, ...] = ("logits",)
    per_token: bool = False


CLASSIFICATION = Head("classification")
TOKENS = Head("token classification", _tokens, per_token=True)
NEXT_TOKENS = Head("causal language modelling", _next_tokens, per_token=True)
TARGET_TOKENS = Head("sequence to sequence", _target_tokens, per_token=True)
HEADS = {  # by the end of the class's name
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
    """The head of a model, found by the name of its class or a base class. None for an unknown one."""
    model = getattr(model, "get_base_model", lambda: model)()  # without peft's wrapper
    for cls in type(model).__mro__:
        found = re.search(f"({'|'.join(HEADS)})(WithTeacher)?$", cls.__name__)
        if found is None:
            continue
        head = HEADS[found[1]]
        # Models like Llava have the class name of an encoder-decoder, but continue the text that they are given.
        decoder = head is TARGET_TOKENS and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return NEXT_TOKENS if decoder else head
    return None


def head_by_shape(logits: Tensor, inputs: Inputs) -> Head:
    """The head of a custom class, inferred from the shape of its logits."""
    described = [tensor_of(inputs, name) for name in ("labels", "attention_mask", "input_ids")]
    if logits.dim() == 2:
        return CLASSIFICATION
    if logits.dim() == 3 and any(given is not None and given.shape == logits.shape[:2] for given in described):
        return TOKENS
    raise ValueError(
        f"it is unclear what logits of shape {tuple(logits.shape)} predict: name the model's class after its task, as "
        f"transformers does ({', '.join(list(HEADS)[:3])}, ...), or set distillation_logits_weight=0"
    )


def problem_type(config: Any, logits: Tensor, labels: Tensor | None) -> str:
    """The problem type of logits `(batch, labels)`: that of the config, else the one that transformers infers."""
    given = getattr(config, "problem_type", None)
    if given is not None:
        if given not in PROBLEMS:
            raise ValueError(f"problem_type={given!r}: expected one of {', '.join(PROBLEMS)}")
        return given
    if logits.shape[-1] == 1:
        return "regression"
    whole = labels is None or not labels.is_floating_point()
    return "single_label_classification" if whole else "multi_label_classification"
