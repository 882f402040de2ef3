"""The input of run_glue.py: files of every kind, their faults by line, and the labels in them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import List as ListOf
from transformers import BertConfig, BertTokenizer

from hf_bnn.models.bert import BinaryBertConfig
from hf_bnn.tasks.labels import Labels
from hf_bnn.tasks.text import data as text_data
from hf_bnn.tasks.text.arguments import Arguments, parse
from hf_bnn.tasks.text.data import load_data
from hf_bnn.tasks.text.files import read_table
from hf_bnn.tasks.text.inputs import tokenized, with_targets

WORDS = ["good film", "dull film", "fine plot", "bad plot"]
ENDINGS = ["csv", "csv.gz", "json", "jsonl", "parquet"]


def write(path: Path, texts: list[Any], labels: list[Any]) -> Path:
    """A file of the kind that its name says."""
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif ".csv" in path.name:
        content = "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines))
    return path


def arguments(tmp_path: Path, *given: object, do: tuple[str, ...] = ("train", "eval")) -> Arguments:
    """The script's arguments for some files, of training and evaluation unless a test says what to do."""
    rest = ["--model_name_or_path", "none", "--output_dir", tmp_path / "out", "--use_cpu", "--report_to", "none"]
    rest += ["--cache_dir", tmp_path / "cache", *(f"--do_{what}" for what in do)]
    return parse([str(text) for text in (*given, *rest)])


def read(tmp_path: Path, train: Path, validation: Path | None = None, *given: object, config: Any = None) -> Any:
    """The splits of two files, the same one twice if only one is given, and their labels."""
    named = ["--train_file", train, "--validation_file", validation or train, *given]
    return load_data(arguments(tmp_path, *named), config or BertConfig())


def refused(message: str, tmp_path: Path, *given: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, *given)
    assert "\n" not in str(error.value)


