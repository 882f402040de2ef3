"""The command line of run_glue.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...training.arguments import BinaryTrainingArguments
from ..argument_checks import (
    OutputArguments,
    check_kind_of_training,
    check_limits,
    check_output_dir,
)
from ..commandline import Parser
from ..errors import UsageError

TASK_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
FORMATS = ("csv", "json", "jsonl", "parquet")
STRUCTURE = ("binarize", "attention", "embeddings")


@dataclass
class DataTrainingArguments:
    """What the model is trained and evaluated on."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(TASK_COLUMNS)}."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the Hub, e.g. stanfordnlp/sst2."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per example; what is longer is cut off. Default: 128, or what the model takes."},
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew."})
    pad_to_max_length: bool = field(
        default=True, metadata={"help": "Pad to max_seq_length; if False, to the longest example of each batch."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate the first N examples only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first N examples only."})
    train_file: str | None = field(default=None, metadata={"help": "csv, json, jsonl (these also .gz) or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "To evaluate on; of any of these kinds."})
    test_file: str | None = field(default=None, metadata={"help": "For --do_predict; needs no labels."})
    label_column_name: str = field(
        default="label",
        metadata={
            "help": "The column of the labels: integers, strings, lists of them (several labels may hold), or floats "
            "for a regression."
        },
    )
    label_type: Literal["auto", "class", "number"] = field(
        default="auto",
        metadata={"help": "class: each value is a class, as it is written; number: a regression. auto: by the values."},
    )
    drop_empty_rows: bool = field(
        default=False, metadata={"help": "Leave out the rows of files that have no text, or no label that is known."}
    )
    text_column_names: str | None = field(
        default=None, metadata={"help": "The column of the text, or two separated by a comma. Default: found by name."}
    )

    @property
    def files(self) -> dict[str, str]:
        """The local files, by split."""
        named = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in named.items() if path is not None}


@dataclass
class ModelArguments:
    """Which model is trained, and what of it becomes binary."""

    model_name_or_path: str = field(metadata={"help": "A float BERT, or a latent or packed binary one: id or folder."})
    config_name: str | None = field(default=None, metadata={"help": "The config, if it is elsewhere."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "The tokenizer, if it is elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what is downloaded."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use a tokenizer of the tokenizers library."})
    model_revision: str = field(default="main", metadata={"help": "A branch, tag or commit of the model."})
    token: str | None = field(default=None, metadata={"help": "The Hub's token. Default: that of `hf auth login`."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Train a new head where the checkpoint's has another number of labels."}
    )
    binarize: Literal["both", "weights", "activations", "none"] | None = field(
        default=None, metadata={"help": "What becomes binary. none: train the float model. Default: both."}
    )
    attention: Literal["float", "binary", "boolean"] | None = field(
        default=None, metadata={"help": "The two attention products. Default: float."}
    )
    embeddings: Literal["float", "int8", "binary"] | None = field(
        default=None, metadata={"help": "The word embeddings. Default: int8."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A trained classifier of the same labels to distil from."}
    )

    @property
    def hub(self) -> dict[str, Any]:
        """What every from_pretrained takes."""
        return {"cache_dir": self.cache_dir, "token": self.token, "trust_remote_code": self.trust_remote_code}

    @property
    def structure(self) -> dict[str, str]:
        """The fields of the binary config that were given."""
        return {name: getattr(self, name) for name in STRUCTURE if getattr(self, name) is not None}


class Arguments(NamedTuple):
    """Everything on the command line."""

    model: ModelArguments
    data: DataTrainingArguments
    training: BinaryTrainingArguments
    output: OutputArguments


def parse(command_line: list[str] | None = None, description: str | None = None) -> Arguments:
    """The arguments, checked as far as they can be without loading anything."""
    kinds = (ModelArguments, DataTrainingArguments, BinaryTrainingArguments, OutputArguments)
    arguments = Arguments(*Parser(kinds, description=description).parse(command_line))
    check_data_arguments(arguments.data, arguments.training)
    check_kind_of_training(arguments.model, arguments.training, "attention", "embeddings")
    check_output_dir(arguments.training, arguments.output)
    return arguments


def check_data_arguments(data: DataTrainingArguments, training: BinaryTrainingArguments) -> None:
    """Raise UsageError unless it is clear what to do and on which data."""
    if not (training.do_train or training.do_eval or training.do_predict):
        raise UsageError("nothing to do: give --do_train, --do_eval or --do_predict")
    if data.task_name is not None:
        data.task_name = data.task_name.lower()
        if data.task_name not in TASK_COLUMNS:
            raise UsageError(f"unknown task {data.task_name!r}; known tasks: {', '.join(TASK_COLUMNS)}")
    elif data.dataset_name is None:
        check_files(data, training)
    check_limits(data, "max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples")


def check_files(data: DataTrainingArguments, training: BinaryTrainingArguments) -> None:
    """Raise UsageError unless the files that are needed are there, and of known kinds."""
    if not data.files:
        raise UsageError(
            "no data: give --task_name (a GLUE task), --dataset_name (a dataset of the Hub), "
            "or --train_file and --validation_file"
        )
    needed = {"train": training.do_train, "validation": training.do_eval, "test": training.do_predict}
    for split, flag in {"train": "do_train", "validation": "do_eval", "test": "do_predict"}.items():
        if needed[split] and split not in data.files:
            raise UsageError(f"--{flag} needs --{split}_file; given: {', '.join(f'{s}_file' for s in data.files)}")
    for split, path in data.files.items():
        file_kind(split, path)


def file_kind(split: str, path: str) -> str:
    """Its extension without .gz, one of FORMATS. Raises UsageError for another, or if the file is missing."""
    suffixes = [s.lstrip(".").lower() for s in Path(path).suffixes]
    extension = next(iter(suffixes[-2:] if suffixes[-1:] == ["gz"] else suffixes[-1:]), "")
    if extension not in FORMATS or (extension == "parquet" and suffixes[-1] == "gz"):
        raise UsageError(
            f"{split}_file {path!r} is of no known kind: expected one of {', '.join(f'.{e}' for e in FORMATS)}, "
            "the text ones also with .gz"
        )
    if "://" not in path and not Path(path).is_file():
        raise UsageError(f"{split}_file {path!r} does not exist")
    return extension
