"""TrainingArguments of a binary model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from ..methods import make_method
from .argument_checks import check_numbers
from .taught_trainer import DISTILLATION_WEIGHTS


@dataclass
class BinaryTrainingArguments(TrainingArguments):
    """TrainingArguments, and how the binary layers are trained."""

    method: str = field(
        default="ste",
        metadata={"help": "The training method: a name of hf_bnn.METHODS, a sum (stompp+surge) or your module:Class."},
    )
    method_args: str | None = field(
        default=None, metadata={"help": 'The method\'s own arguments: "eta=0.1,aux=shared".'}
    )
    aux_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the method's own parameters over --learning_rate."}
    )
    levels_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of learned scales and thresholds over --learning_rate."}
    )
    calibrate_levels: bool = field(
        default=True, metadata={"help": "Fit levels that were never trained to the first batch."}
    )
    distillation_labels_weight: float = field(
        default=0.0, metadata={"help": "Weight of the labels' loss when there is a teacher."}
    )
    distillation_logits_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the predictions' loss: T^2 KL(teacher || student); of values the MSE."},
    )
    distillation_hidden_weight: float = field(
        default=1.0, metadata={"help": "Weight of the hidden states' MSE over the teacher's variance."}
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature T of the predictions' loss."})
    teacher_cache_gb: float = field(
        default=0.0, metadata={"help": "Memory for the teacher's outputs, so that it runs once per example. 0: none."}
    )
    save_packed: bool = field(
        default=True, metadata={"help": "Write the final model, and what is pushed, as bits (checkpoints stay latent)."}
    )

    allow_unfinished: bool = field(
        default=False, metadata={"help": "Pack the final model even if its method has not finished making it binary."}
    )
    eval_partial: bool = field(
        default=False,
        metadata={"help": "Evaluate also as StoMPP has left the model in training: metrics named eval_partial_..."},
    )

    sync_batchnorm: bool = field(
        default=False,
        metadata={"help": "Normalize batches over the rows of all processes, not over those of each one."},
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Raise ValueError for a value that no binary model can be trained with."""
        make_method(self.method, self.method_args)  # raises for an unknown name or argument
        for name in ("aux_learning_rate_multiplier", "levels_learning_rate_multiplier", "distillation_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number > 0")
        for name in (*DISTILLATION_WEIGHTS, "teacher_cache_gb"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number >= 0")
        for name in ("fp16_full_eval", "bf16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True: a binary model is evaluated in float32, since half-precision sums of +-1 products "
                    "round above 256; leave it out"
                )

    def check_teacher_is_named(self, name: str) -> None:
        """Raise ValueError if something is said of distillation: there is no teacher, which `name` would give."""
        told = [f for f in fields(self) if f.name.startswith("distillation_") or f.name == "teacher_cache_gb"]
        for own in told:
            if getattr(self, own.name) != own.default:
                raise ValueError(
                    f"{own.name}={getattr(self, own.name)} is for distillation, but there is no teacher: give {name}, "
                    f"or leave {own.name} out"
                )
