"""Checks that a teacher fits a student, and a cache of the teacher's outputs. Needs torch only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distillation import Outputs
from .prediction_losses import CLASSIFICATION, TOKENS, head_of

WITHOUT_LOGITS = "or set distillation_logits_weight=0 to learn from its hidden states alone"


def check_teacher(
    teacher: nn.Module, student: nn.Module, logits: bool = True, hidden: bool = True, tokenizer: Any = None
) -> None:
    """Raise ValueError if the teacher cannot teach this student by its `logits` or its `hidden` states.

    `tokenizer`: that of the student's inputs, if known. This compares configs and classes only; `Distillation.loss`
    reports what shows on a batch.
    """
    _check_apart(teacher, student)
    own, theirs = getattr(student, "config", None), getattr(teacher, "config", None)
    if logits:
        _check_head(teacher, student)
    if own is None or theirs is None:
        return
    if logits and head_of(student) in (CLASSIFICATION, TOKENS):
        _check_labels(theirs, own)
    _check_tokens(theirs, own, tokenizer)
    for name in ("hidden_size", "hidden_sizes") if hidden else ():
        given, wanted = getattr(theirs, name, None), getattr(own, name, None)
        if given is None or wanted is None or given == wanted:
            continue
        if name == "hidden_size" or len(given) == len(wanted):
            raise ValueError(
                f"the teacher's hidden states are {given} wide, the student's {wanted}: set "
                "distillation_hidden_weight=0"
            )


def _check_apart(teacher: nn.Module, student: nn.Module) -> None:
    if teacher is student:
        raise ValueError("the teacher is the student itself: load a second model, a trained float one, to distil from")
    own = {parameter.untyped_storage().data_ptr() for parameter in student.parameters() if parameter.numel()}
    for name, parameter in teacher.named_parameters():
        if parameter.numel() and parameter.device.type != "meta" and parameter.untyped_storage().data_ptr() in own:
            raise ValueError(
                f"the teacher shares {name!r} with the student, which would train it too: load the teacher anew, or "
                "give copy.deepcopy(teacher)"
            )


def _check_head(teacher: nn.Module, student: nn.Module) -> None:
    own, theirs = head_of(student), head_of(teacher)
    name = type(teacher).__name__
    if theirs is None and name.endswith("Model") and getattr(teacher, "base_model", None) is teacher:
        raise ValueError(
            f"the teacher, a {name}, has no head: it returns no logits. Take one that was trained for the task, "
            f"{WITHOUT_LOGITS}"
        )
    for model, head, whose in ((student, own, "student"), (teacher, theirs, "teacher")):
        kind = type(getattr(model, "get_base_model", lambda model=model: model)())
        if head is None and kind.__module__.startswith("transformers.models."):
            raise ValueError(
                f"the {whose}, a {kind.__name__}, has a head for which there is no distillation loss: set "
                "distillation_logits_weight=0 to learn from the teacher's hidden states alone"
            )
    if own is not None and theirs is not None and own.task != theirs.task:
        raise ValueError(
            f"the teacher, a {name}, is for {theirs.task}, the student, a {type(student).__name__}, for {own.task}: "
            f"take one that was trained for the student's task, {WITHOUT_LOGITS}"
        )


def _check_labels(theirs: Any, own: Any) -> None:
    given, wanted = (getattr(config, "num_labels", None) for config in (theirs, own))
    if given is not None and wanted is not None and given != wanted:
        raise ValueError(
            f"the teacher has {given} labels, the student {wanted}: train the teacher on the student's data, "
            f"{WITHOUT_LOGITS}"
        )
    names, wished = (_label_names(config) for config in (theirs, own))
    if sorted(names) == sorted(wished) and names != wished:
        raise ValueError(
            f"the teacher has the labels in the order {', '.join(names)}, the student in the order "
            f"{', '.join(wished)}: give the student the teacher's id2label, and its data these ids"
        )
    problems = [getattr(config, "problem_type", None) for config in (theirs, own)]
    if None not in problems and problems[0] != problems[1]:
        raise ValueError(
            f"the teacher's problem_type is {problems[0]!r}, the student's {problems[1]!r}: take a teacher of the same "
            f"problem, {WITHOUT_LOGITS}"
        )


def _label_names(config: Any) -> list[str]:
    names = getattr(config, "id2label", None) or {}
    return [str(names[index]).lower() for index in sorted(names)]


def _check_tokens(theirs: Any, own: Any, tokenizer: Any) -> None:
    """Check that both models assign the same ids to tokens."""
    texts = [getattr(config, "get_text_config", lambda config=config: config)() for config in (theirs, own)]
    for name in ("vocab_size", "pad_token_id", "decoder_start_token_id"):
        given, wanted = (getattr(config, name, None) for config in texts)
        if given is not None and wanted is not None and given != wanted:
            raise ValueError(
                f"the teacher has {name}={given}, the student {name}={wanted}: both must use the same tokenizer"
            )
    vocabulary, padding = (getattr(texts[0], name, None) for name in ("vocab_size", "pad_token_id"))
    if tokenizer is None or vocabulary is None:
        return
    known = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if known is not None and known > vocabulary:
        raise ValueError(
            f"the tokenizer has {known} tokens, the teacher only {vocabulary}: take a teacher that was trained with "
            "this tokenizer"
        )
    used = getattr(tokenizer, "pad_token_id", None)
    if used is not None and padding is not None and used != padding:
        raise ValueError(
            f"the tokenizer pads with {used}, the teacher's config says pad_token_id={padding}: take a teacher that "
            "was trained with this tokenizer; if it was, correct its config"
        )


def teacher_inputs(teacher: nn.Module, inputs: Mapping[str, Any], label_names: Iterable[str]) -> dict[str, Any]:
    """A batch for the teacher: without labels, unless it needs them as an argument or derives its inputs from them."""
    config = getattr(teacher, "config", None)
    kept = set()
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        kept.add("labels")
    parameters = inspect.signature(teacher.forward).parameters.values()
    demanding = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    kept |= {p.name for p in parameters if p.default is p.empty and p.kind in demanding}
    dropped = set(label_names) - kept
    return {name: value for name, value in inputs.items() if name not in dropped}


class TeacherCache:
    """Caches the teacher's output for each example, keyed by the example's tokens. Hidden states are in bfloat16.

    It serves batches of token ids, `(batch, tokens)`, padded on the right. It passes other inputs through: images,
    which are augmented anew each time, several choices, a decoder's tokens. It uses the CPU's memory, and takes no more
    examples once it holds `limit_bytes`.
    """

    def __init__(self, limit_bytes: float):
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.examples: dict[bytes, Outputs] = {}

    def get(self, inputs: Mapping[str, Any], compute: Callable[[], Outputs]) -> Outputs:
        """The teacher's output for a batch: from the cache if it has every example, else from `compute()`."""
        mask = inputs.get("attention_mask")
        if self.limit_bytes <= 0 or not _serves(inputs, mask):
            return compute()
        keys = self._keys(inputs, mask)
        if all(key in self.examples for key in keys):
            return self._assemble([self.examples[key] for key in keys], mask)
        output = compute()
        self._store(keys, output, mask)
        return output

    @staticmethod
    def _keys(inputs: Mapping[str, Tensor], mask: Tensor) -> list[bytes]:
        names = [name for name in sorted(inputs) if name != "attention_mask"]
        lengths, columns = mask.sum(1).tolist(), [inputs[name].cpu().numpy() for name in names]
        # Right padding only: the first `length` tokens are the example.
        examples = ([column[row, :length].tobytes() for column in columns] for row, length in enumerate(lengths))
        return [b"|".join([",".join(names).encode(), *example]) for example in examples]

    def _store(self, keys: list[bytes], output: Outputs, mask: Tensor) -> None:
        hidden = {
            name: torch.stack(states, 1).to("cpu", torch.bfloat16) for name, states in output.hidden_states.items()
        }
        predictions = {name: value.float().cpu() for name, value in output.predictions.items()}
        for row, (key, length) in enumerate(zip(keys, mask.sum(1).tolist(), strict=True)):
            end = length if output.per_token else None
            entry = Outputs(
                {name: value[row, :end].clone() for name, value in predictions.items()},
                {name: value[row, :, :length].clone() for name, value in hidden.items()},
                output.per_token,
            )
            size = sum(tensor.nbytes for part in entry[:2] for tensor in part.values())
            if key not in self.examples and self.bytes + size <= self.limit_bytes:
                self.examples[key] = entry
                self.bytes += size

    @staticmethod
    def _assemble(entries: list[Outputs], mask: Tensor) -> Outputs:
        first, tokens = entries[0], mask.shape[1]
        predictions = {
            name: _padded([entry.predictions[name] for entry in entries], tokens, 0)
            if first.per_token
            else torch.stack([entry.predictions[name] for entry in entries])
            for name in first.predictions
        }
        hidden = {
            name: _padded([entry.hidden_states[name] for entry in entries], tokens, 1) for name in first.hidden_states
        }
        return Outputs(
            {name: value.to(mask.device) for name, value in predictions.items()},
            {name: tuple(value.to(mask.device).unbind(1)) for name, value in hidden.items()},
            first.per_token,
        )


def _serves(inputs: Mapping[str, Any], mask: Any) -> bool:
    """Whether the tokens identify each row of these inputs, and the padding is on the right."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    alike = (isinstance(v, Tensor) and v.shape == mask.shape and not v.is_floating_point() for v in inputs.values())
    return all(alike) and bool((mask[:, 1:] <= mask[:, :-1]).all())


def _padded(rows: list[Tensor], length: int, dim: int) -> Tensor:
    """Rows of different lengths along `dim`, as one tensor with zeros after their ends."""
    shape = list(rows[0].shape)
    shape[dim] = length
    whole = rows[0].new_zeros(len(rows), *shape)
    for target, row in zip(whole, rows, strict=True):
        target.narrow(dim, 0, row.shape[dim]).copy_(row)
    return whole
