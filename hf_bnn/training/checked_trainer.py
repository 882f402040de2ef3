"""A Trainer that stops at the first NaN, and refuses at once what cannot work."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..nn.activations import RPReLU
from ..nn.layers import WeightedLayer
from .argument_checks import refuse_empty
from .batch_norm import plain_batch_norm_, share_statistics_, sync_batch_norm_
from .checkpoints import last_complete_checkpoint
from .loop import first_nonfinite_layer
from .nonfinite import MOST_IN_A_ROW, Finding, NonFiniteTrainingError, RunningStatistics, agreed, nonfinite
from .resumable_trainer import ResumableTrainer

logger = logging.get_logger(__name__)

# Scales, shifts and slopes: pulling them to 0 would change the function of the network, not simplify it.
NO_DECAY = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RPReLU)


class CheckedTrainer(ResumableTrainer):
    """Trainer for any model. It stops at the first loss, gradient or weight that is not finite, and names its layer.

    It refuses an empty dataset, and arguments without effect, such as FSDP on a CPU. All ranks evaluate with the batch
    normalization statistics that are saved. Checkpoints are those of ResumableTrainer.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.skipped_steps = 0  # that were dropped because their numbers were not finite: --nonfinite skip
        self._skipped_in_a_row = 0
        self._finding: Finding | None = None  # of this step
        self._before_step: RunningStatistics | None = None
        refuse_empty(self.train_dataset, "train_dataset")
        asked = self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if asked and not (self.is_fsdp_enabled or self.is_fsdp_xla_enabled):
            raise ValueError(
                f"fsdp={asked!r} has no effect on {self.args.device.type!r} devices: every rank would hold "
                "the whole model, as under DistributedDataParallel. Leave it out, or train on GPUs"
            )
        if self.accelerator.mixed_precision == "fp16" and self.args.device.type == "cpu":
            logger.warning("fp16 has no effect on a CPU: the model is trained in float32. bf16=True has an effect")

    def train(self, *args: Any, **kwargs: Any):
        try:
            output = super().train(*args, **kwargs)
        finally:
            plain_batch_norm_(self.bare_model)
        share_statistics_(self.bare_model)
        if output.global_step == 0:
            raise ValueError(
                f"no step was made: the train_dataset, a {type(self.train_dataset).__name__}, yielded no batch. "
                "The model is unchanged"
            )
        return output

    # Several ranks

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if training:
            if getattr(self.args, "sync_batchnorm", False) and not sync_batch_norm_(self.bare_model):
                logger.warning(f"sync_batchnorm=True has no effect: {type(model).__name__} has no batch normalization")
            keeps_copies = (
                self.is_fsdp_enabled or self.is_deepspeed_enabled
            )  # of float32, beside half-precision weights
            for module in self.bare_model.modules():
                if isinstance(module, WeightedLayer):
                    module.master_weights = keeps_copies
        return super()._wrap_model(model, training, dataloader)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any):
        refuse_empty(dataloader.dataset, "the data set to evaluate on")
        share_statistics_(self.bare_model)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    # Trap: transformers looks for "norm." in names, which BatchNorm's lack, and would decay its weights.

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        spared = {id(p) for module in model.modules() if isinstance(module, NO_DECAY) for p in module.parameters()}
        names = set(super().get_decay_parameter_names(model))
        return [name for name, p in model.named_parameters() if name in names and id(p) not in spared]

    # Trap: with persistent workers, transformers reuses the loader of the first evaluation for every later one, even
    # if `evaluate` is given another dataset.

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        kept = self.__dict__.pop("_eval_dataloaders", None)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.__dict__.pop("_eval_dataloaders", None)
            if kept is not None:
                self._eval_dataloaders = kept

    # Numbers that are not finite

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._last_inputs = inputs
        if self._skips and self._before_step is None:
            self._before_step = RunningStatistics(self.bare_model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._finding is None and not bool(torch.isfinite(loss).all()):
            where = self._first_bad_layer() or "the loss itself"
            self._finding = Finding(f"the loss is {loss.item()}", where, in_loss=True)
            if self.args.world_size == 1 and not self._skips:
                self._stop(self._finding)
        return loss

    def _clip_grad_norm(self, model):
        self._check_step()  # before clipping, which would spread a NaN to all gradients
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:
            self._check_step()
        return super()._get_grad_norm(model, grad_norm)

    @property
    def _skips(self) -> bool:
        return getattr(self.args, "nonfinite", "stop") == "skip"

    def _check_step(self) -> None:
        """Before an optimizer step: stop the run, or drop the step, if the numbers of any rank are not finite."""
        finding = agreed(self._finding or self._bad_gradient(), self.args.world_size, self.args.device)
        before, self._before_step, self._finding = self._before_step, None, None
        if finding is None:
            self._skipped_in_a_row = 0
            return
        if not self._skips:
            self._stop(finding)
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > MOST_IN_A_ROW:
            self._stop(finding._replace(what=f"{finding.what}, in {self._skipped_in_a_row} steps one after the other,"))
        self._warn(f"step {self.state.global_step} is dropped, {self.skipped_steps} in all: {finding}")
        before.restore()
        self.bare_model.zero_grad(set_to_none=True)  # the optimizer then has nothing to apply

    def _bad_gradient(self) -> Finding | None:
        # fp16's scaler skips such steps itself. Sharded gradients are not available here.
        if self.accelerator.scaler is not None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        gradients = {name: p.grad for name, p in self.bare_model.named_parameters() if p.grad is not None}
        if bool(torch.nn.utils.get_total_norm(gradients.values()).isfinite()):
            return None
        bad = [name for name, gradient in gradients.items() if nonfinite(gradient)]
        # The sign function hides a NaN: the forward pass may have one while the loss is finite.
        where = self._first_bad_layer() or f"the gradient of {bad[-1]}, the first in backward order"
        return Finding("a gradient is not finite", where)

    def _first_bad_layer(self) -> str | None:
        if self.args.world_size > 1 and getattr(self.args, "sync_batchnorm", False):
            return None  # a forward pass of this rank alone would wait for the others
        inputs = self._prepare_inputs(self._last_inputs)
        layer = first_nonfinite_layer(self.bare_model, lambda: self.compute_loss(self.bare_model, inputs))
        return layer and f"the output of {layer}"

    def _stop(self, finding: Finding) -> None:
        last = last_complete_checkpoint(self.args.output_dir)
        raise NonFiniteTrainingError(
            f"{finding.what} at step {self.state.global_step}; it began in {finding.where}. "
            f"The last good checkpoint is {last or 'none'}: go on from it with a learning rate below "
            f"{self.args.learning_rate}, or with a smaller max_grad_norm than {self.args.max_grad_norm}"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.skipped_steps and "loss" in logs:
            logs = {**logs, "skipped_steps": self.skipped_steps}
        super().log(logs, *args, **kwargs)

    # Saving

    def _save_checkpoint(self, model, trial) -> None:
        bad = [name for name, p in self.bare_model.named_parameters() if nonfinite(p)]
        if bad:
            self._stop(Finding("a weight is not finite", bad[0]))
        share_statistics_(self.bare_model)
        super()._save_checkpoint(model, trial)
