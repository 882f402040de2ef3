"""A Trainer that stops at the first NaN and never takes a half-written checkpoint for a good one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from .activations import RPReLU
from .integrity import CorruptCheckpointError, is_complete, verify_manifest, write_manifest
from .training import first_nonfinite_layer, method_state_names

# Scales, shifts and slopes: to pull them to 0 would change what the network computes, not make it simpler.
NO_DECAY = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RPReLU)


class NonFiniteTrainingError(FloatingPointError):
    """The loss, a gradient or a weight became NaN or infinite. Nothing was stepped or saved after that."""


class CheckedTrainer(Trainer):
    """Trainer, for any model: each checkpoint-N ends with a manifest of digests, without which nothing resumes from it;
    a loss, gradient or weight that is not finite stops the run with the name of the layer where it began. Whatever is
    loaded from a checkpoint is loaded whole.
    """

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    # Trap: transformers decays the weights of BatchNorm, whose names have no "norm." that it looks for.

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        spared = {id(p) for module in model.modules() if isinstance(module, NO_DECAY) for p in module.parameters()}
        names = set(super().get_decay_parameter_names(model))
        return [name for name, p in model.named_parameters() if name in names and id(p) not in spared]

    # Trap: with persistent workers, transformers takes the loader of the first evaluation for every later one, also
    # where another set is handed to `evaluate`.

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_weights(self, folder: str) -> bool:
        """Load a checkpoint's weights strictly; False if they are of a kind that Trainer itself handles.

        Trainer takes the names in the file for the model's own, which they are not in ViT: it would only warn, and
        leave most tensors as they were.
        """
        path, model = Path(folder) / SAFE_WEIGHTS_NAME, self.bare_model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not path.is_file():
            return False
        conversions = (
            get_model_conversion_mapping(model, add_legacy=False) if isinstance(model, PreTrainedModel) else []
        )
        if not all(isinstance(conversion, WeightRenaming) for conversion in conversions):
            return False
        own = model.state_dict()
        state = {_name_in_memory(key, own, conversions): value for key, value in load_file(path).items()}
        elsewhere = {*method_state_names(model), *getattr(model, "all_tied_weights_keys", ())}
        wrong = sorted((own.keys() ^ state.keys()) - elsewhere)
        if wrong:
            raise CorruptCheckpointError(f"{path} does not fit the model: {wrong[0]!r} is in only one of the two")
        model.load_state_dict(state, strict=False)
        return True


def _name_in_memory(key: str, own: dict[str, Tensor], renamings: list[WeightRenaming]) -> str:
    """What the tensor that a file calls `key` is called in the model whose state dict is `own`."""
    renamed, _ = rename_source_key(key, renamings, [])
    return renamed if renamed in own else key


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The checkpoint-N of the highest N whose writing came to the end, or None."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit() and is_complete(path)]
    return str(max(found, key=lambda path: int(path.name[11:]))) if found else None


def _nonfinite(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all())
