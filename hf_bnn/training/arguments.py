"""TrainingArguments for a binary model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from ..methods import make_method
from .argument_checks import check_numbers
from .nonfinite import POLICIES
from .taught_trainer import DISTILLATION_WEIGHTS


@dataclass
class BinaryTrainingArguments(TrainingArguments):
    """TrainingArguments, with the settings of the training method and of distillation."""

    method: str = field(
        default="ste",
        metadata={"help": "A name in hf_bnn.METHODS, several joined by + (stompp+surge), or your module:Class."},
    )
    method_args: str | None = field(default=None, metadata={"help": 'Arguments of the method: "eta=0.1,aux=shared".'})
    aux_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "Multiplies the learning rate of the method's own parameters."}
    )
    levels_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "Multiplies the learning rate of learned scales and thresholds."}
    )
    calibrate_levels: bool = field(default=True, metadata={"help": "Fit untrained levels to the first batch."})
    distillation_labels_weight: float = field(
        default=0.0, metadata={"help": "With a teacher: weight of the loss on the labels."}
    )
    distillation_logits_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the loss on predictions: T^2 KL(teacher || student); for a regression the MSE."},
    )
    distillation_hidden_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the loss on hidden states: the MSE divided by the teacher's variance."},
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature T of the loss on predictions."})
    teacher_cache_gb: float = field(
        default=0.0,
        metadata={"help": "Memory for caching the teacher's outputs, so that it runs once per example. 0: no cache."},
    )
    save_packed: bool = field(
        default=True, metadata={"help": "Pack the final model and the pushed one to bits (checkpoints stay latent)."}
    )

    allow_unfinished: bool = field(
        default=False, metadata={"help": "Pack the final model even if its method has not finished making it binary."}
    )
    eval_partial: bool = field(
        default=False,
        metadata={"help": "Also evaluate the partly binary model of StoMPP's training, as metrics eval_partial_..."},
    )

    nonfinite: str = field(
        default="stop",
        metadata={
            "help": "If a loss or gradient is not finite: stop the run, or skip the optimizer step on all ranks.",
            "choices": list(POLICIES),
        },
    )
    train_on_bits: bool = field(
        default=True,
        metadata={
            "help": "On CPUs, compute the products of signs in a training step on bits, and keep bits instead of "
            "floats for the backward pass."
        },
    )
    sync_batchnorm: bool = field(
        default=False,
        metadata={"help": "Compute batch normalization over the rows of all processes, not of each one separately."},
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Raise ValueError for a setting with which a binary model cannot be trained."""
        make_method(self.method, self.method_args)  # raises for an unknown name or argument
        if self.nonfinite not in POLICIES:
            raise ValueError(f"nonfinite={self.nonfinite!r}: expected one of {', '.join(POLICIES)}")
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
        """Raise ValueError if a distillation argument is set without a teacher. `name`: the argument that gives one."""
        told = [f for f in fields(self) if f.name.startswith("distillation_") or f.name == "teacher_cache_gb"]
        for own in told:
            if getattr(self, own.name) != own.default:
                raise ValueError(
                    f"{own.name}={getattr(self, own.name)} is for distillation, but there is no teacher: give {name}, "
                    f"or leave {own.name} out"
                )
