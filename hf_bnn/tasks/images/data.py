"""Loads the splits of an image run: from the Hub, a dataset on disk, folders of images, or a stream."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers import PreTrainedConfig

from ..errors import UsageError, shown
from ..labels import Labels, check_label_column
from .arguments import Arguments, DataTrainingArguments
from .labels import read_labels

logger = logging.getLogger(__name__)

Splits = dict[
    str, Any
]  # "train", "validation" and "test" (without labels) -> Dataset, or an IterableDataset for a stream
EXTENSIONS = tuple(ImageFolder.EXTENSIONS)


def load_data(arguments: Arguments, config: PreTrainedConfig) -> tuple[Splits, Labels]:
    """The splits that the run uses, and their labels. Raises UsageError for a missing split or labels that do not fit.

    `config`: that of the model to be trained, which may already know its labels.
    """
    splits = load_splits(arguments)
    return splits, read_labels(arguments, splits, config)


def load_splits(arguments: Arguments) -> Splits:
    """The splits that the run uses, by their use. Raises UsageError for a missing one."""
    data, training = arguments.data, arguments.training
    folder = {}
    if training.do_predict and data.test_dir is not None:
        folder["test"] = limited(load_folder(data.test_dir), data.max_predict_samples, None)
    if not (training.do_train or training.do_eval) and folder:
        return folder
    found = load_all_splits(arguments)
    wanted = {}
    if training.do_train:
        wanted["train"] = ("do_train", "train")
    if training.do_eval:
        wanted["validation"] = ("do_eval", data.validation_split_name or "validation")
    if training.do_predict and not folder:
        wanted["test"] = ("do_predict", data.test_split_name)
    if data.train_val_split is not None and "train" in found:
        column = data.label_column_name
        check_label_column(
            column, "train", found["train"], ("int", "uint", "bool", "string", "large_string"), "classes"
        )
        stratified = column if isinstance(found["train"].features[column], ClassLabel) else None
        cut = found["train"].train_test_split(data.train_val_split, seed=training.seed, stratify_by_column=stratified)
        found = {**found, "train": cut["train"], data.validation_split_name or "validation": cut["test"]}
    for flag, split in wanted.values():
        check_split_name(flag, split, found)
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    seeds = {"train": training.seed, "validation": training.seed, "test": None}
    used = {use: limited(found[split], limits[use], seeds[use]) for use, (_, split) in wanted.items()}
    for use, rows in used.items():
        if isinstance(rows, Dataset) and not len(rows):
            raise UsageError(f"the {use} data holds no row: name another split or dataset")
    return {**used, **folder}


def check_split_name(flag: str, split: str, found: Splits) -> None:
    """Raise UsageError if the dataset lacks the split that this argument needs."""
    if split in found:
        return
    others = [name for name in found if name != "train"]
    argument = "--test_split_name" if flag == "do_predict" else "--validation_split_name"
    choose = f"name another one in {argument} ({', '.join(others)})" if others else ""
    cuttable = flag == "do_eval" and "train" in found
    cut = "cut one off the training data with --train_val_split 0.1" if cuttable else ""
    other = "choose another dataset"
    ways = [] if flag == "do_train" else list(filter(None, [choose, cut]))
    raise UsageError(
        f"--{flag} needs a split {split!r}; the dataset has: {', '.join(found)}: {' or '.join(ways) or other}"
    )


def load_folder(name: str) -> Dataset:
    """The images in a folder and its subfolders, sorted by name, without labels."""
    folder = Path(name)
    if not folder.is_dir():
        raise UsageError(f"test_dir {name!r} is no folder")
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise UsageError(f"test_dir {name!r} holds no image: expected files like {', '.join(EXTENSIONS[:3])}, ...")
    return Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())


def limited(rows: Any, count: int | None, seed: int | None) -> Any:
    """`count` rows, drawn by seed, since folders of images are sorted by class. None: all rows.

    Without a seed, or from a stream, these are the first rows.
    """
    if count is None:
        return rows
    if isinstance(rows, Dataset) and seed is None:
        return rows.select(range(min(len(rows), count)))
    if isinstance(rows, Dataset):
        return rows.shuffle(seed=seed).select(range(min(len(rows), count)))
    return rows.take(count)


def load_all_splits(arguments: Arguments) -> DatasetDict | IterableDatasetDict:
    """All splits, with the names that the Hub, the folder or the files give them."""
    model, data = arguments.model, arguments.data
    hub = {"cache_dir": model.cache_dir, "token": model.token, "streaming": data.streaming}
    if data.dataset_name is None:
        folders = {"train": data.train_dir, "validation": data.validation_dir}
        folders = {split: folder for split, folder in folders.items() if folder is not None}
        check_class_folders(folders)
        files = {split: str(Path(folder) / "**") for split, folder in folders.items()}
        return load_dataset("imagefolder", data_files=files, drop_labels=False, **hub)
    saved = Path(data.dataset_name)
    if (saved / "dataset_dict.json").is_file() and not data.streaming:
        return load_from_disk(str(saved))
    try:
        return load_dataset(data.dataset_name, data.dataset_config_name, **hub)
    except ValueError as error:
        raise UsageError(f"{data.dataset_name}: {error}") from error


def check_class_folders(folders: dict[str, str]) -> None:
    """Raise UsageError unless every class folder holds images, and validation has no class that training lacks."""
    classes = {}
    for split, name in folders.items():
        folder = Path(name)
        if not folder.is_dir():
            raise UsageError(f"{split}_dir {name!r} is no folder")
        if next(folder.glob("metadata.*"), None) or next(folder.glob("*.zip"), None):
            return
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
        if not subfolders:
            raise UsageError(f"{split}_dir {name!r} has no folders in it: expected one for each class, with its images")
        for subfolder in subfolders:
            if not any(path.suffix.lower() in EXTENSIONS for path in subfolder.rglob("*")):
                raise UsageError(f"the class folder {str(subfolder)!r} holds no image: fill it, or delete it")
        classes[split] = {path.name for path in subfolders}
    alone = sorted(classes.get("validation", set()) - classes.get("train", classes.get("validation", set())))
    if alone:
        raise UsageError(
            f"validation_dir {folders['validation']!r} has the class {alone[0]!r}, which train_dir "
            f"{folders['train']!r} has not ({shown(sorted(classes['train']))}): the classes must be the same"
        )


def image_column(data: DataTrainingArguments, rows: Any) -> str:
    """The column that holds the images."""
    features = features_of(rows)
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    name = data.image_column_name
    if name is None and len(images) == 1:
        return images[0]
    if name not in images:
        what = f"image_column_name={name!r}: " if name is not None else ""
        those = f"those with images: {', '.join(images)}" if images else "none of them holds images"
        raise UsageError(
            f"{what}cannot tell which column holds the images; columns: {', '.join(features)} ({those}): "
            "name one in --image_column_name"
        )
    return name


def features_of(rows: Any) -> datasets.Features:
    """The columns and their types. Those of a stream may have to be read from its first rows."""
    return rows.features or rows._resolve_features().features