LABELS = {
    "words": (["pos", "neg", "pos", "neg"], ["neg", "pos"], [1, 0, 1, 0]),
    "integers": ([3, 7, 3, 7], ["3", "7"], [0, 1, 0, 1]),
    "booleans": ([True, False, True, False], ["False", "True"], [1, 0, 1, 0]),
    "floats": ([0.5, 1.5, 2.0, -1.0], [], [0.5, 1.5, 2.0, -1.0]),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_type_are_read_from_files_of_every_kind(tmp_path: Path, kind: str, ending: str):
    values, names, targets = LABELS[kind]
    splits, labels = read(tmp_path, write(tmp_path / f"data.{ending}", WORDS, values))
    assert labels.names == names
    assert labels.regression == (kind == "floats")
    assert [labels.target(value) for value in splits["train"].labels] == targets
    assert splits["train"].rows["text"][:] == WORDS


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("labels", [[["b", "a"], ["c"], [], ["a"]], [[2, 1], [3], [], [1]]], ids=["words", "integers"])
def test_lists_of_labels_are_several_labels_that_hold(tmp_path: Path, labels: list[Any], ending: str):
    splits, found = read(tmp_path, write(tmp_path / f"data.{ending}", WORDS, labels))
    assert found.problem_type == "multi_label_classification"
    assert found.names == sorted({str(label) for row in labels for label in row})
    targets = [found.target(value) for value in splits["train"].labels]
    assert targets == [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_each_file_may_be_of_another_kind_and_write_its_labels_otherwise(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", WORDS, ["1", "2", "1", "2"])
    splits, labels = read(tmp_path, train, write(tmp_path / "validation.csv", WORDS, [2, 1, 2, 1]))
    assert [labels.target(value) for value in splits["validation"].labels] == [1, 0, 1, 0]
    splits, labels = read(tmp_path, write(tmp_path / "train.csv", WORDS, [1, 2, 1, 2]), train)
    assert [labels.target(value) for value in splits["validation"].labels] == [0, 1, 0, 1]


def test_the_type_of_labels_can_be_told(tmp_path: Path):
    data = write(tmp_path / "data.csv", WORDS, [1.0, 2.0, 1.0, 2.0])
    assert read(tmp_path, data)[1].regression
    assert read(tmp_path, data, None, "--label_type", "class")[1].names == ["1.0", "2.0"]
    for ending in ("csv", "jsonl", "parquet"):
        data = write(tmp_path / f"stars.{ending}", WORDS, [1, 2, 1, 2])
        assert read(tmp_path, data, None, "--label_type", "number")[1].regression


def test_labels_that_a_dataset_declares_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ClassLabel(names=["z", "a"])
    for feature, label, target in ((names, 1, 1), (ListOf(names), [0], [1.0, 0.0])):
        features = Features({"text": Value("large_string"), "label": feature})
        rows = Dataset.from_dict({"text": WORDS, "label": [label] * 4}, features=features)
        monkeypatch.setattr(text_data, "load_dataset", lambda *_, rows=rows, **__: {"train": rows})
        given = arguments(tmp_path, "--dataset_name", "x", do=("train",))
        splits, labels = load_data(given, BertConfig())
        assert labels.names == ["z", "a"]
        assert labels.target(splits["train"].labels[0]) == target


def test_words_that_pandas_takes_for_nothing_are_words(tmp_path: Path):
    texts = ["NA", "null", "None", "nan"]
    splits, labels = read(tmp_path, write(tmp_path / "data.csv", texts, ["null", "none", "null", "none"]))
    assert splits["train"].rows["text"][:] == texts
    assert labels.names == ["none", "null"]


# Faults


CSV = 'text,label\n"a film\nof two lines",pos\n\n"a, comma",neg\n,pos\n  ,neg\nplot,\ngood,film,neg\nfine\nend,pos\n'


def test_all_faults_of_a_csv_are_told_at_once_by_line(tmp_path: Path):
    (tmp_path / "data.csv").write_text(CSV)
    refused(
        r"data.csv \(5 of 8 rows\): line 6 has no text in 'text', line 7 has no text in 'text', line 8 has no 'label', "
        r"line 9 has 3 fields, the header 2 \(a text with commas needs quotes\), line 10 has no 'label': correct these",
        tmp_path,
        tmp_path / "data.csv",
    )
    splits, _ = read(tmp_path, tmp_path / "data.csv", None, "--drop_empty_rows")
    assert splits["train"].indices.tolist() == [0, 1, 7]
    assert [splits["train"].lines[row] for row in splits["train"].indices] == [2, 5, 11]


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_lines_are_those_of_an_editor_whatever_ends_them(tmp_path: Path, end: str):
    (tmp_path / "data.csv").write_bytes(b"\xef\xbb\xbf" + CSV.replace("\n", end).encode())
    table = read_table(str(tmp_path / "data.csv"), "csv")
    assert table.lines == [2, 5, 6, 7, 8, 9, 10, 11]
    assert table.columns["text"][0].split() == ["a", "film", "of", "two", "lines"]


JSON_LINES = """{"text": "a", "label": "pos"}

{"text": 5, "label": "neg"}
{"text": "b", "label": 7}
[1, 2]
{"text": "c", "label": "pos"
{"text": "d",
 "label": null}
{"label": "neg"}
{"text": "e", "label": "neg"}
"""


def test_all_faults_of_a_json_file_are_told_at_once_by_line(tmp_path: Path):
    (tmp_path / "data.jsonl").write_text(JSON_LINES)
    refused(
        r"data.jsonl \(6 of 8 rows\): line 3 has no text in 'text' \(but 5\), "
        r"line 4 has the 'label' 7, but most are strings \(--label_type class takes each as it is written\), "
        r"line 5 holds \[1, 2\]: expected an object.*, line 6 holds no json \(.*\).*, line 7 has no 'label', "
        r"line 9 has no text in 'text': correct",
        tmp_path,
        tmp_path / "data.jsonl",
    )
    splits, _ = read(tmp_path, tmp_path / "data.jsonl", None, "--drop_empty_rows")
    assert splits["train"].indices.tolist() == [0, 7]


def test_a_list_of_objects_has_lines_too(tmp_path: Path):
    (tmp_path / "a.json").write_text('[\n  {"text": "a",\n   "label": 0},\n  {"text": "b", "label": 1}\n]\n')
    assert read_table(str(tmp_path / "a.json"), "json").lines == [2, 4]
    (tmp_path / "b.json").write_text('{"text": ["a", "b"], "label": [0, 1]}')
    assert read_table(str(tmp_path / "b.json"), "json").columns == {"text": ["a", "b"], "label": [0, 1]}


def test_faults_of_several_files_and_unknown_labels_are_told_together(tmp_path: Path):
    train = write(tmp_path / "train.csv", ["a", "", "c", "d"], ["x", "y", "x", "y"])
    validation = write(tmp_path / "validation.parquet", ["a", None, "c", "d"], ["x", "y", "z", None])
    refused(
        r"train.csv \(1 of 4 rows\): line 3 has no text in 'text'; .*validation.parquet \(3 of 4 rows\): "
        r"row 1 has no text in 'text', row 2 has the label 'z', which is none of the 2 labels \(x, y\), "
        r"row 3 has no 'label': correct these rows, or leave them out with --drop_empty_rows",
        tmp_path,
        train,
        validation,
    )


def test_many_faults_are_counted(tmp_path: Path):
    data = write(tmp_path / "data.jsonl", [None] * 30 + WORDS[:2], ["x", "y"] * 16)
    refused(
        r"\(30 of 32 rows\): line 1 has no text in 'text', .*line 10 has no text in 'text', and 20 more:",
        tmp_path,
        data,
    )


def test_a_number_among_words_and_a_word_among_numbers_are_faults(tmp_path: Path):
    data = write(tmp_path / "data.csv", WORDS, [0, 1, 0, "x"])
    refused("line 5 has the 'label' 'x', but most are integers", tmp_path, data)
    assert read(tmp_path, data, None, "--label_type", "class")[1].names == ["0", "1", "x"]
    data = write(tmp_path / "nan.csv", WORDS, [0.5, "nan", "inf", 1.5])
    refused("line 3 has the 'label' nan, line 4 has the 'label' inf: correct", tmp_path, data)


def test_one_or_zero_of_each_label_is_no_list_of_labels(tmp_path: Path):
    data = write(tmp_path / "data.jsonl", WORDS, [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]])
    refused(r"line 1 has a label twice in \[1, 0, 1\]: expected those that hold, not 1 or 0 of each", tmp_path, data)


def test_labels_that_are_neither_one_nor_a_list_are_refused(tmp_path: Path):
    data = write(tmp_path / "a.jsonl", WORDS, [["a"], ["b", 0.5], ["a", None], ["b"]])
    refused(
        r"line 2 has the 'label' \['b', 0.5\]: expected a list of strings or integers, line 3 .*None\]", tmp_path, data
    )
    data = write(tmp_path / "b.jsonl", WORDS, [{"a": 1}] * 4)
    refused(
        r"the column 'label' of .*b.jsonl holds dicts: expected one integer, string or float per row", tmp_path, data
    )
    data = write(tmp_path / "c.csv", WORDS, ["\"['a', 'b']\"", "['b']", "[]", "['a']"])
    refused(r"'label' of .*c.csv holds lists, which a csv has as text only: save the data as jsonl", tmp_path, data)
    data = write(tmp_path / "d.parquet", WORDS, [[0.5], [0.1], [0.2], [0.3]])
    refused(
        r"'label' of .*d.parquet holds List.*: expected one integer, string or float per row, or lists", tmp_path, data
    )


BAD_FILES = {
    "empty": ("", r"data.csv holds no row: the file is empty"),
    "header": ("text,label\n", r"data.csv holds no row below its header"),
    "semicolons": ("text;label\na;0\n", r"data.csv: its columns are separated by ';': save it with commas"),
    "twice": ("text,label,text\na,0,b\n", r"data.csv: its header names the column 'text' twice: rename one"),
    "open quote": ('text,label\na,0\n"b,1\nc,0\n', r"data.csv cannot be read as csv: line 3: unexpected end of data"),
    "one label": (
        "text,label\na,0\nb,0\n",
        r"data.csv has only one label, 0: a classifier needs two or more; is 'label'",
    ),
    "all faulty": ("text,label\n,0\n,1\n", r"no row is left of .*data.csv \(2 of 2 rows\)"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_cannot_be_used_names_itself(tmp_path: Path, content: str, message: str):
    (tmp_path / "data.csv").write_text(content)
    refused(message, tmp_path, tmp_path / "data.csv", None, *(["--drop_empty_rows"] if "no row is" in message else []))


def test_other_files_without_rows_or_text_name_themselves(tmp_path: Path):
    for name, content in (("a.jsonl", b"\n"), ("a.json", b"[]"), ("a.csv.gz", gzip.compress(b""))):
        (tmp_path / name).write_bytes(content)
        refused(f"{name} holds no row: the file is empty", tmp_path, tmp_path / name)
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,0\n".encode("latin-1"))
    refused("latin.csv is no text in UTF-8 .*: save it as UTF-8", tmp_path, tmp_path / "latin.csv")
    Dataset.from_dict({"text": ["a"], "label": [0]}).select([]).to_parquet(tmp_path / "a.parquet")
    refused("a.parquet holds no row, or is no parquet file: ", tmp_path, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text("text")
    refused("b.parquet holds no row, or is no parquet file: ", tmp_path, tmp_path / "b.parquet")


# A model that knows its labels


def test_a_trained_models_labels_are_found_in_a_file_to_evaluate_on(tmp_path: Path):
    trained = {"architectures": ["BertForSequenceClassification"]}
    named = BertConfig(id2label={0: "pos", 1: "neg"}, label2id={"pos": 0, "neg": 1}, **trained)
    number = BinaryBertConfig(num_labels=1, problem_type="regression", **trained)
    several = BertConfig(id2label={0: "b", 1: "a"}, problem_type="multi_label_classification", **trained)
    cases = [
        (named, ["neg", "pos", "neg", "pos"], [1, 0, 1, 0]),
        (named, [0, 1, 0, 1], [0, 1, 0, 1]),
        (number, [1, 2, 1, 2], [1.0, 2.0, 1.0, 2.0]),
        (several, [["a"], ["b"], [], ["a", "b"]], [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),
    ]
    for config, values, targets in cases:
        data = write(tmp_path / "data.jsonl", WORDS, values)
        given = arguments(tmp_path, "--validation_file", data, do=("eval",))
        splits, labels = load_data(given, config)
        assert [labels.target(value) for value in splits["validation"].labels] == targets


# Tokens


@pytest.mark.parametrize("pad", [True, False])
def test_tokens_and_targets_have_the_types_that_the_model_takes(tmp_path: Path, pad: bool):
    """Whatever the columns of the file are called: a label called input_ids would have made strings of the tokens."""
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])})
    data = write(tmp_path / "data.csv", WORDS, ["a", "b", "a", "b"])
    data.write_text(data.read_text().replace("text,label", "token_type_ids,input_ids"))
    given = arguments(
        tmp_path, "--train_file", data, "--label_column_name", "input_ids", "--pad_to_max_length", pad, do=("train",)
    )
    splits, labels = load_data(given, BertConfig())
    tokens = tokenized(given, splits["train"].rows, tokenizer, splits["train"].texts, 8)
    tokens = with_targets(tokens, splits["train"], labels)
    assert {len(row["input_ids"]) for row in tokens} == {8 if pad else 4}
    assert [row["labels"] for row in tokens] == [0, 1, 0, 1]
    assert str(tokens.features["labels"].dtype) == "int64"
    again = tokenized(given, splits["train"].rows, tokenizer, splits["train"].texts, 8)
    assert again.cache_files
    several = Labels(["a", "b"], {"a": 0, "b": 1}, multi_label=True)
    splits["train"].labels = [["a"], [], ["b"], ["a", "b"]]
    tokens = with_targets(tokens.remove_columns("labels"), splits["train"], several)
    assert tokens["labels"][:] == [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
