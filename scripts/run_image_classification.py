#!/usr/bin/env python
"""Trains a binary image classifier. hf_bnn/tasks/images/run.py holds the code, and lists the files that it writes.

    python scripts/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name uoft-cs/cifar10 --validation_split_name test --method surge --do_train --do_eval \
        --learning_rate 5e-4 --output_dir cifar10-binary-vit
    python scripts/run_image_classification.py scripts/recipes/cifar10_resnet20.json --output_dir cifar10-resnet20

The arguments are named as in transformers' example. A json file of arguments may come first; later arguments override
it. Without a checkpoint, `--model_type vit|resnet --config_overrides "hidden_size=96,..."` starts from scratch.
`--binarize none` trains the float model (a teacher).
"""

from hf_bnn.tasks.commandline import exit_after
from hf_bnn.tasks.images.run import main


def _mp_fn(index: int) -> None:
    """The entry point that xla_spawn calls on each TPU core."""
    main()


if __name__ == "__main__":
    exit_after(main)
