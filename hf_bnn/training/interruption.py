"""Signals that end a training run: it completes the step, leaves a checkpoint, and says that it is unfinished."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What schedulers send before they take a machine away, and Ctrl-C.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
UNFINISHED = 75  # exit code, EX_TEMPFAIL of sysexits.h: the same command, with a resumed checkpoint, goes on


class UnfinishedRunError(RuntimeError):
    """A signal has ended a training run before its last step. Its newest checkpoint is complete."""


class Interruption:
    """The first stop signal that this process has received in a training run, kept until the step is complete."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopped_at: int | None = None  # the step at which it has ended the run

    @contextmanager
    def watched(self, signals: Iterable[signal.Signals]) -> Iterator[None]:
        """Note these signals instead of acting on them. A second Ctrl-C interrupts at once.

        Only the main thread can do so; in another one nothing changes.
        """
        self.received = self.stopped_at = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self._note) for number in signals}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        logger.warning(f"{self.received.name}: the step is completed and a checkpoint is written, then the run stops")


class StopAtStepEnd(TrainerCallback):
    """Ends the run with a checkpoint at the end of the step in which any rank has received a stop signal.

    It replaces the callback of `enable_jit_checkpoint`. That one may save in the middle of a step, when random numbers
    and statistics already belong to the next checkpoint. It also saves before an evaluation that is due, and each rank
    saves at its own signal.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    @classmethod
    def take_over(cls, trainer: Trainer) -> tuple[signal.Signals, ...]:
        """Add this callback, remove transformers' one, and return the signals that the arguments ask to stop at."""
        found = trainer.pop_callback(JITCheckpointCallback)
        trainer.add_callback(cls(trainer))
        manager = getattr(found, "jit_manager", None)
        if manager is None:
            return ()
        signal.signal(signal.SIGTERM, manager._original_sigterm_handler)
        return (signal.SIGTERM,)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        interruption = self.trainer.interruption
        if interruption.stopped_at is not None or state.global_step >= state.max_steps or not self._requested():
            return
        interruption.stopped_at = state.global_step
        logger.warning(
            f"the run stops at step {state.global_step} of {state.max_steps} and leaves checkpoint-"
            f"{state.global_step} to be resumed. What is saved after it is not the model of a finished run"
        )
        if control.should_evaluate:  # it may take longer than the time left: this checkpoint is replaced after it
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
        control.should_save = control.should_training_stop = True

    on_epoch_end = on_step_end

    def _requested(self) -> bool:
        """Whether any rank has received a signal. All ranks ask after each step if there are signals to stop at."""
        if not self.trainer.stop_signals:
            return False
        requested = self.trainer.interruption.received is not None
        if self.trainer.args.world_size > 1:
            flag = torch.tensor(int(requested), device=self.trainer.args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            requested = bool(flag)
        return requested
