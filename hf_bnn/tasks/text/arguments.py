"""The command-line arguments of a text run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ...training.arguments import BinaryTrainingArguments
from ..argument_checks import check_doing, check_kind_of_training, check_limits, check_output_dir
from ..arguments import OutputArguments, SharedDataArguments, SharedModelArguments
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


@dataclass
class DataTrainingArguments(SharedDataArguments):
    """The data that the model is trained and evaluated on."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(TASK_COLUMNS)}."})
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per example; longer texts are cut off. Default: 128, or the model's limit."},
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again instead of reading the cache."})
    pad_to_max_length: bool = field(
        default=True,
        metadata={"help": "Pad every text to max_seq_length. If False: to the longest text of its batch."},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Training texts: csv, json or jsonl (also .gz), or parquet."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Texts to evaluate on, in a file of any of these types."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Texts for --do_predict. They need no labels."})
    label_column_name: str = field(
        default="label",
        metadata={
            "help": "The column of the labels: integers or strings; lists of them, if several labels may apply to a "
            "text; or floats, for a regression."
        },
    )
    label_type: Literal["auto", "class", "number"] = field(
        default="auto",
        metadata={"help": "class: every distinct value is a class; number: a regression; auto: decide by the values."},
    )
    drop_empty_rows: bool = field(
        default=False, metadata={"help": "Leave out rows of files that have no text or no known label."}
    )
    text_column_names: str | None = field(
        default=None,
        metadata={"help": "The column of the text, or two separated by a comma. Default: found by its name."},
    )

    @property
    def files(self) -> dict[str, str]:
        """The local files, by split."""
        named = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in named.items() if path is not None}


@dataclass
class ModelArguments(SharedModelArguments):
    """Which model is trained, and which parts of it become binary."""

    STRUCTURE = ("binarize", "attention", "embeddings")

    model_name_or_path: str = field(
        metadata={"help": "A float BERT, or a latent or packed binary one: Hub name or folder."}
    )
    config_name: str | None = field(default=None, metadata={"help": "The config, if it is stored elsewhere."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "The tokenizer, if it is stored elsewhere."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use a tokenizer of the tokenizers library."})
    embeddings: Literal["float", "int8", "binary"] | None = field(
        default=None, metadata={"help": "The word embeddings. Default: int8."}
    )


class Arguments(NamedTuple):
    """Everything on the command line."""

    model: ModelArguments
    data: DataTrainingArguments
    training: BinaryTrainingArguments
    output: OutputArguments


def parse(command_line: list[str] | None = None, description: str | None = None) -> Arguments:
    """The parsed arguments. Raises UsageError for every mistake that shows before anything is loaded."""
    kinds = (ModelArguments, DataTrainingArguments, BinaryTrainingArguments, OutputArguments)
    arguments = Arguments(*Parser(kinds, description=description).parse(command_line))
    check_data_arguments(arguments.data, arguments.training)
    check_kind_of_training(arguments.model, arguments.training, "attention", "embeddings")
    check_output_dir(arguments.training, arguments.output)
    return arguments


def check_data_arguments(data: DataTrainingArguments, training: BinaryTrainingArguments) -> None:
    """Raise UsageError unless the arguments say what to do and on which data."""
    check_doing(training)
    if data.task_name is not None:
        data.task_name = data.task_name.lower()
        if data.task_name not in TASK_COLUMNS:
            raise UsageError(f"unknown task {data.task_name!r}; known tasks: {', '.join(TASK_COLUMNS)}")
    elif data.dataset_name is None:
        check_files(data, training)
    check_limits(data, "max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples")


def check_files(data: DataTrainingArguments, training: BinaryTrainingArguments) -> None:
    """Raise UsageError unless every file that the run needs is given, exists and has a known type."""
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
    """The file's extension without .gz. Raises UsageError if it is not in FORMATS, or if the file is missing."""
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
