"""--enable_jit_checkpoint: a checkpoint on SIGTERM that is like any other."""

from __future__ import annotations

import torch
from transformers import Trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class StepEndCheckpointCallback(JITCheckpointCallback):
    """Ends the run, once SIGTERM has come, with a checkpoint of the step that is being made.

    transformers' own also writes in the middle of a step, when random numbers were drawn and statistics moved that
    belong to the next; it writes before an evaluation that is due; and each rank writes when its own signal came.
    """

    @classmethod
    def take_over(cls, trainer: Trainer) -> None:
        """Take the place of transformers' callback, if the trainer has it."""
        found = trainer.pop_callback(JITCheckpointCallback)
        if found is not None:
            own = cls()
            own.trainer, own.jit_manager = trainer, found.jit_manager
            trainer.add_callback(own)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Nothing: the step goes on to its end."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Nothing: the step goes on to its end."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self._requested():
            return
        self.jit_manager.is_checkpoint_requested = False
        logger.warning(
            f"SIGTERM: the run stops at step {state.global_step} of {state.max_steps} and leaves checkpoint-"
            f"{state.global_step} to be resumed. What is saved after it is not the model of a finished run"
        )
        if control.should_evaluate:  # it may take longer than is left: a first checkpoint stands until the final one
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
        control.should_save = control.should_training_stop = True

    on_epoch_end = on_step_end

    def _requested(self) -> bool:
        """Whether a signal has come, to any rank."""
        requested = self.jit_manager is not None and self.jit_manager.is_checkpoint_requested
        if self.trainer.args.world_size > 1:
            flag = torch.tensor(int(requested), device=self.trainer.args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            requested = bool(flag)
        return requested
