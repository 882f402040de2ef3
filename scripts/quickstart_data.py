"""The sentences of quickstart.py: loaded, split and tokenized, and altered copies of them."""

from __future__ import annotations

from pathlib import Path
from random import Random

from datasets import Dataset, concatenate_datasets, load_dataset

from hf_bnn.tasks.quickstart_results import HELD_OUT, MAX_LENGTH

DATA = Path(__file__).parent / "data" / "rotten_tomatoes.jsonl.gz"
DROPPED_WORDS = 0.15  # the fraction of words that an altered sentence lacks


def load_sentences(tokenizer, seed: int) -> tuple[Dataset, Dataset]:
    """The training and the held-out sentences, tokenized."""
    data = load_dataset("json", data_files=str(DATA), split="train").shuffle(seed=seed)
    data = data.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=MAX_LENGTH),
        batched=True,
        remove_columns="text",
        desc="tokenize",
    ).rename_column("label", "labels")
    return data.select(range(HELD_OUT, len(data))), data.select(range(HELD_OUT))


def altered(sentences: Dataset, copies: int, seed: int) -> Dataset:
    """The sentences, and `copies` altered copies of each: with words left out, or with the end of another sentence.

    The copies are for distillation, where the teacher labels them. With the 7,530 original sentences alone, the binary
    model memorizes them long before it has learned everything that the teacher knows.
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
