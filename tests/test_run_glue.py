"""scripts/run_glue.py: on files, on GLUE as the Hub serves it, on wrong input, in two processes."""

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from fake_hub import FakeHub
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertTokenizer

import hf_bnn
from hf_bnn.nn.packed import is_packed
from hf_bnn.tasks import commandline
from hf_bnn.tasks.text import data as text_data
from hf_bnn.tasks.text import run as task
from hf_bnn.tasks.text.arguments import TASK_COLUMNS

SCRIPT = Path(__file__).parents[1] / "scripts" / "run_glue.py"
GOOD, BAD = ("good", "great", "fine"), ("bad", "poor", "dull")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "plot", "was", *GOOD, *BAD]
QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--log_level", "error"]
TRAIN = ["--do_train", "--do_eval", "--max_steps", "2", "--save_strategy", "no"]

Run = Callable[..., dict[str, float]]


def rows(count: int = 16) -> list[dict[str, Any]]:
    """Sentences whose label is in their last word."""
    nouns = ("film", "plot")
    texts = [f"the {nouns[i // 2 % 2]} was {(BAD, GOOD)[i % 2][i % 3]}" for i in range(count)]
    return [{"text": text, "label": i % 2} for i, text in enumerate(texts)]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    """Write the rows in the format that the file's name says."""
    data, text = Dataset.from_list(content), gzip.open if path.suffix == ".gz" else open
    if ".parquet" in path.name:
        path.write_bytes(parquet(data))
    elif ".csv" in path.name:
        with text(path, "wt") as file:
            file.write(data.to_pandas().to_csv(index=False))
    else:
        with text(path, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in content))
    return path


def parquet(data: Dataset) -> bytes:
    """The file that the Hub would hold."""
    import io

    buffer = io.BytesIO()
    data.to_parquet(buffer)
    return buffer.getvalue()


def save_bert(folder: Path, trained: bool = True, **kwargs: Any) -> Path:
    """A float BERT of one layer with its tokenizer; `trained`: the config says that it is a classifier."""
    torch.manual_seed(0)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=32)
    size = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.2}
    config = BertConfig(**{**size, **layers, **kwargs})
    model = BertForSequenceClassification(config)
    (model if trained else model.bert).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_glue(script_logging: None) -> ModuleType:
    """The module of the task that the script runs."""
    return task


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained encoder without a classifier."""
    return save_bert(tmp_path_factory.mktemp("base"), trained=False)


@pytest.fixture
def run(run_glue: ModuleType, base: Path, tmp_path: Path) -> Run:
    """Run the script in this process on these arguments; those that a test leaves out are filled in."""

    def start(*arguments: object) -> dict[str, float]:
        given = list(map(str, arguments))
        defaults = {
            "model_name_or_path": base,
            "output_dir": tmp_path / "out",
            "cache_dir": tmp_path / "cache",
            "max_seq_length": 12,
            "learning_rate": 5e-3,
            "overwrite_output_dir": "true",
        }
        rest = [text for name, value in defaults.items() if f"--{name}" not in given for text in (f"--{name}", value)]
        return run_glue.main([*given, *map(str, rest), *QUIET])

    return start


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Arguments that name a train and a validation file."""
    paths = {split: write(tmp_path / f"{split}.csv", rows()) for split in ("train", "validation")}
    return [text for split, path in paths.items() for text in (f"--{split}_file", str(path))]


