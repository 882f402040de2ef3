"""BinaryTrainer: transformers' Trainer with a training method for the binary layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

from ..convert import has_fresh_levels
from ..install import binary_fraction, install_method
from ..methods import Method, Step, make_method
from ..nn.layers import binary_layers
from ..nn.packed import is_packed
from .argument_checks import warn_of_recipe
from .arguments import BinaryTrainingArguments
from .loop import (
    begin_step,
    end_backward,
    hook_optimizer,
    parameter_roles,
    partial_evaluation,
    split_groups,
    statistics,
)
from .packed_saving import PackedSaving
from .precision import upcast_
from .preparation import first_batch, prepare_, undisturbed_randomness
from .taught_trainer import TaughtTrainer
from .trials import IndependentTrials
from .uploads import PublicUploads

logger = logging.get_logger(__name__)


class _MethodCallback(TrainerCallback):
    """Calls `begin_step` and `end_backward` in every optimizer step."""

    def __init__(self, trainer: BinaryTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            warn_of_recipe(self.trainer.bare_model, args.learning_rate, self.trainer.teacher is not None)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        lr = self.trainer.optimizer.param_groups[0]["lr"]
        steps = max(1, int(state.logging_steps or 1))
        self.step = Step(state.global_step, state.max_steps, lr, log=(state.global_step + 1) % steps == 0)
        begin_step(self.trainer.bare_model, self.step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        end_backward(self.trainer.bare_model, self.step)


class BinaryTrainer(PackedSaving, PublicUploads, IndependentTrials, TaughtTrainer):
    """Trainer for a binary model. It takes Trainer's arguments and two more.

    `method` is installed into the model (None: the one that `args.method` names). `teacher_model`, if given, is
    distilled from. Checkpoints are latent and resume exactly; the final model is packed. Evaluation is fully binary,
    in float32. Raises ValueError for a model without a binary layer, or with packed weights.
    """

    trains_binary_models = True  # unlike transformers' own Trainer: see models/plain_trainer.py

    def __init__(
        self,
        model: nn.Module | None = None,
        args: BinaryTrainingArguments | None = None,
        *positional: Any,
        method: Method | None = None,
        teacher_model: nn.Module | None = None,
        **kwargs: Any,
    ):
        args = BinaryTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, BinaryTrainingArguments):
            raise TypeError(
                f"BinaryTrainer takes BinaryTrainingArguments, not {type(args).__name__}: they have the same fields, "
                "and those of the method and of distillation"
            )
        self._given_method = method
        self._method_at_first = (args.method, args.method_args)
        self.method = make_method(args.method, args.method_args) if method is None else method
        self.teacher = teacher_model
        self._train_on_bits = args.train_on_bits
        if model is not None:
            self.prepare_model(model)
        self._hooked: torch.optim.Optimizer | None = None
        super().__init__(model, args, *positional, **kwargs)
        # Trap: BERT's and ResNet's heads take **kwargs but ignore num_items_in_batch. If Trainer relied on them, the
        # gradient would be multiplied by the accumulation steps, and the loss by the number of processes.
        self.model_accepts_loss_kwargs = False
        if self.teacher is not None:
            self.begin_lesson()
            self.teacher.to(self.args.device).eval().requires_grad_(False)
        elif self.train_dataset is not None:
            args.check_teacher_is_named("teacher_model=")
        self.add_callback(_MethodCallback(self))

    def prepare_model(self, model: nn.Module) -> None:
        """Install the method. Raises ValueError for a model that cannot be trained."""
        adapted = hasattr(model, "peft_config")
        if is_packed(model) and not adapted:
            raise ValueError(
                f"this {type(model).__name__} is packed: its weights are bits and cannot be trained. Load the latent "
                "checkpoint, or call hf_bnn.unpack_(model), or put adapters on it with peft"
            )
        if not binary_layers(model) and not adapted:
            raise ValueError(
                f"{type(model).__name__} has no binary layer: load it with a hf_bnn class, or call hf_bnn.binarize_"
            )
        upcast_(model)
        install_method(model, self.method)
        for layer in binary_layers(model):
            layer.runs_on_bits = self._train_on_bits
        if hasattr(model, "config"):
            model.config.method = self.method.to_dict()

    def call_model_init(self, trial=None) -> nn.Module:
        model = super().call_model_init(trial)
        self.method, self._hooked = self._chosen_method(), None
        self.args.check()  # a hyperparameter search may have set them
        self._train_on_bits = self.args.train_on_bits
        self.prepare_model(model)
        return model

    def _chosen_method(self) -> Method:
        """The method that was given as an object, else the one that the arguments name now."""
        if self._given_method is None:
            return make_method(self.args.method, self.args.method_args)
        if (self.args.method, self.args.method_args) != self._method_at_first:
            raise ValueError(
                f"method={self.args.method!r}, method_args={self.args.method_args!r} were set, but BinaryTrainer was "
                f"given method={self._given_method!r}: name the first method in the arguments instead"
            )
        return self._given_method

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if (fraction := binary_fraction(self.bare_model)) < 1:
            logger.warning(
                f"training has stopped when {fraction:.3f} of the model was binary: it is evaluated as fully binary, "
                "and may do much worse than it did in training. Go on training, or save it with allow_unfinished=True"
            )
        return output

    def _inner_training_loop(self, batch_size=None, args=None, resume_from_checkpoint=None, *more, **kwargs):
        # At this point the model exists and a checkpoint is loaded, but nothing is wrapped and there is no optimizer.
        dataset = self.train_dataset
        self._prepare(fit=self.args.calibrate_levels and not resume_from_checkpoint)
        try:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, *more, **kwargs)
        finally:
            self.train_dataset = dataset

    def _prepare(self, fit: bool) -> None:
        """Prepares the model before the first step. It leaves the random state and the data of training unchanged."""
        model = self.model  # a sharded model runs only in its wrapper
        if self.train_dataset is None:
            if fit and has_fresh_levels(model):
                logger.warning(
                    "there is no train_dataset to fit the levels to: they stay as they were made, whatever the size of "
                    "the activations. Give one, or call hf_bnn.calibrate_"
                )
            return
        with undisturbed_randomness(model):
            batch = self._prepare_inputs(self._preparation_batch())
            asked = send_to_device(batch, next(model.parameters()).device)
            if self.teacher is not None:
                self.begin_lesson()
                asked = self.asked_of_student(asked)
            count = self._get_num_items_in_batch([batch], self.args.device)  # a custom loss function takes it
            _, outputs = prepare_(model, lambda: self.untaught_loss(model, dict(asked), count), fit)
            if self.teacher is not None:
                self.check_lesson(send_to_device(outputs, self.args.device), batch)

    def _preparation_batch(self) -> dict[str, Any]:
        """The first rows of the training set, as a batch of the trainer's collator."""
        rows, collate = self.train_dataset, self.data_collator
        if isinstance(rows, datasets.Dataset):
            rows = self._remove_unused_columns(rows, description="Training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="Training")
        size = self.args.eval_batch_size
        if self.args.auto_find_batch_size:  # larger batches did not fit in memory
            size = min(size, self._train_batch_size)
        batch, left = first_batch(rows, collate, size, self.args.dataloader_num_workers)
        if left is not rows:
            logger.info("the training stream can be read once: the rows that prepared the model are put back")
            self.train_dataset = left
        return batch

    # The optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            optimizer.param_groups[:] = split_groups(
                optimizer.param_groups,
                parameter_roles(self.model if model is None else model),
                self.args.levels_learning_rate_multiplier,
                self.args.aux_learning_rate_multiplier,
            )
        optimizer = getattr(
            self.optimizer, "optimizer", self.optimizer
        )  # without accelerate's wrapper from an earlier run
        if self._hooked is not optimizer:
            if "optimizer_hook" in self.method.claims() and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                raise ValueError(
                    f"method {self.method.name!r} needs whole weights and gradients in the optimizer's step, but FSDP "
                    "and DeepSpeed cut them in shards: train on one device, or with DistributedDataParallel"
                )
            hook_optimizer(self.bare_model, optimizer, self.method)
            self._hooked = optimizer
        return self.optimizer

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with _without_autocast(self.bare_model):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        several = isinstance(
            self.eval_dataset if eval_dataset is None else eval_dataset, dict
        )  # each comes here itself
        if self.args.eval_partial and not several and binary_fraction(self.bare_model) < 1:
            with partial_evaluation(self.bare_model):
                output = self.evaluation_loop(
                    self.get_eval_dataloader(eval_dataset),
                    description="Partial evaluation",
                    prediction_loss_only=True if self.compute_metrics is None else None,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=f"{metric_key_prefix}_partial",
                )
            self.log(output.metrics)
            metrics.update(output.metrics)
        return metrics

    def _determine_best_metric(self, metrics, trial) -> bool:
        # Before the end of StoMPP's schedule the model is not fully binary: it cannot be the best one.
        return binary_fraction(self.bare_model) == 1 and super()._determine_best_metric(metrics, trial)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and (fraction := binary_fraction(self.bare_model)) < 1:
            logs = {**logs, "binary_fraction": fraction}
        super().log(logs, *args, **kwargs)
        per_layer = statistics(self.bare_model) if "loss" in logs else {}
        if per_layer:  # for the history and the trackers only: they would flood the console
            self.state.log_history.append({**per_layer, "epoch": self.state.epoch, "step": self.state.global_step})
            for callback in self.callback_handler.callbacks:
                if not isinstance(callback, ProgressCallback | PrinterCallback):
                    callback.on_log(self.args, self.state, self.control, logs=per_layer, model=self.model)


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Within this context, the model's forward runs without accelerate's mixed precision."""
    wrapped: Callable | None = model.__dict__.get("forward")
    if wrapped is None or not hasattr(model, "_original_forward"):
        yield
        return
    model.forward = model._original_forward
    try:
        yield
    finally:
        model.forward = wrapped
