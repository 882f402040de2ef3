"""A Trainer that stops at the first NaN and never takes a half-written checkpoint for a good one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from .integrity import is_complete, verify_manifest, write_manifest
from .training import first_nonfinite_layer


class NonFiniteTrainingError(FloatingPointError):
    """The loss, a gradient or a weight became NaN or infinite. Nothing was stepped or saved after that."""


class CheckedTrainer(Trainer):
    """Trainer, for any model: each checkpoint-N ends with a manifest of digests, without which nothing resumes from it;
    a loss, gradient or weight that is not finite stops the run with the name of the layer where it began.
    """

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    # Numbers that are not finite

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._last_inputs = inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss).all()):
            self._stop(f"the loss is {loss.item()}", self._first_bad_layer())
        return loss

    def _clip_grad_norm(self, model):
        self._check_gradients()  # before clipping, which would spread a NaN over all of them
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:
            self._check_gradients()
        return super()._get_grad_norm(model, grad_norm)

    def _check_gradients(self) -> None:
        # fp16's scaler skips such steps itself; sharded gradients are not at hand.
        if self.accelerator.scaler is not None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        gradients = {name: p.grad for name, p in self.bare_model.named_parameters() if p.grad is not None}
        if not bool(torch.nn.utils.get_total_norm(gradients.values()).isfinite()):
            bad = [name for name, gradient in gradients.items() if _nonfinite(gradient)]
            # A sign swallows a NaN: the forward pass may have one while the loss is finite.
            where = self._first_bad_layer() or f"the gradient of {bad[-1]}, the first in backward order"
            self._stop("a gradient is not finite", where)

    def _first_bad_layer(self) -> str | None:
        inputs = self._prepare_inputs(self._last_inputs)
        layer = first_nonfinite_layer(self.bare_model, lambda: self.compute_loss(self.bare_model, inputs))
        return layer and f"the output of {layer}"

    def _stop(self, what: str, where: str | None) -> None:
        last = last_complete_checkpoint(self.args.output_dir)
        raise NonFiniteTrainingError(
            f"{what} at step {self.state.global_step}; it began in {where or 'the loss itself'}. "
            f"The last good checkpoint is {last or 'none'}: go on from it with a learning rate below "
            f"{self.args.learning_rate}, or with a smaller max_grad_norm than {self.args.max_grad_norm}"
        )

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        bad = [name for name, p in self.bare_model.named_parameters() if _nonfinite(p)]
        if bad:
            self._stop("a weight is not finite", bad[0])
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            run_dir = self._get_output_dir(trial=trial)
            write_manifest(Path(run_dir) / f"checkpoint-{self.state.global_step}")
            # Only now that the new checkpoint is known to be whole may an old one go.
            best = self.state.best_model_checkpoint
            rotate_checkpoints(run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir}: train without resuming")
        if resume_from_checkpoint:
            verify_manifest(resume_from_checkpoint)
        return super().train(resume_from_checkpoint or None, *args, **kwargs)


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The checkpoint-N of the highest N whose writing came to the end, or None."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit() and is_complete(path)]
    return str(max(found, key=lambda path: int(path.name[11:]))) if found else None


def _nonfinite(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all())
