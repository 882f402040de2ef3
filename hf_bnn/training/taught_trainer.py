"""A Trainer whose model learns from a teacher in addition to its labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .checked_trainer import CheckedTrainer
from .distillation import Distillation, Outputs
from .prediction_losses import head_of
from .teacher import TeacherCache, check_teacher, teacher_inputs

DISTILLATION_WEIGHTS = ("distillation_labels_weight", "distillation_logits_weight", "distillation_hidden_weight")


class TaughtTrainer(CheckedTrainer):
    """CheckedTrainer that adds the distillation losses in training, if it has a `teacher`.

    The arguments set the weights of the losses (`distillation_labels_weight`, `distillation_logits_weight`,
    `distillation_hidden_weight`), `distillation_temperature` and `teacher_cache_gb`.
    """

    teacher: nn.Module | None = None

    def begin_lesson(self) -> None:
        """Refuse a teacher whose class or config does not fit the student, and empty the cache of its outputs."""
        weights = [getattr(self.args, name) for name in DISTILLATION_WEIGHTS]
        if not any(weights):
            raise ValueError(f"{', '.join(DISTILLATION_WEIGHTS)} are all 0: nothing would be learned from the data")
        _, logits, hidden = (weight > 0 for weight in weights)
        check_teacher(self.teacher, self.bare_model, logits, hidden, self.processing_class)
        self.teacher_cache = TeacherCache(self.args.teacher_cache_gb * 2**30)

    def check_lesson(self, outputs: Any, inputs: dict[str, Any]) -> None:
        """Refuse a teacher that cannot run on a batch, or whose outputs cannot be compared with the student's."""
        lesson = self.lesson()
        if lesson.logits_weight == lesson.hidden_weight == 0:
            return
        try:
            taught = self._teach(inputs, lesson)
        except (TypeError, IndexError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the teacher, a {type(self.teacher).__name__}, cannot run on a batch: {error}") from error
        loss = lesson.loss(lesson.read(outputs, inputs, "student"), taught, inputs)
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the distance to the teacher's outputs is {loss.item()} on the first batch: the teacher, a "
                f"{type(self.teacher).__name__}, or the student has a weight that is not finite"
            )

    def lesson(self) -> Distillation:
        """The distillation that the current arguments ask for."""
        args, model = self.args, self.bare_model
        weights = args.distillation_logits_weight, args.distillation_hidden_weight
        return Distillation(*weights, args.distillation_temperature, head_of(model), getattr(model, "config", None))

    def asked_of_student(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A copy of the batch that also requests the outputs to be compared."""
        hidden = self.args.distillation_hidden_weight > 0
        return {**inputs, "output_hidden_states": True} if hidden else dict(inputs)

    def untaught_loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Tensor, Any]:
        """The loss on the labels alone, and the outputs, also in training mode."""
        return super().compute_loss(model, inputs, True, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        lesson = self.lesson()
        loss, outputs = super().compute_loss(model, self.asked_of_student(inputs), True, num_items_in_batch)
        taught = lesson.loss(lesson.read(outputs, inputs, "student"), self._teach(inputs, lesson), inputs)
        if self.compute_loss_func is not None:  # then Trainer treats the loss as that of the whole accumulated batch
            taught = taught / getattr(self, "current_gradient_accumulation_steps", 1)
        loss = self.args.distillation_labels_weight * loss + taught
        return (loss, outputs) if return_outputs else loss

    def _teach(self, inputs: dict[str, Any], lesson: Distillation) -> Outputs:
        asked = teacher_inputs(self.teacher, inputs, self.label_names)

        def run() -> Outputs:
            hidden = {"output_hidden_states": True} if lesson.hidden_weight > 0 else {}
            with torch.no_grad(), self.accelerator.autocast():
                return lesson.read(self.teacher(**asked, **hidden), inputs)

        return self.teacher_cache.get(asked, run)
