"""Run by two processes: one optimizer step of every method, batch normalization, checkpoints; what each rank holds."""

import hashlib
import json
import signal
import sys
from pathlib import Path

import torch
from batch_norm_worker import normalize
from datasets import Dataset
from safetensors.torch import save_file
from test_trainer import arguments, rows
from tiny import EVERY_METHOD, method_id, tiny_images, tiny_model, tiny_resnet
from transformers import TrainerCallback, set_seed

from hf_bnn import BinaryTrainer, BinaryTrainingArguments
from hf_bnn.integrity import CorruptCheckpointError, verify_manifest
from hf_bnn.training.batch_norm import OVER_RANKS
from hf_bnn.training.interruption import STOP_SIGNALS
from hf_bnn.training.nonfinite import NonFiniteTrainingError


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all tensors."""
    joined = b"".join(value.contiguous().numpy().tobytes() for value in state.values())
    return hashlib.sha256(joined).hexdigest()


def images(folder: Path, **kwargs) -> BinaryTrainer:
    """A ResNet's trainer, with batch normalization."""
    set_seed(0)
    data = Dataset.from_dict({name: value.tolist() for name, value in tiny_images(16).items()}).with_format("torch")
    settings = {"max_steps": 2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, **kwargs}
    args = arguments(folder, **settings)
    return BinaryTrainer(tiny_resnet(), args, train_dataset=data, eval_dataset=data)


def normalized(folder: Path) -> dict:
    """How a run with batch normalization evaluates, saves, and goes on, here and on the other rank."""
    one = images(folder / "images", ddp_broadcast_buffers=False)
    one.train()
    loss = one.evaluate()["eval_loss"]
    found = {"loss": loss, "state": digest(one.bare_model.state_dict())}
    for number in (1, 2):
        verify_manifest(folder / "images" / f"checkpoint-{number}")
    torch.distributed.barrier()
    if one.is_world_process_zero():
        (folder / "images" / "checkpoint-2" / "rng_state_1.pth").unlink()
    torch.distributed.barrier()
    again = images(folder / "images", ddp_broadcast_buffers=False)
    again.train(resume_from_checkpoint=True)
    found["resumed"] = digest(again.bare_model.state_dict())
    found["steps"] = again.state.global_step - again._initial_global_step
    (folder / "images" / "checkpoint-2" / "rng_state_1.pth").unlink(missing_ok=True)
    torch.distributed.barrier()
    try:
        images(folder / "images").train(resume_from_checkpoint=str(folder / "images" / "checkpoint-2"))
    except CorruptCheckpointError as error:
        found["error"] = str(error)
    whole = images(folder / "synchronized", sync_batchnorm=True, save_strategy="no")
    kinds = set()
    whole.bare_model.resnet.register_forward_hook(lambda module, *_: kinds.update(type(m) for m in module.modules()))
    whole.train()
    found["synchronized"] = bool(kinds & set(OVER_RANKS.values()))
    found["plain again"] = not {type(m) for m in whole.bare_model.modules()} & set(OVER_RANKS.values())
    try:
        images(folder / "sharded", fsdp=True, save_strategy="no")
    except ValueError as error:
        found["fsdp"] = str(error)
    return found


class NaNOnRankOne(TrainerCallback):
    """Makes the loss of rank 1 NaN in step 1."""

    def __init__(self, classifier: torch.nn.Module, rank: int):
        self.rank, self.now = rank, False
        classifier.register_forward_hook(lambda module, inputs, output: output * float("nan") if self.now else None)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.now = self.rank == 1 and state.global_step == 1


def diverged(folder: Path) -> dict:
    """How a run ends, and how it goes on, in which the loss of one rank is NaN."""
    found = {}
    for policy in ("stop", "skip"):
        set_seed(0)
        model = tiny_model()
        args = arguments(folder / policy, max_steps=3, nonfinite=policy, save_strategy="no")
        one = BinaryTrainer(model, args, train_dataset=rows())
        one.add_callback(NaNOnRankOne(model.classifier, one.args.process_index))
        try:
            one.train()
            found["dropped"] = {
                "skipped": one.skipped_steps,
                "steps": one.state.global_step,
                "state": digest(one.bare_model.state_dict()),
            }
        except NonFiniteTrainingError as error:
            found["nan"] = str(error)
    return found


class SignalOnRankOne(TrainerCallback):
    """Sends rank 1 a signal in step 1, and no other rank."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if args.process_index == 1 and state.global_step == 1:
            signal.raise_signal(signal.SIGUSR1)


def stopped(folder: Path) -> dict:
    """Where a run ends of which one rank is told to stop."""
    set_seed(0)
    args = arguments(folder / "stopped", max_steps=5, save_strategy="no")
    one = BinaryTrainer(tiny_model(), args, train_dataset=rows(), callbacks=[SignalOnRankOne()])
    one.stop_signals = STOP_SIGNALS
    one.train()
    verify_manifest(folder / "stopped" / "checkpoint-2")
    return {"stopped": one.interruption.stopped_at, "received": one.interruption.received is not None}


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
        digests[method_id(method)] = digest(trainer.bare_model.state_dict())
        if method_id(method) == "ste" and trainer.is_world_process_zero():
            save_file(
                {name: p.detach().clone() for name, p in trainer.bare_model.named_parameters()},
                folder / "ste.safetensors",
            )
    normalize(trainer.args.process_index, folder)
    report = {
        "world_size": trainer.args.world_size,
        "digests": digests,
        **diverged(folder),
        **stopped(folder),
        "normalized": normalized(folder),  # last: it sets accelerate's variable for FSDP
    }
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(report))
    torch.distributed.barrier()  # no rank leaves while another still talks to it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
