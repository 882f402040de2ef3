#!/usr/bin/env python
"""Train, evaluate and pack a binary text classifier on a GLUE task, a dataset of the Hub, or files of your own.

    python scripts/run_glue.py --model_name_or_path google-bert/bert-base-uncased --task_name sst2 \
        --teacher_model_name_or_path textattack/bert-base-uncased-SST-2 --method surge --method_args "eta=0.1" \
        --do_train --do_eval --learning_rate 5e-4 --output_dir sst2-binary

The arguments are named as in transformers' example of this name; `--binarize none` trains the float model (a teacher).
What is written: the packed model, `checkpoint-N` folders (latent, to be resumed), `train_results.json`,
`eval_results.json` (with the figures of each class), `all_results.json`, `trainer_state.json`, and by `--do_predict`
`predict_results_TASK.tsv`: index, prediction, score, texts.
"""

from hf_bnn.tasks.commandline import run
from hf_bnn.tasks.text.run import main


def _mp_fn(index: int) -> None:
    """What xla_spawn calls on each TPU core."""
    main()


if __name__ == "__main__":
    run(main)
