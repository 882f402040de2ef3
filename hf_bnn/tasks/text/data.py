"""Loads the splits of a text run: from GLUE, a dataset of the Hub, or files."""

from __future__ import annotations

import logging

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedConfig

from ..errors import UsageError
from ..labels import Labels
from .arguments import Arguments, file_kind
from .files import read_table
from .labels import read_labels
from .rows import Split, from_dataset, from_table, without_faults

logger = logging.getLogger(__name__)

GLUE = "nyu-mll/glue"


def used_splits(arguments: Arguments) -> dict[str, tuple[str, ...]]:
    """The splits that do_train, do_eval and do_predict each use, by flag."""
    ends = ("_matched", "_mismatched") if arguments.data.task_name == "mnli" else ("",)
    splits = {
        "do_train": ("train",),
        "do_eval": tuple(f"validation{end}" for end in ends),
        "do_predict": tuple(f"test{end}" for end in ends),
    }
    return {flag: names for flag, names in splits.items() if getattr(arguments.training, flag)}


def load_data(arguments: Arguments, config: PreTrainedConfig) -> tuple[dict[str, Split], Labels]:
    """The splits that the run uses, without unusable rows, and their labels.

    Raises UsageError for a missing or empty split, and for rows with faults unless --drop_empty_rows allows them.
    """
    used = used_splits(arguments)
    labelled = {name for flag, names in used.items() if flag != "do_predict" for name in names}
    wanted = {name: name in labelled for names in used.values() for name in names}
    data = arguments.data
    if data.task_name is None and data.dataset_name is None:
        if labelled and data.train_file is not None:
            wanted["train"] = True  # it defines the labels
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
    """Raise UsageError if the run uses a split that the dataset lacks."""
    for flag, names in used.items():
        missing = [name for name in names if name not in found]
        if missing:
            raise UsageError(f"--{flag} needs a split {missing[0]!r}; the dataset has: {', '.join(found)}")


def load_file(arguments: Arguments, name: str, labelled: bool) -> Split:
    """The split of this name, read from its file."""
    data, model = arguments.data, arguments.model
    path = data.files[name]
    kind = file_kind(name, path)
    logger.info(f"{name}: {path}")
    if kind != "parquet":
        return from_table(name, path, read_table(path, kind), data, labelled)
    # One file per call: a test file has no labels, but files in one call must have the same columns.
    hub = {"cache_dir": model.cache_dir, "token": model.token}
    try:
        rows = load_dataset("parquet", data_files=path, split="train", **hub)
    except (ValueError, DatasetsError) as error:
        raise UsageError(f"{path} holds no row, or is no parquet file: {error.__cause__ or error}") from error
    return from_dataset(name, path, rows, data, labelled)
