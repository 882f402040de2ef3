"""The arguments of the two steps of --two_step, and which of the steps a resumed run has left to do.

The first step trains binary activations with float weights, the second one both (Real-to-Binary Net, arXiv 2003.11535;
ReActNet, arXiv 2003.03488).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from ...training.arguments import BinaryTrainingArguments
from ...training.checked_trainer import last_complete_checkpoint
from .arguments import Arguments

FIRST_STEP = "first_step"


def first_step(arguments: Arguments) -> Arguments:
    """The arguments of the first step, which writes into the folder `first_step`."""
    training = share_of(arguments.training, arguments.model.two_step_fraction)
    training.output_dir = str(Path(training.output_dir) / FIRST_STEP)
    training.push_to_hub = training.save_packed = training.do_predict = False
    return arguments._replace(model=replace(arguments.model, binarize="activations"), training=training)


def second_step(arguments: Arguments) -> Arguments:
    """The arguments of the second step, which starts from the model of the first one."""
    done = str(Path(arguments.training.output_dir) / FIRST_STEP)
    scratch = {"model_type": None, "config_name": None, "image_size": None, "image_processor_name": None}
    model = replace(arguments.model, binarize="both", model_name_or_path=done, config_overrides=None, **scratch)
    return arguments._replace(model=model, training=share_of(arguments.training, 1 - arguments.model.two_step_fraction))


def share_of(training: BinaryTrainingArguments, fraction: float) -> BinaryTrainingArguments:
    """The arguments for a fraction (0 to 1) of the training."""
    result = copy.copy(training)
    if training.max_steps > 0:
        result.max_steps = max(1, round(training.max_steps * fraction))
    result.num_train_epochs = training.num_train_epochs * fraction
    return result


def steps_to_resume(training: BinaryTrainingArguments) -> tuple[bool, bool]:
    """Whether the run goes on after its first step, and whether the second step has a checkpoint to go on from."""
    output, asked = Path(training.output_dir), training.resume_from_checkpoint
    resuming = asked is not None and asked.lower() != "false"
    begun = last_complete_checkpoint(output) is not None or (
        resuming and Path(asked).parent.resolve() == output.resolve()
    )
    done = (output / FIRST_STEP / "train_results.json").is_file()
    skips_first = resuming and (done or begun)
    return skips_first, skips_first and begun
