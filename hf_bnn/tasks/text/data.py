"""What run_glue.py works on: the splits of GLUE, of a dataset of the Hub or of files, checked and tokenized."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets import List as ListOf
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import UsageError
from ..labels import Labels
from .arguments import Arguments, file_kind
from .files import read_table
from .labels import read_labels
from .rows import Split, from_dataset, from_table, without_faults

logger = logging.getLogger(__name__)

GLUE = "nyu-mll/glue"
USUAL_LENGTH = 128
SHORT_INTEGERS = ("attention_mask", "token_type_ids", "special_tokens_mask")


class Examples(NamedTuple):
    """A split as Trainer takes it, and what it was made of."""

    tokens: Dataset
    rows: Dataset  # the texts
    split: Split

    @property
    def inputs(self) -> dict[str, Any]:
        """What a table of predictions says about each row."""
        count = len(self.rows)
        indices = np.arange(count) if self.split.indices is None else self.split.indices[:count]
        lines = {} if self.split.lines is None else {"line": [self.split.lines[index] for index in indices]}
        return {"index": indices, **lines, **{column: self.rows[column][:] for column in self.split.texts}}


def used_splits(arguments: Arguments) -> dict[str, tuple[str, ...]]:
    """The names of the splits that each of do_train, do_eval and do_predict works on."""
    ends = ("_matched", "_mismatched") if arguments.data.task_name == "mnli" else ("",)
    splits = {
        "do_train": ("train",),
        "do_eval": tuple(f"validation{end}" for end in ends),
        "do_predict": tuple(f"test{end}" for end in ends),
    }
    return {flag: names for flag, names in splits.items() if getattr(arguments.training, flag)}


def load_data(arguments: Arguments, config: PreTrainedConfig) -> tuple[dict[str, Split], Labels]:
    """The splits that are used, without rows that cannot be, and their labels.

    Raises UsageError for a split that is missing or empty, and for rows with faults unless they may be dropped.
    """
    used = used_splits(arguments)
    labelled = {name for flag, names in used.items() if flag != "do_predict" for name in names}
    wanted = {name: name in labelled for names in used.values() for name in names}
    data = arguments.data
    if data.task_name is None and data.dataset_name is None:
        if labelled and data.train_file is not None:
            wanted["train"] = True  # it says which labels there are
        splits = {name: load_file(arguments, name, labels) for name, labels in wanted.items()}
    else:
        found = load_from_hub(arguments)
        check_split_names(used, found)
        if labelled and "train" in found:
            wanted["train"] = True
        splits = {}
        for name, labels in wanted.items():
            splits[name] = from_dataset(name, f"the {name} data", found[name], data, labels)
    for split in splits.values():
        if not len(split.rows):
            raise UsageError(f"{split.where} holds no row: name another file or dataset")
    labels = read_labels(arguments, splits, config)
    splits = {name: split for name, split in splits.items() if any(name in names for names in used.values())}
    without_faults(splits, data.drop_empty_rows)
    return splits, labels


def load_from_hub(arguments: Arguments) -> DatasetDict:
    """All splits of a dataset of the Hub."""
    model, data = arguments.model, arguments.data
    hub = {"cache_dir": model.cache_dir, "token": model.token}
    if data.task_name is not None:
        return load_dataset(GLUE, data.task_name, **hub)
    return load_dataset(data.dataset_name, data.dataset_config_name, **hub)


def check_split_names(used: dict[str, tuple[str, ...]], found: DatasetDict) -> None:
    """Raise UsageError if a split that is used is not among those found."""
    for flag, names in used.items():
        missing = [name for name in names if name not in found]
        if missing:
            raise UsageError(f"--{flag} needs a split {missing[0]!r}; the dataset has: {', '.join(found)}")


def load_file(arguments: Arguments, name: str, labelled: bool) -> Split:
    """The split of this name, from its file."""
    data, model = arguments.data, arguments.model
    path = data.files[name]
    kind = file_kind(name, path)
    logger.info(f"{name}: {path}")
    if kind != "parquet":
        return from_table(name, path, read_table(path, kind), data, labelled)
    # Each file by itself: a test file has no labels, and one call would demand the same columns of all.
    hub = {"cache_dir": model.cache_dir, "token": model.token}
    try:
        rows = load_dataset("parquet", data_files=path, split="train", **hub)
    except (ValueError, DatasetsError) as error:
        raise UsageError(f"{path} holds no row, or is no parquet file: {error.__cause__ or error}") from error
    return from_dataset(name, path, rows, data, labelled)


# Tokens


def prepare(
    arguments: Arguments,
    splits: dict[str, Split],
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
) -> dict[str, Examples]:
    """The splits, tokenized, by name. `longest`: the tokens that the model takes."""
    data, training = arguments.data, arguments.training
    if data.max_seq_length is not None and data.max_seq_length > longest:
        raise UsageError(
            f"max_seq_length={data.max_seq_length}: the model takes {longest} tokens at most (its positions, or its "
            "tokenizer's model_max_length): give no more"
        )
    max_length = min(USUAL_LENGTH, longest) if data.max_seq_length is None else data.max_seq_length
    limits = {
        "do_train": data.max_train_samples,
        "do_eval": data.max_eval_samples,
        "do_predict": data.max_predict_samples,
    }
    result = {}
    for flag, names in used_splits(arguments).items():
        for name in names:
            split = splits[name]
            rows = split.rows if split.indices is None else split.rows.select(split.indices)
            rows = rows.select(range(min(len(rows), limits[flag] or len(rows)))).select_columns(list(split.texts))
            logger.info(f"{name}: {len(rows)} examples, text from {', '.join(split.texts)}")
            with training.main_process_first(desc=f"tokenizing {name}"):
                tokens = tokenized(arguments, rows, tokenizer, split.texts, max_length)
            if flag != "do_predict":
                tokens = with_targets(tokens, split, labels)
            result[name] = Examples(tokens, rows, split)
    return result


def tokenized(
    arguments: Arguments,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    max_length: int,
) -> Dataset:
    """Token ids in place of the texts, from the cache if they have been computed before."""
    data = arguments.data
    given = {"tokenizer": tokenizer, "columns": columns, "max_length": max_length, "pad": data.pad_to_max_length}
    # Without declared types a column keeps that of one of the same name, and numbers become strings.
    names = tokenizer(*(["a"] for _ in columns))
    types = {name: ListOf(Value("int8" if name in SHORT_INTEGERS else "int32")) for name in names}
    cache = None
    if not rows.cache_files:  # datasets caches only what comes from its own files
        folder = Path(arguments.model.cache_dir or datasets.config.HF_DATASETS_CACHE) / "run_glue"
        folder.mkdir(parents=True, exist_ok=True)
        cache = str(folder / f"{rows._fingerprint}-{Hasher.hash(given)}.arrow")
    return rows.map(
        tokenize,
        batched=True,
        remove_columns=rows.column_names,
        features=Features(types),
        load_from_cache_file=not data.overwrite_cache,
        cache_file_name=cache,
        desc="Tokenizing",
        fn_kwargs=given,
    )


def tokenize(
    rows: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    max_length: int,
    pad: bool,
) -> dict[str, list[Any]]:
    """A batch of examples, for `Dataset.map`."""
    texts = [rows[column] for column in columns]
    return dict(tokenizer(*texts, padding="max_length" if pad else False, max_length=max_length, truncation=True))


def with_targets(tokens: Dataset, split: Split, labels: Labels) -> Dataset:
    """The tokens and, as `labels`, what the loss takes."""
    kept = range(len(split.rows)) if split.indices is None else split.indices
    targets = [labels.target(split.labels[row]) for row in kept[: len(tokens)]]
    kind = Value("float32" if labels.regression or labels.multi_label else "int64")
    return tokens.add_column("labels", targets, feature=ListOf(kind) if labels.multi_label else kind)
