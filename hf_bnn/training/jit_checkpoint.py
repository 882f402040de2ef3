"""`--enable_jit_checkpoint`: on SIGTERM, the run stops with a checkpoint like any other."""

from __future__ import annotations

import torch
from transformers import Trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class StepEndCheckpointCallback(JITCheckpointCallback):
    """After SIGTERM, completes the current step, saves a checkpoint and ends the run.

    transformers' own callback may save in the middle of a step, when random numbers and statistics already belong to
    the next checkpoint. It also saves before an evaluation that is due, and each rank saves at its own signal.
    """

    @classmethod
    def take_over(cls, trainer: Trainer) -> None:
        """Replace transformers' callback by this one, if the trainer has it."""
        found = trainer.pop_callback(JITCheckpointCallback)
        if found is not None:
            own = cls()
            own.trainer, own.jit_manager = trainer, found.jit_manager
            trainer.add_callback(own)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Does nothing: the step is completed first."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Does nothing: the step is completed first."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self._requested():
            return
        self.jit_manager.is_checkpoint_requested = False
        logger.warning(
            f"SIGTERM: the run stops at step {state.global_step} of {state.max_steps} and leaves checkpoint-"
            f"{state.global_step} to be resumed. What is saved after it is not the model of a finished run"
        )
        if (
            control.should_evaluate
        ):  # evaluation may take longer than the time left: this checkpoint is replaced after it
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
        control.should_save = control.should_training_stop = True

    on_epoch_end = on_step_end

    def _requested(self) -> bool:
        """Whether any rank has received the signal."""
        requested = self.jit_manager is not None and self.jit_manager.is_checkpoint_requested
        if self.trainer.args.world_size > 1:
            flag = torch.tensor(int(requested), device=self.trainer.args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            requested = bool(flag)
        return requested
