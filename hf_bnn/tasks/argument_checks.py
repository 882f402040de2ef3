"""Checks of the arguments that text and image runs share. They find mistakes before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..training.arguments import BinaryTrainingArguments
from .arguments import OutputArguments
from .commandline import user_errors
from .errors import UsageError

RESULTS = ("all_results.json", "train_results.json", "eval_results.json")
OF_A_RUN = ("trainer_state.json", "model.safetensors", "model.safetensors.index.json", *RESULTS)


def check_doing(training: BinaryTrainingArguments) -> None:
    """Raise UsageError if the arguments ask for nothing to be done."""
    if not (training.do_train or training.do_eval or training.do_predict):
        raise UsageError("nothing to do: give --do_train, --do_eval or --do_predict")


def check_kind_of_training(model: Any, training: BinaryTrainingArguments, *structure: str) -> None:
    """Raise UsageError for arguments of a binary model (`structure`) or of a teacher if the run has none."""
    if model.binarize == "none":
        for name in (*structure, "teacher_model_name_or_path"):
            if getattr(model, name) is not None:
                raise UsageError(f"--binarize none trains a plain float model: leave out --{name}")
        if training.method != "ste" or training.method_args is not None:
            raise UsageError("--binarize none trains a plain float model: leave out --method and --method_args")
    if model.teacher_model_name_or_path is None:
        with user_errors():
            training.check_teacher_is_named("--teacher_model_name_or_path")


def check_limits(data: Any, *names: str) -> None:
    """Raise UsageError for a limit below 1. None is no limit."""
    for name in names:
        value = getattr(data, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}={value}: expected 1 or more; leave it out for no limit")


def check_output_dir(training: BinaryTrainingArguments, output: OutputArguments) -> None:
    """Raise UsageError if training would overwrite another run's results. If that is allowed, delete its figures."""
    asked = training.resume_from_checkpoint
    if not training.do_train or (asked is not None and asked.lower() != "false"):
        return
    folder = Path(training.output_dir)
    found = [name for name in OF_A_RUN if (folder / name).is_file()]
    found += sorted(path.name for path in folder.glob("checkpoint-*"))
    if found and not output.overwrite_output_dir:
        raise UsageError(
            f"output_dir {training.output_dir!r} holds the results of another run ({', '.join(found[:3])}): name "
            "another one, go on where it stopped with --resume_from_checkpoint True, or give --overwrite_output_dir"
        )
    if training.should_save:
        for name in RESULTS:  # Trainer adds its figures to those that are there
            (folder / name).unlink(missing_ok=True)
