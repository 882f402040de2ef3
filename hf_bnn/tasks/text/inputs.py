"""Tokenizes the splits of a text run for Trainer."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import UsageError
from ..labels import Labels
from ..stages import PreparedSplit
from .arguments import Arguments, ModelArguments
from .data import used_splits
from .rows import Split

logger = logging.getLogger(__name__)

USUAL_LENGTH = 128
SHORT_INTEGERS = ("attention_mask", "token_type_ids", "special_tokens_mask")


def load_tokenizer(model: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that the arguments name, else that of the model."""
    name = model.tokenizer_name or model.model_name_or_path
    fast = model.use_fast_tokenizer
    return AutoTokenizer.from_pretrained(name, use_fast=fast, revision=model.model_revision, **model.hub)


def make_datasets(
    arguments: Arguments,
    splits: dict[str, Split],
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
) -> dict[str, PreparedSplit]:
    """The splits, tokenized, as Trainer takes them. `config`: the model's, which limits the number of tokens."""
    data, training = arguments.data, arguments.training
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    longest = min(tokenizer.model_max_length, positions)
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
            result[name] = PreparedSplit(tokens, partial(identifying_columns, rows, split))
    return result


def identifying_columns(rows: Dataset, split: Split) -> dict[str, Any]:
    """The columns that identify each row in a table of predictions: its number, its line in a file, its texts."""
    count = len(rows)
    indices = np.arange(count) if split.indices is None else split.indices[:count]
    lines = {} if split.lines is None else {"line": [split.lines[index] for index in indices]}
    return {"index": indices, **lines, **{column: rows[column][:] for column in split.texts}}


def tokenized(
    arguments: Arguments,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    max_length: int,
) -> Dataset:
    """The rows with token ids in place of their texts. Reads them from the cache if it has them."""
    data = arguments.data
    given = {"tokenizer": tokenizer, "columns": columns, "max_length": max_length, "pad": data.pad_to_max_length}
    # Without declared types, a new column takes the type of an old one of the same name: numbers become strings.
    names = tokenizer(*(["a"] for _ in columns))
    types = {name: ListOf(Value("int8" if name in SHORT_INTEGERS else "int32")) for name in names}
    cache = None
    if not rows.cache_files:  # datasets only caches rows that come from its own files
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
    """Tokenizes a batch of examples, for `Dataset.map`."""
    texts = [rows[column] for column in columns]
    return dict(tokenizer(*texts, padding="max_length" if pad else False, max_length=max_length, truncation=True))


def with_targets(tokens: Dataset, split: Split, labels: Labels) -> Dataset:
    """The tokens with the loss's targets as the column `labels`."""
    kept = range(len(split.rows)) if split.indices is None else split.indices
    targets = [labels.target(split.labels[row]) for row in kept[: len(tokens)]]
    kind = Value("float32" if labels.regression or labels.multi_label else "int64")
    return tokens.add_column("labels", targets, feature=ListOf(kind) if labels.multi_label else kind)