def logits(model: torch.nn.Module) -> torch.Tensor:
    """The logits of a model for a few sentences."""
    ids = torch.arange(40).view(4, 10) % len(WORDS)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def read_predictions(folder: Path) -> list[dict[str, str]]:
    """The table that a run in this folder has written."""
    with (folder / "out/predict_results.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


# Files


@pytest.mark.parametrize("name", ["csv", "csv.gz", "json", "jsonl", "jsonl.gz", "parquet"])
def test_every_file_format_trains_and_evaluates(run: Run, tmp_path: Path, name: str):
    train, validation = (write(tmp_path / f"{split}.{name}", rows()) for split in ("train", "validation"))
    metrics = run("--train_file", train, "--validation_file", validation, *TRAIN)
    assert metrics["train_samples"] == metrics["eval_samples"] == 16
    assert 0 <= metrics["eval_accuracy"] <= 1


def test_a_run_writes_the_files_of_transformers_examples(run: Run, files: list[str], tmp_path: Path):
    metrics = run(*files, *TRAIN)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    results = {"all_results.json", "train_results.json", "eval_results.json", "trainer_state.json", "README.md"}
    assert results | {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert json.loads((tmp_path / "out/all_results.json").read_text()) == pytest.approx(metrics)
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == 2


def test_sentences_are_learned_and_the_packed_model_keeps_what_was_learned(run: Run, files: list[str], tmp_path: Path):
    metrics = run(*files, "--do_train", "--do_eval", "--num_train_epochs", 40)
    assert metrics["eval_accuracy"] == 1.0
    packed = load(tmp_path / "out")
    assert is_packed(packed)
    latent = load(next((tmp_path / "out").glob("checkpoint-*")))
    assert not is_packed(latent)
    assert torch.equal(logits(packed), logits(latent))


def test_a_packed_checkpoint_can_be_evaluated_but_not_trained(run: Run, files: list[str], tmp_path: Path):
    trained = run(*files, *TRAIN)
    again = tmp_path / "again"
    evaluate = ["--model_name_or_path", tmp_path / "out", "--output_dir", again, *files]
    assert run(*evaluate, "--do_eval")["eval_accuracy"] == trained["eval_accuracy"]
    assert run(*evaluate, "--do_eval")["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-6)
    with pytest.raises(ValueError, match=r"is packed: its weights are bits and cannot be trained\. Load the latent"):
        run(*evaluate, "--do_train")
    with pytest.raises(ValueError, match="evaluated in float32: leave out --fp16 and --bf16"):
        run(*evaluate, "--do_eval", "--bf16")
    with pytest.raises(ValueError, match="is packed with embeddings='int8': it cannot become 'binary'; leave out"):
        run(*evaluate, "--do_eval", "--embeddings", "binary")


def test_a_packed_checkpoint_is_evaluated_on_a_validation_file_alone(run: Run, files: list[str], tmp_path: Path):
    trained = run(*files, *TRAIN)
    metrics = run(*files[2:], "--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "x", "--do_eval")
    assert metrics["eval_accuracy"] == trained["eval_accuracy"]
    strange = write(tmp_path / "strange.csv", [*rows(2), {"text": "the film", "label": 7}])
    with pytest.raises(
        ValueError, match=r"strange.csv \(1 of 3 rows\): line 4 has the label 7, which is none of the 2"
    ):
        run("--validation_file", strange, "--model_name_or_path", tmp_path / "out", "--do_eval")


def test_a_latent_checkpoint_can_be_trained_on_with_more_of_it_binary(run: Run, files: list[str], tmp_path: Path):
    run(*files, *TRAIN, "--binarize", "weights", "--no_save_packed")
    assert load(tmp_path / "out").config.binarize == "weights"
    second = ["--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "second"]
    run(*files, *TRAIN, *second, "--binarize", "both")
    assert load(tmp_path / "second").config.binarize == "both"
    run(*files, *TRAIN, *second)
    assert load(tmp_path / "second").config.binarize == "weights"


def test_the_structure_goes_into_the_config(run: Run, files: list[str], tmp_path: Path):
    run(*files, *TRAIN, "--binarize", "both", "--attention", "binary", "--embeddings", "binary", "--method", "surge")
    config = load(tmp_path / "out").config
    assert (config.binarize, config.attention, config.embeddings) == ("both", "binary", "binary")
    assert config.method["name"] == "surge"


def test_labels_are_named_in_the_config_and_in_the_predictions(run: Run, tmp_path: Path):
    content = [{**row, "label": ("neg", "pos")[row["label"]]} for row in rows()]
    data = write(tmp_path / "train.jsonl", content)
    unlabelled = write(tmp_path / "test.jsonl", [{"text": row["text"]} for row in content[:5]])
    files = ["--train_file", data, "--validation_file", data, "--test_file", unlabelled]
    run(*files, "--do_train", "--do_eval", "--do_predict", "--num_train_epochs", 40)
    assert load(tmp_path / "out").config.label2id == {"neg": 0, "pos": 1}
    found = read_predictions(tmp_path)
    assert list(found[0]) == ["index", "prediction", "score", "p(neg)", "p(pos)", "line", "text"]
    for index, line in enumerate(found):
        name = ("neg", "pos")[index % 2]
        expected = {"index": str(index), "prediction": name, "line": str(index + 1), "text": content[index]["text"]}
        assert expected.items() <= line.items()
        assert float(line["score"]) == float(line[f"p({name})"]) > 0.5
        assert float(line["p(neg)"]) + float(line["p(pos)"]) == pytest.approx(1, abs=1e-5)


def test_a_file_of_floats_is_a_regression(run: Run, tmp_path: Path):
    data = write(tmp_path / "train.csv", [{**row, "label": row["label"] + 0.5} for row in rows()])
    metrics = run("--train_file", data, "--validation_file", data, "--test_file", data, *TRAIN, "--do_predict")
    assert {"eval_mse", "eval_pearson", "eval_spearmanr"} <= metrics.keys()
    assert metrics["eval_mse"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    model = load(tmp_path / "out")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    header, line = (tmp_path / "out/predict_results.tsv").read_text().splitlines()[:2]
    assert header == "index\tprediction\tline\ttext"
    assert 0 < abs(float(line.split("\t")[1])) < 5


def test_several_labels_of_a_row_are_trained_evaluated_and_predicted(run: Run, tmp_path: Path):
    content = [{"text": row["text"], "label": ["all", *(["pos"] if row["label"] else [])]} for row in rows()]
    content.append({"text": "the plot was", "label": []})
    data = write(tmp_path / "train.jsonl", content)
    files = ["--train_file", data, "--validation_file", data, "--test_file", data]
    metrics = run(*files, "--do_train", "--do_eval", "--do_predict", "--num_train_epochs", 30, "--seed", 1)
    assert metrics["eval_micro_f1"] > 0.9
    config = load(tmp_path / "out").config
    assert (config.problem_type, config.id2label) == ("multi_label_classification", {0: "all", 1: "pos"})
    found = read_predictions(tmp_path)
    assert list(found[0]) == ["index", "prediction", "p(all)", "p(pos)", "line", "text"]
    assert [row["prediction"] for row in found[:2]] == ["all", "all,pos"]
    again = ["--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "again", "--validation_file", data]
    assert run(*again, "--do_eval")["eval_macro_f1"] == pytest.approx(metrics["eval_macro_f1"])


def test_an_unbalanced_set_is_not_judged_by_its_accuracy_alone(
    run: Run, run_glue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    monkeypatch.setattr(run_glue.logger, "warning", said.append)
    train = write(tmp_path / "train.csv", [{**row, "label": int(index == 5)} for index, row in enumerate(rows())])
    files = ["--train_file", train, "--validation_file", train]
    metrics = run(*files, "--do_train", "--do_eval", "--per_device_train_batch_size", 16, "--max_steps", 20)
    assert metrics["eval_accuracy"] == 15 / 16
    assert metrics["eval_macro_f1"] == pytest.approx((2 * 15 / 31 + 0) / 2)
    written = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert written["eval_per_class"]["1"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1.0}
    assert any("all 16 rows are taken for '0': the accuracy is that class's share, 93.8%" in text for text in said)


def test_rows_that_are_dropped_are_counted_and_predictions_keep_their_lines(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train = write(tmp_path / "train.jsonl", [*rows(), {"text": None, "label": 1}])
    validation = write(tmp_path / "validation.csv", [*rows(4), {"text": "the film", "label": 3}])
    test = write(tmp_path / "test.parquet", [{"text": text} for text in ("the film", None, "the plot")])
    files = ["--train_file", train, "--validation_file", validation, "--test_file", test, "--drop_empty_rows"]
    metrics = run(*files, *TRAIN, "--do_predict")
    assert (metrics["train_samples"], metrics["eval_samples"]) == (16, 4)
    assert [(row["index"], row["text"]) for row in read_predictions(tmp_path)] == [("0", "the film"), ("2", "the plot")]
    assert "train.jsonl (1 of 17 rows): line 17 has no text in 'text'" in caplog.text
    assert "validation.csv (1 of 5 rows): line 6 has the label 3" in caplog.text


def test_columns_can_be_named(run: Run, tmp_path: Path):
    content = [{"a": row["text"], "b": "the plot", "c": "noise", "stars": row["label"]} for row in rows()]
    data = write(tmp_path / "train.parquet", content)
    named = ["--train_file", data, "--validation_file", data, "--label_column_name", "stars"]
    assert run(*named, *TRAIN, "--text_column_names", "a, b")["eval_samples"] == 16
    with pytest.raises(ValueError, match="cannot tell which columns hold the text; columns: a, b, c, stars: name one"):
        run(*named, *TRAIN)
    with pytest.raises(ValueError, match="text_column_names='a,z': there is no column 'z'; columns: a, b, c, stars"):
        run(*named, *TRAIN, "--text_column_names", "a,z")


def test_samples_can_be_limited_and_padded_dynamically(run: Run, files: list[str]):
    limits = ["--max_train_samples", 10, "--max_eval_samples", 3, "--pad_to_max_length", "false"]
    metrics = run(*files, *TRAIN, *limits)
    assert (metrics["train_samples"], metrics["eval_samples"]) == (10, 3)


def test_arguments_are_read_from_a_json_file(run_glue: ModuleType, files: list[str], base: Path, tmp_path: Path):
    given = dict(zip((name.lstrip("-") for name in files[::2]), files[1::2], strict=True))
    switches = {"do_eval": True, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "log_level": "error"}
    paths = {"model_name_or_path": str(base), "output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "c")}
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps({**given, **switches, **paths}))
    assert run_glue.main([str(path)])["eval_samples"] == 16


# Resuming


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run: Run, files: list[str], tmp_path: Path):
    steps = [*files, "--do_train", "--max_steps", 4, "--save_steps", 2, "--method", "surge"]
    run(*steps)
    whole = load(tmp_path / "out")
    resumed = [*steps, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint"]
    run(*resumed, tmp_path / "out/checkpoint-2")
    assert torch.equal(logits(load(tmp_path / "resumed")), logits(whole))
    metrics = run(*resumed, "True", "--max_steps", 6)
    assert metrics["epoch"] == 3.0
    assert json.loads((tmp_path / "resumed/trainer_state.json").read_text())["global_step"] == 6


def test_resuming_without_a_checkpoint_is_an_error(run: Run, files: list[str], tmp_path: Path):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=True: no complete checkpoint in .*out; leave it out"):
        run(*files, *TRAIN, "--resume_from_checkpoint", "True")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint='nowhere': there is no such folder; True takes"):
        run(*files, *TRAIN, "--resume_from_checkpoint", "nowhere")


# GLUE by name


def glue(task: str, columns: tuple[str, ...]) -> DatasetDict:
    """A task as nyu-mll/glue holds it, with a few rows; the test splits have the label -1."""
    names = {"mnli": ["entailment", "neutral", "contradiction"], "stsb": None}.get(task, ["no", "yes"])
    label = Value("float32") if names is None else ClassLabel(names=names)
    features = Features({**dict.fromkeys(columns, Value("string")), "label": label, "idx": Value("int32")})
    ends = ("_matched", "_mismatched") if task == "mnli" else ("",)

    def split(labelled: bool) -> Dataset:
        examples = []
        for index, row in enumerate(rows(12)):
            value = (index * 0.4 if names is None else index % len(names)) if labelled else -1
            examples.append({**dict.fromkeys(columns, row["text"]), "label": value, "idx": index})
        return Dataset.from_list(examples, features=features)

    evaluated = {f"{name}{end}": split(name == "validation") for name in ("validation", "test") for end in ends}
    return DatasetDict({"train": split(True), **evaluated})


METRICS = {
    "cola": {"matthews_correlation"},
    "mnli": {"accuracy", "accuracy_mm"},
    "mrpc": {"accuracy", "f1", "combined_score"},
    "qnli": {"accuracy"},
    "qqp": {"accuracy", "f1", "combined_score"},
    "rte": {"accuracy"},
    "sst2": {"accuracy"},
    "stsb": {"pearson", "spearmanr", "combined_score"},
    "wnli": {"accuracy"},
}


@pytest.mark.parametrize("task", METRICS)
@pytest.mark.filterwarnings("ignore:.*constant.*")
def test_every_glue_task_runs_by_its_name(
    run: Run, run_glue: ModuleType, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def load_glue(name: str, config: str, **_: Any) -> DatasetDict:
        asked.append((name, config))
        return glue(task, TASK_COLUMNS[task])

    monkeypatch.setattr(text_data, "load_dataset", load_glue)
    metrics = run("--task_name", task.upper(), *TRAIN, "--do_predict")
    assert asked == [("nyu-mll/glue", task)]
    other = {"loss", "runtime", "samples", "samples_per_second", "steps_per_second"}
    other |= {f"{name}_mm" for name in other} if task == "mnli" else set()
    keys = {key.removeprefix("eval_") for key in metrics if key.startswith("eval_")}
    assert keys - other == METRICS[task]
    written = json.loads((tmp_path / "out/eval_results.json").read_text())
    tables = [key for key in written if key.startswith("eval_per_class")]
    assert len(tables) == {"stsb": 0, "mnli": 2}.get(task, 1)
    config = load(tmp_path / "out").config
    assert config.num_labels == {"stsb": 1, "mnli": 3}.get(task, 2)
    predictions = sorted(path.name for path in (tmp_path / "out").glob("predict_*"))
    expected = ["", "-mm"] if task == "mnli" else [""]
    assert predictions == sorted(f"predict_results_{task}{end}.tsv" for end in expected)
    header, *values = (tmp_path / "out" / predictions[-1]).read_text().splitlines()
    assert header.split("\t")[:2] == ["index", "prediction"]
    assert header.split("\t")[-len(TASK_COLUMNS[task]) :] == list(TASK_COLUMNS[task])
    assert len(values) == 12
    if task == "mnli":
        assert {value.split("\t")[1] for value in values} <= {"entailment", "neutral", "contradiction"}


def test_a_dataset_of_the_hub_is_asked_for_by_its_name(run: Run, run_glue: ModuleType, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_any(*names: str | None, **_: Any) -> DatasetDict:
        asked.append(names)
        return glue("sst2", ("sentence",))  # its column idx is no text

    monkeypatch.setattr(text_data, "load_dataset", load_any)
    assert run("--dataset_name", "stanfordnlp/sst2", *TRAIN)["eval_samples"] == 12
    run("--dataset_name", "me/reviews", "--dataset_config_name", "small", *TRAIN)
    assert asked == [("stanfordnlp/sst2", None), ("me/reviews", "small")]


def test_classes_follow_the_models_own_names(
    run: Run, run_glue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A model whose classes stand in another order than the data's is evaluated in its own order."""
    monkeypatch.setattr(text_data, "load_dataset", lambda *_, **__: glue("sst2", ("sentence",)))
    losses = []
    for names in (["no", "yes"], ["YES", "NO"]):
        folder = save_bert(tmp_path / names[0], id2label=dict(enumerate(names)))
        run("--task_name", "sst2", "--model_name_or_path", folder, "--do_eval", "--binarize", "none")
        metrics = json.loads((tmp_path / "out/eval_results.json").read_text())
        losses.append(metrics["eval_accuracy"])
    assert losses[0] == pytest.approx(1 - losses[1])


# Teachers and float models


def test_a_float_model_is_trained_by_the_same_script_and_then_teaches(run: Run, files: list[str], tmp_path: Path):
    teacher = tmp_path / "teacher"
    epochs = ["--do_train", "--do_eval", "--num_train_epochs", 30]
    assert run(*files, *epochs, "--binarize", "none", "--output_dir", teacher)["eval_accuracy"] == 1.0
    assert type(load(teacher)) is BertForSequenceClassification
    plain = run(*files, *TRAIN)
    taught = run(*files, *TRAIN, "--teacher_model_name_or_path", teacher, "--output_dir", tmp_path / "taught")
    assert taught["train_loss"] != plain["train_loss"]
    assert hf_bnn.BinaryBertForSequenceClassification.from_pretrained(tmp_path / "taught")


def test_a_teacher_must_fit_the_student(run: Run, files: list[str], base: Path, tmp_path: Path):
    def refused(message: str, teacher: Path, *arguments: object) -> None:
        with pytest.raises(ValueError, match=message):
            run(*files, *TRAIN, "--teacher_model_name_or_path", teacher, *arguments)

    refused(r"teacher .* is no trained classifier \(\['BertModel'\]\): train one with --binarize none", base)
    refused("has 3 labels, the data has 2: they must agree", save_bert(tmp_path / "a", num_labels=3))
    refused("has 70 tokens in its vocabulary, the student 15", save_bert(tmp_path / "b", vocab_size=70))
    wide = save_bert(tmp_path / "c", hidden_size=48)
    refused("hidden states of 48, the student of 32: .* --distillation_hidden_weight 0", wide)
    turned = save_bert(tmp_path / "d", id2label={0: "1", 1: "0"})
    refused("labels in the order 1, 0, the student in the order 0, 1: train the teacher on the same data", turned)
    run(*files, *TRAIN, "--teacher_model_name_or_path", wide, "--distillation_hidden_weight", 0)


def test_how_to_distil_is_not_said_without_a_teacher(run: Run, files: list[str]):
    message = (
        r"distillation_temperature=2\.0 is for distillation, but there is no teacher: give --teacher_model_name_or"
    )
    with pytest.raises(ValueError, match=message):
        run(*files, *TRAIN, "--distillation_temperature", 2)


@pytest.mark.parametrize("argument", ["attention", "embeddings", "teacher_model_name_or_path"])
def test_a_float_model_has_nothing_binary(run: Run, files: list[str], argument: str):
    with pytest.raises(ValueError, match=f"--binarize none trains a plain float model: leave out --{argument}"):
        run(*files, *TRAIN, "--binarize", "none", f"--{argument}", "binary")
    with pytest.raises(ValueError, match="leave out --method and --method_args"):
        run(*files, *TRAIN, "--binarize", "none", "--method", "surge")


def test_a_binary_checkpoint_cannot_become_float(run: Run, files: list[str], tmp_path: Path):
    run(*files, *TRAIN)
    with pytest.raises(ValueError, match="is a binary checkpoint, which --binarize none cannot make float"):
        run(*files, "--do_eval", "--model_name_or_path", tmp_path / "out", "--binarize", "none")


def test_a_head_of_another_size_is_replaced_only_when_asked(run: Run, files: list[str], tmp_path: Path):
    model = ["--model_name_or_path", save_bert(tmp_path / "three", num_labels=3)]
    with pytest.raises(
        ValueError, match=r"2 labels \(0, 1\), but .*three was trained for 3 \(LABEL_0, .*--ignore_mismatched"
    ):
        run(*files, *TRAIN, *model)
    run(*files, *TRAIN, *model, "--ignore_mismatched_sizes")
    assert load(tmp_path / "out").config.num_labels == 2


# Wrong input


WRONG = {
    "no data": ([], r"no data: give --task_name .*, --dataset_name .*, or --train_file and --validation_file"),
    "unknown task": (["--task_name", "sst3"], "unknown task 'sst3'; known tasks: cola, mnli, mrpc, qnli, qqp, rte"),
    "missing file": (["--train_file", "no.csv", "--validation_file", "no.csv"], "train_file 'no.csv' does not exist"),
    "one file": (["--train_file", "DATA"], "--do_eval needs --validation_file; given: train_file"),
    "extension": (["--train_file", "a.txt", "--validation_file", "a.txt"], "train_file 'a.txt' is of no known kind"),
    "no extension": (["--train_file", "a", "--validation_file", "a"], "'a' is of no known kind: expected one of .csv"),
    "parquet.gz": (["--train_file", "a.parquet.gz", "--validation_file", "a"], "'a.parquet.gz' is of no known kind"),
    "method": (["FILES", "--method", "sgd"], "unknown method 'sgd'; known methods: ste, "),
    "method_args": (["FILES", "--method", "ste", "--method_args", "eta=1"], "unknown argument 'eta' of method 'ste'"),
    "method_args value": (["FILES", "--method_args", "clip=x"], "argument clip='x' of method 'ste': expected float"),
    "binarize": (["FILES", "--binarize", "all"], r"argument --binarize: invalid choice: 'all' \(choose from"),
    "argument": (["FILES", "--bits", "1"], r"not used by the HfArgumentParser: \['--bits', '1'\]"),
    "model": (["FILES", "--model_name_or_path", "nowhere/at-all"], "nowhere/at-all: We couldn't connect to"),
    "not bert": (
        ["FILES", "--model_name_or_path", "OTHER"],
        "holds a 'distilbert' model: BinaryBertConfig reads",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_told_with_the_way_out(
    run: Run, files: list[str], arguments: list[str], message: str, tmp_path: Path
):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "distilbert"}')
    stands_for = {"FILES": files, "DATA": files[1:2], "OTHER": [tmp_path / "other"]}
    given = [text for argument in arguments for text in stands_for.get(argument, [argument])]
    with pytest.raises(ValueError, match=message):
        run(*given, *TRAIN)


def test_there_must_be_something_to_do(run: Run, files: list[str]):
    with pytest.raises(ValueError, match="nothing to do: give --do_train, --do_eval or --do_predict"):
        run(*files)


def changed(content: list[dict[str, Any]], row: int, **values: Any) -> list[dict[str, Any]]:
    return [{**content[i], **values} if i == row else content[i] for i in range(len(content))]


NAMED = [{**row, "label": ("neg", "pos")[row["label"]]} for row in rows()]
BAD_DATA = {
    "no label column": (
        [{"text": "the film", "stars": 1}],
        "data.jsonl has no column 'label'; columns: text, stars: name the one with the labels in --label_column",
    ),
    "no label in a row": (
        changed(NAMED, 3, label=None),
        r"data.jsonl \(1 of 16 rows\): line 4 has no 'label': correct",
    ),
    "no text in a row": (
        changed(rows(), 5, text=None),
        r"line 6 has no text in 'text': correct these rows, or leave them out with --drop_empty_rows",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_rows_are_named(run: Run, content: list[dict[str, Any]], message: str, tmp_path: Path):
    data = write(tmp_path / "data.jsonl", content)
    with pytest.raises(ValueError, match=message):
        run("--train_file", data, "--validation_file", data, *TRAIN)


def test_a_label_that_training_has_not_seen_is_an_error(run: Run, tmp_path: Path):
    train = write(tmp_path / "train.jsonl", NAMED)
    validation = write(tmp_path / "validation.jsonl", changed(NAMED, 4, label="meh"))
    with pytest.raises(ValueError, match=r"validation.jsonl .*: line 5 has the label 'meh', .* 2 labels \(neg, pos\)"):
        run("--train_file", train, "--validation_file", validation, *TRAIN)


def test_a_class_outside_the_declared_range_is_an_error(
    run: Run, run_glue: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    found = glue("sst2", ("sentence",))
    monkeypatch.setattr(text_data, "load_dataset", lambda *_, **__: DatasetDict({**found, "train": found["test"]}))
    with pytest.raises(
        ValueError, match=r"the train data \(12 of 12 rows\): row 0 has the label -1, .* \(0, 1\), row 1"
    ):
        run("--task_name", "sst2", *TRAIN)


def test_a_dataset_without_a_validation_split_is_an_error(
    run: Run, run_glue: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    found = glue("sst2", ("sentence",))
    monkeypatch.setattr(
        text_data, "load_dataset", lambda *_, **__: DatasetDict({s: found[s] for s in ("train", "test")})
    )
    with pytest.raises(ValueError, match="--do_eval needs a split 'validation'; the dataset has: train, test"):
        run("--dataset_name", "stanfordnlp/imdb", *TRAIN)


# What a run claims


def test_a_run_that_max_steps_cut_short_claims_no_result(
    run: Run, run_glue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_data, "load_dataset", lambda *_, **__: glue("sst2", ("sentence",)))
    card = tmp_path / "out/README.md"
    run("--task_name", "sst2", *TRAIN)
    assert "out (stopped after 2 steps: its figures are no result)" in card.read_text()
    assert "type: accuracy" not in card.read_text()
    run("--task_name", "sst2", "--do_train", "--do_eval", "--num_train_epochs", 1)
    assert "no result" not in card.read_text()
    assert "type: accuracy" in card.read_text()


# Other processes


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", **more}


def test_a_user_error_is_one_line_and_exit_code_two(
    run_glue: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    given = ["--model_name_or_path", "x", "--task_name", "sst3", "--do_train", "--use_cpu", "--output_dir", "out"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
    with pytest.raises(SystemExit) as ended:
        commandline.exit_after(run_glue.main)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("run_glue.py: error: unknown task 'sst3'; known tasks: cola, mnli")
    assert error.count("\n") == 1


@pytest.mark.multiprocess
def test_a_model_goes_from_the_hub_to_the_hub(base: Path, tmp_path: Path):
    """sst2 and a float model from a local Hub; the packed result is pushed, and loads from there by its id."""
    data = glue("sst2", ("sentence",))
    table = {f"sst2/{split}-00000-of-00001.parquet": parquet(data[split]) for split in data}
    files = "".join(f"  - split: {split}\n    path: sst2/{split}-*\n" for split in data)
    card = f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{files}---\n"
    with FakeHub() as hub:
        hub.add("dataset", "nyu-mll/glue", {"README.md": card.encode(), **table})
        hub.add("model", "tester/tiny-bert", base)
        env = environment(**hub.environment(tmp_path / "home"))
        run = ["--task_name", "sst2", "--model_name_or_path", "tester/tiny-bert", "--do_train", "--do_eval"]
        push = ["--push_to_hub", "--hub_model_id", "tester/tiny-bnn", "--output_dir", str(tmp_path / "out")]
        command = [sys.executable, SCRIPT, *run, *push, "--max_steps", "2", *QUIET]
        result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=180)
        assert result.returncode == 0, result.stderr
        pushed = hub.files("model", "tester/tiny-bnn")
        assert json.loads(pushed["config.json"])["weight_format"] == "packed"
        assert pushed["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
        code = (
            "import sys, torch, hf_bnn, transformers\n"
            "load = transformers.AutoModelForSequenceClassification.from_pretrained\n"
            "ids = torch.arange(40).view(4, 10) % 15\n"
            "here, there = (load(name).eval()(input_ids=ids).logits for name in sys.argv[1:])\n"
            "assert hf_bnn.nn.packed.is_packed(load(sys.argv[2])) and torch.equal(here, there)\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "out"), "tester/tiny-bnn"]
        result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
        assert result.returncode == 0, result.stderr


@pytest.mark.multiprocess
def test_two_processes_share_one_run(files: list[str], base: Path, tmp_path: Path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    out = ["--model_name_or_path", str(base), "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "c")]
    quiet = [*QUIET[:-1], "warning", "--per_device_train_batch_size", "4"]
    command = [*launch, *files, *out, *TRAIN, *quiet, "--method", "surge"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240)
    assert result.returncode == 0, result.stderr
    assert "process 0 of 2" in result.stdout
    assert "process 1 of 2" in result.stdout
    metrics = json.loads((tmp_path / "out/all_results.json").read_text())
    assert metrics["epoch"] == 1.0  # two steps of 2 x 4 examples are the 16 rows
    assert metrics["eval_samples"] == 16
    assert is_packed(load(tmp_path / "out"))
