#!/usr/bin/env python
"""Train, evaluate and pack a binary text classifier on a GLUE task, a dataset of the Hub, or files of your own.

    python scripts/run_glue.py --model_name_or_path google-bert/bert-base-uncased --task_name sst2 \
        --teacher_model_name_or_path textattack/bert-base-uncased-SST-2 --method surge --method_args "eta=0.1" \
        --do_train --do_eval --learning_rate 5e-4 --output_dir sst2-binary

The arguments are named as in transformers' example of this name; `--binarize none` trains the float model (a teacher).
What is written: the packed model, `checkpoint-N` folders (latent, to be resumed), `train_results.json`,
`eval_results.json`, `all_results.json`, `trainer_state.json`, `predict_results_TASK.txt`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from commandline import (
    Parser,
    check_packed_structure,
    checkpoint_to_resume,
    run,
    set_up_logging,
    user_errors,
)
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from errors import UsageError
from labels import (
    Labels,
    as_model_has_them,
    check_label_column,
    check_label_values,
    check_no_label_is_empty,
    check_same_order,
    labels_of_model,
    set_labels,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_bnn import BinaryBertConfig, BinaryBertForSequenceClassification, BinaryTrainer, BinaryTrainingArguments
from hf_bnn.allocator import keep_freed_memory
from hf_bnn.checked_trainer import CheckedTrainer
from hf_bnn.glue import GlueMetric

logger = logging.getLogger("run_glue")

GLUE = "nyu-mll/glue"
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
# Where nobody says which columns hold the text: the first of these that are all there.
USUAL_COLUMNS = (*dict.fromkeys(c for c in TASK_COLUMNS.values() if len(c) == 2), ("sentence",), ("text",))
FORMATS = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}  # file extension -> datasets' builder
STRINGS = ("string", "large_string")
STRUCTURE = ("binarize", "attention", "embeddings")


@dataclass
class DataTrainingArguments:
    """What the model is trained and evaluated on."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(TASK_COLUMNS)}."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the Hub, e.g. stanfordnlp/sst2."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per example; what is longer is cut off."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew."})
    pad_to_max_length: bool = field(
        default=True, metadata={"help": "Pad to max_seq_length; if False, to the longest example of each batch."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate the first N examples only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first N examples only."})
    train_file: str | None = field(default=None, metadata={"help": "csv, json, jsonl (these also .gz) or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Of the same kind as train_file."})
    test_file: str | None = field(default=None, metadata={"help": "For --do_predict; needs no labels."})
    label_column_name: str = field(
        default="label", metadata={"help": "The column of the labels: integers, strings, or floats for a regression."}
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


# The command line


def parse(command_line: list[str] | None = None) -> Arguments:
    """The arguments, checked as far as they can be without loading anything."""
    kinds = (ModelArguments, DataTrainingArguments, BinaryTrainingArguments)
    arguments = Arguments(*Parser(kinds, description=__doc__.splitlines()[0]).parse(command_line))
    check_data_arguments(arguments.data, arguments.training)
    check_model_arguments(arguments.model, arguments.training)
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


def check_files(data: DataTrainingArguments, training: BinaryTrainingArguments) -> None:
    """Raise UsageError unless the files that are needed are there, all of one kind."""
    if not data.files:
        raise UsageError(
            "no data: give --task_name (a GLUE task), --dataset_name (a dataset of the Hub), "
            "or --train_file and --validation_file"
        )
    needed = {"train": training.do_train, "validation": training.do_eval, "test": training.do_predict}
    for split, flag in {"train": "do_train", "validation": "do_eval", "test": "do_predict"}.items():
        if needed[split] and split not in data.files:
            raise UsageError(f"--{flag} needs --{split}_file; given: {', '.join(f'{s}_file' for s in data.files)}")
    kinds = {split: file_kind(split, path) for split, path in data.files.items()}
    first = next(iter(kinds))
    for split, kind in kinds.items():
        if kind != kinds[first]:
            raise UsageError(
                f"{split}_file {data.files[split]!r} is {kind}, but {first}_file {data.files[first]!r} is "
                f"{kinds[first]}: convert one of them, they must be of one kind"
            )


def file_kind(split: str, path: str) -> str:
    """The datasets builder that reads this file; raises UsageError if none does, or if it is missing."""
    suffixes = [s.lstrip(".").lower() for s in Path(path).suffixes]
    extension = next(iter(suffixes[-2:] if suffixes[-1:] == ["gz"] else suffixes[-1:]), "")
    if extension not in FORMATS or (extension == "parquet" and suffixes[-1] == "gz"):
        raise UsageError(
            f"{split}_file {path!r} is of no known kind: expected one of {', '.join(f'.{e}' for e in FORMATS)}, "
            "the text ones also with .gz"
        )
    if "://" not in path and not Path(path).is_file():
        raise UsageError(f"{split}_file {path!r} does not exist")
    return FORMATS[extension]


def check_model_arguments(model: ModelArguments, training: BinaryTrainingArguments) -> None:
    """Raise UsageError where --binarize none contradicts another argument."""
    if model.binarize == "none":
        for name in ("attention", "embeddings", "teacher_model_name_or_path"):
            if getattr(model, name) is not None:
                raise UsageError(f"--binarize none trains a plain float model: leave out --{name}")
        if training.method != "ste" or training.method_args is not None:
            raise UsageError("--binarize none trains a plain float model: leave out --method and --method_args")
    if model.teacher_model_name_or_path is None:
        try:
            training.check_teacher_is_named("--teacher_model_name_or_path")
        except ValueError as error:
            raise UsageError(str(error)) from error


# The data


def load_data(arguments: Arguments) -> DatasetDict:
    """The splits by name, as the Hub or the files name them."""
    model, data = arguments.model, arguments.data
    hub = {"cache_dir": model.cache_dir, "token": model.token}
    if data.task_name is not None:
        found = load_dataset(GLUE, data.task_name, **hub)
    elif data.dataset_name is not None:
        found = load_dataset(data.dataset_name, data.dataset_config_name, **hub)
    else:
        for split, path in data.files.items():
            logger.info(f"{split}: {path}")
        kind = file_kind(*next(iter(data.files.items())))
        # Each file by itself: a test file has no labels, and one call would demand the same columns of all.
        files = data.files.items()
        found = DatasetDict({split: load_dataset(kind, data_files=f, split="train", **hub) for split, f in files})
    for wanted, splits in used_splits(arguments).items():
        missing = [split for split in splits if split not in found]
        if missing:
            raise UsageError(f"--{wanted} needs a split {missing[0]!r}; the dataset has: {', '.join(found)}")
    return found


def used_splits(arguments: Arguments) -> dict[str, tuple[str, ...]]:
    """The names of the splits that each of do_train, do_eval and do_predict works on."""
    ends = ("_matched", "_mismatched") if arguments.data.task_name == "mnli" else ("",)
    splits = {
        "do_train": ("train",),
        "do_eval": tuple(f"validation{end}" for end in ends),
        "do_predict": tuple(f"test{end}" for end in ends),
    }
    return {flag: names for flag, names in splits.items() if getattr(arguments.training, flag)}


def labelled_splits(arguments: Arguments) -> list[str]:
    """The splits whose labels are used."""
    return [split for flag, names in used_splits(arguments).items() if flag != "do_predict" for split in names]


def text_columns(data: DataTrainingArguments, found: Dataset) -> tuple[str, ...]:
    """The one or two columns that hold the text."""
    columns = found.column_names
    if data.text_column_names is not None:
        chosen = tuple(name.strip() for name in data.text_column_names.split(","))
        unknown = [name for name in chosen if name not in columns]
        if unknown or len(chosen) > 2:
            what = f"there is no column {unknown[0]!r}" if unknown else "at most two columns can be read"
            raise UsageError(f"text_column_names={data.text_column_names!r}: {what}; columns: {', '.join(columns)}")
        return chosen
    if data.task_name is not None:
        return TASK_COLUMNS[data.task_name]
    is_text = {
        name: getattr(kind, "dtype", None) in ("string", "large_string") for name, kind in found.features.items()
    }
    texts = [name for name in columns if is_text[name] and name != data.label_column_name]
    for usual in USUAL_COLUMNS:
        if set(usual) <= set(texts):
            return usual
    if len(texts) not in (1, 2):
        raise UsageError(
            f"cannot tell which columns hold the text; columns: {', '.join(columns)}: "
            "name one, or two separated by a comma, in --text_column_names"
        )
    return tuple(texts)


def check_labels(name: str, split: str, found: Dataset) -> None:
    """Raise UsageError unless every row of the split has a label."""
    kinds = ("int", "uint", "bool", "float", *STRINGS)
    check_label_column(name, split, found, kinds, "one integer, string or float per row")
    check_no_label_is_empty(name, split, found[name][:])


def is_regression(task: str | None, column: Any) -> bool:
    """Whether labels of this type are numbers to be predicted."""
    return task == "stsb" or (task is None and getattr(column, "dtype", "").startswith("float"))


def read_labels(arguments: Arguments, found: DatasetDict, config: PreTrainedConfig) -> Labels:
    """Which labels the data has and which classes of the model they are. Raises UsageError for those that do not fit.

    They are what the dataset declares, else those of the training set, else (only to evaluate) the model's own.
    """
    used, column, trained = labelled_splits(arguments), arguments.data.label_column_name, has_trained_head(config)
    if not used:  # only to predict: the model knows its classes
        names = [config.id2label[i] for i in range(config.num_labels)]
        return Labels(names, {}, config.num_labels == 1)
    for split in used:
        check_labels(column, split, found[split])
    kind = found[used[0]].features[column]
    if is_regression(arguments.data.task_name, kind):
        labels = Labels([], {}, True)
    elif isinstance(kind, ClassLabel):
        labels = Labels(list(kind.names), {index: index for index in range(kind.num_classes)})
    elif "train" not in found and trained:
        labels = labels_of_model(config, kind.dtype)
    else:
        if "train" in found and "train" not in used:
            check_labels(column, "train", found["train"])
        values = sorted(found["train" if "train" in found else used[0]].unique(column))
        labels = Labels([str(value) for value in values], {value: index for index, value in enumerate(values)})
    if trained and not arguments.model.ignore_mismatched_sizes:
        labels = as_model_has_them(labels, config, arguments.model.model_name_or_path)
    for split in used:
        check_label_values(labels, split, found[split][column][:])
    return labels


def has_trained_head(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint of this config is a classifier already."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def tokenize(
    rows: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    max_length: int,
    pad: bool,
    label_column: str | None,
    classes: dict[Any, int],
) -> dict[str, list[Any]]:
    """A batch of examples, for `Dataset.map`: token ids, and the model's classes as `label`."""
    for column in columns:
        for index, text in zip(indices, rows[column], strict=True):
            if not isinstance(text, str):
                raise UsageError(f"row {index} has no text in the column {column!r} (it is {text!r}): fill or drop it")
    texts = [rows[column] for column in columns]
    result = dict(tokenizer(*texts, padding="max_length" if pad else False, max_length=max_length, truncation=True))
    if label_column is not None:
        values = rows[label_column]
        result["label"] = [classes[value] for value in values] if classes else [float(value) for value in values]
    return result


def prepare(
    arguments: Arguments, found: DatasetDict, labels: Labels, tokenizer: PreTrainedTokenizerBase, longest: int
) -> dict[str, Dataset]:
    """The tokenized splits that are used, by name."""
    data, training = arguments.data, arguments.training
    max_length = min(data.max_seq_length, longest)
    if max_length < data.max_seq_length:
        logger.warning(f"max_seq_length={data.max_seq_length} is more than the model takes: {max_length} is used")
    limits = {
        "do_train": data.max_train_samples,
        "do_eval": data.max_eval_samples,
        "do_predict": data.max_predict_samples,
    }
    result = {}
    for flag, splits in used_splits(arguments).items():
        for split in splits:
            rows = found[split]
            if limits[flag] is not None:
                rows = rows.select(range(min(len(rows), limits[flag])))
            columns = text_columns(data, rows)
            logger.info(f"{split}: {len(rows)} examples, text from {', '.join(columns)}")
            with training.main_process_first(desc=f"tokenizing {split}"):
                result[split] = rows.map(
                    tokenize,
                    batched=True,
                    with_indices=True,
                    remove_columns=rows.column_names,
                    load_from_cache_file=not data.overwrite_cache,
                    desc=f"Tokenizing {split}",
                    fn_kwargs={
                        "tokenizer": tokenizer,
                        "columns": columns,
                        "max_length": max_length,
                        "pad": data.pad_to_max_length,
                        "label_column": None if flag == "do_predict" else data.label_column_name,
                        "classes": labels.classes,
                    },
                )
    return result


# The models


def load_config(arguments: Arguments) -> PreTrainedConfig:
    """The config of the checkpoint as it is."""
    model = arguments.model
    name = model.config_name or model.model_name_or_path
    with user_errors(name):
        return AutoConfig.from_pretrained(name, revision=model.model_revision, **model.hub)


def load_model(arguments: Arguments, stored: PreTrainedConfig, labels: Labels) -> PreTrainedModel:
    """The model with the head that the labels need: float if `--binarize none`, else latent, or packed as it is.

    In float32 whatever the checkpoint's type: updates of latent weights are far smaller than bfloat16's steps.
    """
    model = arguments.model
    loading = {
        "revision": model.model_revision,
        "dtype": torch.float32,
        "ignore_mismatched_sizes": model.ignore_mismatched_sizes,
        **model.hub,
    }
    set_labels(stored, labels)
    if model.binarize == "none":
        if isinstance(stored, BinaryBertConfig):
            raise UsageError(
                f"{model.model_name_or_path} is a binary checkpoint, which --binarize none cannot make float: "
                "leave the argument out, or start from a float checkpoint"
            )
        kind = AutoModelForSequenceClassification
        return kind.from_pretrained(model.model_name_or_path, config=stored, **loading)
    kind, name = BinaryBertForSequenceClassification, model.config_name or model.model_name_or_path
    config = BinaryBertConfig.from_pretrained(name, **model.structure, revision=model.model_revision, **model.hub)
    set_labels(config, labels)
    check_packed_structure(model.model_name_or_path, model.structure, stored)
    return kind.from_pretrained(model.model_name_or_path, config=config, **loading)


def load_teacher(arguments: Arguments, student: PreTrainedConfig) -> PreTrainedModel | None:
    """The teacher, if one is named and there is training to do. Raises UsageError if it cannot teach this student."""
    name = arguments.model.teacher_model_name_or_path
    if name is None or not arguments.training.do_train:
        return None
    with user_errors(name):
        config = AutoConfig.from_pretrained(name, **arguments.model.hub)
    what = f"the teacher {name}"
    if not has_trained_head(config):
        raise UsageError(f"{what} is no trained classifier ({config.architectures}): train one with --binarize none")
    check_same_order(what, config, student)
    if config.vocab_size != student.vocab_size:
        raise UsageError(
            f"{what} has {config.vocab_size} tokens in its vocabulary, the student {student.vocab_size}: "
            "both must use the same tokenizer"
        )
    if config.hidden_size != student.hidden_size and arguments.training.distillation_hidden_weight > 0:
        raise UsageError(
            f"{what} has hidden states of {config.hidden_size}, the student of {student.hidden_size}: "
            "they can only be compared by their logits, with --distillation_hidden_weight 0"
        )
    return AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, **arguments.model.hub)


# The run


class Metrics:
    """`compute_metrics` for Trainer: the task's, else accuracy, or for a regression the error and correlations."""

    def __init__(self, task: str | None, regression: bool):
        self.task, self.regression = task, regression
        self.metric = GlueMetric(task or ("stsb" if regression else "sst2"))

    def __call__(self, outputs: EvalPrediction) -> dict[str, float]:
        values = predicted(outputs.predictions, self.regression)
        scores = self.metric.compute(predictions=values, references=outputs.label_ids)
        if self.task is None and self.regression:
            scores = {"mse": float(((values - outputs.label_ids) ** 2).mean()), **scores}
        elif len(scores) > 1:
            scores["combined_score"] = float(np.mean(list(scores.values())))
        return scores


def predicted(logits: np.ndarray | tuple[np.ndarray, ...], regression: bool) -> np.ndarray:
    """Classes, or for a regression numbers, `(n,)`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits[:, 0] if regression else logits.argmax(1)


def make_trainer(
    arguments: Arguments, model: PreTrainedModel, splits: dict[str, Dataset], labels: Labels, **kwargs: Any
) -> CheckedTrainer:
    """BinaryTrainer; CheckedTrainer where nothing binary is trained: a float model, or a packed one to evaluate."""
    data, training = arguments.data, arguments.training
    packed = getattr(model.config, "weight_format", None) == "packed"
    if packed and not training.do_train and (training.fp16 or training.bf16):
        raise UsageError("a binary model is evaluated in float32: leave out --fp16 and --bf16")
    teacher = load_teacher(arguments, model.config)
    kind = CheckedTrainer
    if arguments.model.binarize != "none" and (training.do_train or not packed):
        kind, kwargs = BinaryTrainer, {**kwargs, "teacher_model": teacher}
    if data.pad_to_max_length:
        collator = default_data_collator
    else:
        multiple = 8 if training.fp16 or training.bf16 else None
        collator = DataCollatorWithPadding(kwargs["processing_class"], pad_to_multiple_of=multiple)
    evaluated = [rows for name, rows in splits.items() if name.startswith("validation")]
    trainer = kind(
        model=model,
        args=training,
        train_dataset=splits.get("train"),
        eval_dataset=evaluated[0] if evaluated else None,
        compute_metrics=Metrics(data.task_name, labels.regression),
        data_collator=collator,
        **kwargs,
    )
    # BERT's head ignores num_items_in_batch: with accumulation the float model's gradient too would be a multiple.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def train(trainer: CheckedTrainer) -> dict[str, float]:
    """Train, save the final model and write train_results.json."""
    result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args, logger))
    metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def evaluate(trainer: CheckedTrainer, splits: dict[str, Dataset]) -> dict[str, float]:
    """Evaluate every validation split and write eval_results.json; MNLI's second split has keys that end in _mm."""
    combined: dict[str, float] = {}
    for split in (name for name in splits if name.startswith("validation")):
        metrics = {**trainer.evaluate(eval_dataset=splits[split]), "eval_samples": len(splits[split])}
        if split.endswith("_mismatched"):
            metrics = {f"{name}_mm": value for name, value in metrics.items()}
        trainer.log_metrics("eval", metrics)
        combined.update(metrics)
    trainer.save_metrics("eval", combined)
    return combined


def predict(trainer: CheckedTrainer, splits: dict[str, Dataset], task: str | None, labels: Labels) -> None:
    """Write the predictions for every test split to predict_results_TASK.txt."""
    for split in (name for name in splits if name.startswith("test")):
        logits = trainer.predict(splits[split], metric_key_prefix="predict").predictions
        if not trainer.is_world_process_zero():
            continue
        name = "_".join(filter(None, ["predict_results", task])) + ("-mm" if split.endswith("_mismatched") else "")
        values = predicted(logits, labels.regression)
        texts = [f"{value:.3f}" if labels.regression else labels.names[value] for value in values]
        lines = [f"{index}\t{text}\n" for index, text in enumerate(texts)]
        path = Path(trainer.args.output_dir) / f"{name}.txt"
        path.write_text("index\tprediction\n" + "".join(lines), encoding="utf-8")
        logger.info(f"{len(lines)} predictions of {split} in {path}")


def card_fields(arguments: Arguments) -> dict[str, str]:
    """What the model card says of the model. A run that was cut short by --max_steps claims no result."""
    data, training = arguments.data, arguments.training
    fields = {"finetuned_from": arguments.model.model_name_or_path, "tasks": "text-classification"}
    if training.max_steps > 0:
        name = (training.hub_model_id or Path(training.output_dir).resolve().name).split("/")[-1]
        fields["model_name"] = f"{name} (stopped after {training.max_steps} steps: its figures are no result)"
    elif data.task_name is not None:
        glue = {"dataset_tags": "glue", "dataset_args": data.task_name, "dataset": f"GLUE {data.task_name.upper()}"}
        fields.update(language="en", **glue)
    elif data.dataset_name is not None:
        fields.update(dataset_tags=data.dataset_name, dataset=data.dataset_name)
    return fields


def main(command_line: list[str] | None = None) -> dict[str, float]:
    """Run the script on these arguments (None: the command line's); return what all_results.json holds.

    Raises UsageError, a ValueError, for what the user can set right.
    """
    arguments = parse(command_line)
    model_arguments, data, training = arguments
    set_up_logging(training, logger)
    if training.device.type == "cpu":
        keep_freed_memory()
    set_seed(training.seed)
    with user_errors():
        found = load_data(arguments)
        config = load_config(arguments)
        labels = read_labels(arguments, found, config)
        tokenizer = AutoTokenizer.from_pretrained(
            model_arguments.tokenizer_name or model_arguments.model_name_or_path,
            use_fast=model_arguments.use_fast_tokenizer,
            revision=model_arguments.model_revision,
            **model_arguments.hub,
        )
        model = load_model(arguments, config, labels)
        positions = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        longest = min(tokenizer.model_max_length, positions)
        splits = prepare(arguments, found, labels, tokenizer, longest)
        trainer = make_trainer(arguments, model, splits, labels, processing_class=tokenizer)
    metrics: dict[str, float] = {}
    if training.do_train:
        metrics.update(train(trainer))
    if training.do_eval:
        metrics.update(evaluate(trainer, splits))
    if training.do_predict:
        predict(trainer, splits, data.task_name, labels)
    if training.do_train:
        publish = trainer.push_to_hub if training.push_to_hub else trainer.create_model_card
        publish(**card_fields(arguments))
    return metrics


def _mp_fn(index: int) -> None:
    """What xla_spawn calls on each TPU core."""
    main()


if __name__ == "__main__":
    run(main)
