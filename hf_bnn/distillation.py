"""Losses between a student and its teacher, and a cache of the teacher's outputs. Needs torch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TeacherOutput(NamedTuple):
    """Logits `(batch, labels)`, and hidden states `(batch, tokens, dim)` of the embeddings and of each layer."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


def logits_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student), mean over the batch (arXiv 1503.02531); for one output (regression) the MSE."""
    if teacher.shape != student.shape:
        raise ValueError(f"the teacher's logits are {tuple(teacher.shape)}, the student's {tuple(student.shape)}")
    student, teacher = student.float(), teacher.float()
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher)
    log_p, log_q = F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over layers of the MSE between hidden states, over the teacher's variance; padded tokens do not count.

    A student of fewer layers is held against evenly spaced layers of the teacher. `mask` is `(batch, tokens)`. They
    may also be feature maps, `(batch, channels, height, width)`. Raises ValueError where the shapes differ.
    """
    if student[0].shape[-1] != teacher[0].shape[-1]:
        raise ValueError(
            f"the teacher's hidden states are {teacher[0].shape[-1]} wide, the student's {student[0].shape[-1]}: "
            "set distillation_hidden_weight=0"
        )
    steps = (len(teacher) - 1) / (len(student) - 1)
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
            own, other = own[mask.bool()], other[mask.bool()]
        losses.append(F.mse_loss(own, other) / other.var().clamp_min(1e-8))
    return torch.stack(losses).mean()


class TeacherCache:
    """Remembers the teacher's output for every example, by the example's own tokens; bfloat16, on the CPU.

    Serves batches of token ids only: where an input is a float tensor (images, augmented anew each time) it stands
    aside. It stops taking examples when it holds `limit_bytes`.
    """

    def __init__(self, limit_bytes: float):
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.examples: dict[bytes, tuple[Tensor, Tensor]] = {}

    def get(self, inputs: dict[str, Tensor], run: Callable[[], TeacherOutput]) -> TeacherOutput:
        """The teacher's output for a batch, from memory if every example is there, else from `run()`."""
        mask = inputs.get("attention_mask")
        if self.limit_bytes <= 0 or mask is None or any(t.is_floating_point() for t in inputs.values()):
            return run()
        keys = self._keys(inputs, mask)
        if all(key in self.examples for key in keys):
            return self._assemble([self.examples[key] for key in keys], mask)
        output = run()
        self._store(keys, output, mask)
        return output

    @staticmethod
    def _keys(inputs: dict[str, Tensor], mask: Tensor) -> list[bytes]:
        lengths = mask.sum(1).tolist()
        columns = [inputs[name].cpu().numpy() for name in sorted(inputs) if name != "attention_mask"]
        rows = range(len(lengths))
        # Right padding only: the first `length` tokens are the example. Left padding would merely miss.
        return [b"|".join(column[row, : lengths[row]].tobytes() for column in columns) for row in rows]

    def _store(self, keys: list[bytes], output: TeacherOutput, mask: Tensor) -> None:
        if not bool((mask[:, 1:] <= mask[:, :-1]).all()):
            return
        hidden = torch.stack(output.hidden_states, 1).to("cpu", torch.bfloat16)
        for row, (key, length) in enumerate(zip(keys, mask.sum(1).tolist(), strict=True)):
            entry = output.logits[row].float().cpu(), hidden[row, :, :length].clone()
            size = entry[1].nbytes + entry[0].nbytes
            if key not in self.examples and self.bytes + size <= self.limit_bytes:
                self.examples[key] = entry
                self.bytes += size

    @staticmethod
    def _assemble(entries: list[tuple[Tensor, Tensor]], mask: Tensor) -> TeacherOutput:
        layers, dim = entries[0][1].shape[0], entries[0][1].shape[2]
        hidden = torch.zeros(layers, *mask.shape, dim, dtype=torch.bfloat16)
        for row, (_, states) in enumerate(entries):
            hidden[:, row, : states.shape[1]] = states
        logits = torch.stack([logits for logits, _ in entries])
        return TeacherOutput(logits.to(mask.device), tuple(hidden.to(mask.device).unbind()))
