"""Run by two processes: one optimizer step of every method, and what each rank holds after it."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_trainer import rows
from tiny import EVERY_METHOD, method_id, tiny_model
from transformers import set_seed

from hf_bnn import BinaryTrainer, BinaryTrainingArguments


def main(folder: Path) -> None:
    digests = {}
    for method in EVERY_METHOD:
        args = BinaryTrainingArguments(
            output_dir=str(folder / "out"),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            learning_rate=0.01,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            calibrate_levels=True,
        )
        set_seed(0)
        trainer = BinaryTrainer(tiny_model(), args, method=method, train_dataset=rows())
        trainer.train()
        state = trainer.bare_model.state_dict()
        joined = b"".join(value.contiguous().numpy().tobytes() for value in state.values())
        digests[method_id(method)] = hashlib.sha256(joined).hexdigest()
        if method_id(method) == "ste" and trainer.is_world_process_zero():
            save_file(
                {name: p.detach().clone() for name, p in trainer.bare_model.named_parameters()},
                folder / "ste.safetensors",
            )
    report = {"world_size": trainer.args.world_size, "digests": digests}
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(report))
    torch.distributed.barrier()  # no rank leaves while another still talks to it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
