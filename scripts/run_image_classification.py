#!/usr/bin/env python
"""Train, evaluate and pack a binary image classifier on a dataset of the Hub, a folder of images, or a dataset on disk.

    python scripts/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name uoft-cs/cifar10 --validation_split_name test --method surge --do_train --do_eval \
        --learning_rate 5e-4 --output_dir cifar10-binary-vit
    python scripts/run_image_classification.py scripts/recipes/cifar10_resnet20.json --output_dir cifar10-resnet20

The arguments are named as in transformers' example of this name; a json file of them may come first, and what follows
overrides it. Without a checkpoint, `--model_type vit|resnet --config_overrides "hidden_size=96,..."` starts from
scratch. `--binarize none` trains the float model (a teacher). What is written: the packed model with its image
processor, `checkpoint-N` folders (latent, to be resumed), `train_results.json`, `eval_results.json`,
`all_results.json`, `trainer_state.json`, and by `--do_predict` `predict_results.tsv`; the first step of `--two_step`
writes the same into `first_step`.
"""

from hf_bnn.tasks.commandline import run
from hf_bnn.tasks.images.run import main


def _mp_fn(index: int) -> None:
    """What xla_spawn calls on each TPU core."""
    main()


if __name__ == "__main__":
    run(main)
