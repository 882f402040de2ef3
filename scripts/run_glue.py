#!/usr/bin/env python
"""Trains a binary text classifier. hf_bnn/tasks/text/run.py holds the code, and lists the files that it writes.

    python scripts/run_glue.py --model_name_or_path google-bert/bert-base-uncased --task_name sst2 \
        --teacher_model_name_or_path textattack/bert-base-uncased-SST-2 --method surge --method_args "eta=0.1" \
        --do_train --do_eval --learning_rate 5e-4 --output_dir sst2-binary

The arguments are named as in transformers' example. `--binarize none` trains the float model (a teacher).
"""

from hf_bnn.tasks.commandline import exit_after
from hf_bnn.tasks.text.run import main


def _mp_fn(index: int) -> None:
    """The entry point that xla_spawn calls on each TPU core."""
    main()


if __name__ == "__main__":
    exit_after(main)
