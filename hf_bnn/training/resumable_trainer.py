"""A Trainer whose checkpoints can be verified and carry a record of their run. It resumes only from a fitting one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.trainer_utils import has_length, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..install import method_state_names
from ..integrity import CorruptCheckpointError, write_manifest
from .checkpoints import (
    chosen_checkpoint,
    clear_checkpoint,
    last_complete_checkpoint,
    read_record,
    results_in,
    verify_checkpoint,
    write_record,
)
from .interruption import Interruption, StopAtStepEnd
from .run_record import Difference, differences, now, run_record

logger = logging.get_logger(__name__)

GROUP_OPTIONS = ("weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha", "amsgrad", "maximize")


class ResumableTrainer(Trainer):
    """Trainer for any model. Each checkpoint-N holds a record of its run, and at last a manifest of digests.

    `train(resume_from_checkpoint=True)` resumes from the newest complete checkpoint. "auto" does the same, or starts
    from the beginning if there is no checkpoint. Settings that differ from those of the checkpoint's run are named.
    They are an error if the run would become another one (another model, method, order of rows or end of a schedule),
    else a warning.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._started: str | None = None
        self.interruption = Interruption()
        self.stop_signals = StopAtStepEnd.take_over(self)  # with which a run ends early, leaving a checkpoint

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    # Several ranks

    def _wait(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    def _agreed(self, find: Callable[[], str | None]) -> str | None:
        """The result of `find` on the first rank. An error there is raised on all ranks."""
        if self.args.world_size == 1:
            return find()
        outcome: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                outcome[0] = find()
            except (CorruptCheckpointError, ValueError, OSError) as error:
                outcome[1] = error
        torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _warn(self, text: str) -> None:
        if self.is_world_process_zero():
            logger.warning(text)

    # Writing

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_checkpoint(folder)
        self._wait()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            write_record(folder, self.run_record(self.state.max_steps))
        self._wait()  # until every rank has written its random state
        if self.args.should_save:
            write_manifest(folder)
            # Old checkpoints are deleted only once the new one is known to be complete.
            best = self.state.best_model_checkpoint
            rotate_checkpoints(run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def run_record(self, max_steps: int) -> dict[str, Any]:
        """The record of this run for its checkpoints."""
        data = self.train_dataset
        return run_record(
            self._started or now(),
            self.bare_model,
            self.args,
            self._train_batch_size,
            len(data) if data is not None and has_length(data) else None,
            max_steps,
            getattr(self, "method", None),
            getattr(self, "teacher", None),
        )

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        folder = self._agreed(lambda: self.checkpoint_to_resume(resume_from_checkpoint))
        self._started = now()
        if folder is not None:
            record = read_record(folder)
            if record is None:
                self._warn(f"{folder} has no record of its run: settings that differ from it are not noticed")
            else:
                self._started = record["started"]
                self._compare(folder, record)
        elif self.args.should_save and (left := results_in(self.args.output_dir)):
            self._warn(
                f"output_dir={self.args.output_dir} holds an earlier run's results ({', '.join(left[:3])}, "
                f"{len(left)} in all), which this run will mix with its own and overwrite: choose another folder, or "
                "go on with resume_from_checkpoint=True"
            )
        with self.interruption.watched(self.stop_signals):
            return super().train(folder, *args, **kwargs)

    def checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """The complete checkpoint that `asked` means; None: none. Raises CorruptCheckpointError or ValueError."""
        folder = chosen_checkpoint(asked, self.args.output_dir)
        if folder is None:
            return None
        if not (Path(folder) / "optimizer.pt").exists() and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"{folder} was written with save_only_model: without the optimizer's state nothing can be resumed. "
                "To train on from its weights, load the model from it and leave out resume_from_checkpoint"
            )
        return folder

    def planned_steps(self) -> int:
        """The number of optimizer steps of the whole run, as Trainer counts them."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _compare(self, folder: str, record: dict[str, Any]) -> None:
        """Compare the run with the checkpoint's record. Raises ValueError if it would be another run, else warns."""
        current = self.run_record(self.planned_steps())
        if self.args.auto_find_batch_size:  # the search finds the checkpoint's own size again
            for part, name in (("data", "rows of a step"), ("settings", "batch size")):
                current[part].pop(name)
        found = [self._judged(difference) for difference in differences(record, current, self.args.ignore_data_skip)]
        fields = "; ".join(map(str, found))
        if any(difference.another for difference in found):
            raise ValueError(
                f"{folder} cannot be resumed: it would be another run. {fields}. Resume with the settings that it "
                "began with; or, for a new run from its weights, load the model from it and leave out "
                "resume_from_checkpoint"
            )
        if found:
            self._warn(f"{folder} is resumed with other settings, which hold from its step on. {fields}")

    def _judged(self, difference: Difference) -> Difference:
        """Marks a changed learning rate as an error if the scheduler or the engine would ignore it."""
        deaf = self.is_deepspeed_enabled or not self._scales_learning_rates()
        if difference.field == "learning_rate" and deaf:
            return difference._replace(another=True, why="the scheduler's or engine's own state would overrule it")
        return difference

    def _scales_learning_rates(self) -> bool:
        kind = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        return kind not in ("reduce_lr_on_plateau", "greedy")

    # Trap: the states of the optimizer and the scheduler contain the old learning rate, weight decay and betas. Without
    # this, the values that the resumed run was given would have no effect.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        given = [{key: group[key] for key in GROUP_OPTIONS if key in group} for group in self.optimizer.param_groups]
        rates = list(getattr(self.lr_scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, options in zip(self.optimizer.param_groups, given, strict=True):
            group.update(options)
        if rates and rates != self.lr_scheduler.base_lrs:
            _set_rates(self.optimizer, self.lr_scheduler, rates)

    # Loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_best(resume_from_checkpoint)
        if not self._load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _check_best(self, checkpoint: str) -> None:
        """Refuse now, not after training, a best checkpoint that `load_best_model_at_end` could not load."""
        if not self.args.load_best_model_at_end:
            return
        state = Path(checkpoint) / "trainer_state.json"
        best = TrainerState.load_from_json(state).best_model_checkpoint if state.is_file() else None
        if best is not None and Path(best).is_dir():
            self._agreed(lambda: verify_checkpoint(best))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        try:
            self._agreed(lambda: verify_checkpoint(best))
        except (CorruptCheckpointError, ValueError) as error:
            raise CorruptCheckpointError(
                f"training has come to its end, but load_best_model_at_end cannot take the best model: {error}. The "
                f"newest whole checkpoint is {last_complete_checkpoint(self._get_output_dir(None)) or 'none'}"
            ) from error
        if not self._load_weights(best):
            super()._load_best_model()

    def _load_weights(self, folder: str) -> bool:
        """Load a checkpoint's weights strictly. Returns False, without loading, for formats that Trainer handles.

        Trainer assumes that the names in the file are the model's own. In ViT they are not: Trainer would warn, and
        leave most tensors unchanged.
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
    """The name of the file's tensor `key` in the model whose state dict is `own`."""
    renamed, _ = rename_source_key(key, renamings, [])
    return renamed if renamed in own else key


def _set_rates(optimizer: torch.optim.Optimizer, scheduler: Any, rates: list[float]) -> None:
    """Set each group's learning rate to its present value in a schedule that began at `rates`."""
    steps = scheduler.last_epoch
    for index, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
        if isinstance(scheduler, LambdaLR):
            group["lr"] = rate * scheduler.lr_lambdas[index](steps)
        else:
            group["lr"] *= rate / scheduler.base_lrs[index]
        group["initial_lr"] = rate
    scheduler.base_lrs = rates
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
