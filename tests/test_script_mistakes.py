"""The mistakes of a day, in both training scripts: one line that names the value and the way out, and exit code 2."""

import importlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import disable_progress_bars, enable_progress_bars
from datasets.utils.logging import get_verbosity, set_verbosity
from image_runs import save_vit, table, write_folder, write_parquet
from test_run_glue import rows, save_bert, write
from transformers.utils import logging as transformers_logging

from hf_bnn import BinaryViTForImageClassification, pack_
from hf_bnn.tasks import commandline
from hf_bnn.tasks.argument_checks import OutputArguments, check_output_dir

SCRIPTS = Path(__file__).parents[1] / "scripts"
QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--log_level", "error"]

Failing = Callable[..., str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Data and a model for each script, read only."""
    folder = tmp_path_factory.mktemp("inputs")
    bert, vit = save_bert(folder / "bert"), save_vit(folder / "vit", id2label={0: "blue", 1: "red"})
    text, images = write(folder / "train.csv", rows()), write_folder(folder / "train", 4)
    glue = {"model_name_or_path": bert, "train_file": text, "validation_file": text}
    image = {"model_name_or_path": vit, "train_dir": images, "validation_dir": images}
    flat = {"run_glue": glue, "run_image_classification": image}
    return {
        script: [str(x) for pair in given.items() for x in (f"--{pair[0]}", pair[1])] for script, given in flat.items()
    }


@pytest.fixture
def quiet() -> Iterator[None]:
    """No bars of datasets; the verbosity that the scripts set is undone."""
    before = get_verbosity(), transformers_logging.get_verbosity()
    disable_progress_bars()
    yield
    enable_progress_bars()
    set_verbosity(before[0])
    transformers_logging.set_verbosity(before[1])
    transformers_logging.reset_format()


@pytest.fixture
def failing(
    inputs: dict[str, list[str]],
    quiet: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Failing:
    """The error of a script: the last line that it prints."""

    def start(
        script: str, *arguments: object, output_dir: object = "out", do: tuple[str, ...] = ("train", "eval")
    ) -> str:
        given = [*inputs[script], *(f"--do_{what}" for what in do), "--max_steps", "1", *QUIET]
        given += ["--cache_dir", str(tmp_path / "cache"), *(["--output_dir", str(output_dir)] if output_dir else [])]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *given, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            commandline.exit_after(importlib.import_module(script).main)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith(f"{script}.py: error: ")
        return error

    return start


BOTH = pytest.mark.parametrize("script", ["run_glue", "run_image_classification"])

NUMBERS = {
    "per_device_train_batch_size": (
        "0",
        "expected a number of at least 1; where memory is short, raise",
    ),
    "per_device_eval_batch_size": ("-8", "expected a number of at least 1; it changes the speed only"),
    "gradient_accumulation_steps": ("0", "expected a number of at least 1"),
    "learning_rate": ("-0.001", "expected a number of at least 0; about 1e-3 for a binary model"),
    "weight_decay": ("-0.1", "expected a number of at least 0"),
    "max_train_samples": ("0", "expected 1 or more; leave it out for no limit"),
    "max_predict_samples": ("-1", "expected 1 or more; leave it out for no limit"),
}


@BOTH
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_cannot_be_is_named(failing: Failing, script: str, name: str):
    value, message = NUMBERS[name]
    assert f"{name}={value}: {message}" in failing(script, f"--{name}", value)


@BOTH
def test_a_learning_rate_that_is_no_number_is_named(failing: Failing, script: str):
    assert "learning_rate=nan: expected a number" in failing(script, "--learning_rate", "nan")
    assert "argument --learning_rate/--learning-rate: invalid float value: 'fast'" in failing(
        script, "--learning_rate", "fast"
    )


@BOTH
def test_a_missing_output_dir_is_named(failing: Failing, script: str):
    assert "the following arguments are required: --output_dir" in failing(script, output_dir=None)


@BOTH
@pytest.mark.parametrize("name", ["model.safetensors", "all_results.json", "checkpoint-3/config.json"])
def test_another_runs_results_are_not_mixed_with_this_ones(failing: Failing, script: str, name: str, tmp_path: Path):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    error = failing(script)
    found = name.partition("/")[0]
    assert f"output_dir 'out' holds the results of another run ({found}): name another one, go on where it" in error
    assert "--resume_from_checkpoint True, or give --overwrite_output_dir" in error


def test_overwriting_removes_the_figures_of_the_other_run_only(tmp_path: Path):
    names = {"all_results.json", "eval_results.json", "model.safetensors", "notes.txt"}
    for name in names:
        (tmp_path / name).write_text("{}")
    training = SimpleNamespace(output_dir=str(tmp_path), do_train=True, resume_from_checkpoint=None, should_save=True)
    for untouched in ({"do_train": False}, {"resume_from_checkpoint": "True"}):
        check_output_dir(SimpleNamespace(**{**vars(training), **untouched}), OutputArguments())
        assert {path.name for path in tmp_path.iterdir()} == names
    with pytest.raises(ValueError, match="holds the results of another run"):
        check_output_dir(training, OutputArguments())
    check_output_dir(training, OutputArguments(overwrite_output_dir=True))
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "notes.txt"}


@BOTH
def test_what_is_no_checkpoint_is_not_resumed_from(failing: Failing, script: str, tmp_path: Path):
    def error(folder: object) -> str:
        return failing(script, "--resume_from_checkpoint", folder)

    assert "resume_from_checkpoint='yes please': there is no such folder; True takes the newest" in error("yes please")
    assert "resume_from_checkpoint=True: no complete checkpoint in out; leave it out to train anew" in error("True")
    other = tmp_path / "other"
    (other / "checkpoint-7").mkdir(parents=True)
    assert "other': it holds checkpoints, but is none: name one of its checkpoints (checkpoint-7)" in error(other)
    (other / "config.json").write_text(json.dumps({"weight_format": "packed"}))
    assert "other': it is a finished model, packed to bits, without an optimizer's state" in error(other)


def test_labels_out_of_range_and_files_without_rows_are_named(failing: Failing, tmp_path: Path):
    strange = write(tmp_path / "strange.csv", [*rows(4), {"text": "the film", "label": 5}])
    error = failing("run_glue", "--validation_file", strange)
    assert "strange.csv (1 of 5 rows): line 6 has the label 5, which is none of the 2 labels (0, 1): correct" in error
    (tmp_path / "empty.csv").write_text("text,label\n")
    assert "empty.csv holds no row below its header" in failing("run_glue", "--train_file", "empty.csv")
    model = save_vit(tmp_path / "vit", num_labels=3)
    data = write_parquet(tmp_path / "data", train=table(), validation=table().select([]))
    image = ["--dataset_name", data, "--model_name_or_path", model, "--ignore_mismatched_sizes"]
    assert 'data: Instruction "validation" corresponds to no data!' in failing("run_image_classification", *image)


def test_more_tokens_than_the_model_has_positions_are_refused(failing: Failing):
    error = failing("run_glue", "--max_seq_length", 33)
    assert "max_seq_length=33: the model takes 32 tokens at most (its positions, or its tokenizer's" in error
    assert "max_seq_length=0: expected 1 or more" in failing("run_glue", "--max_seq_length", 0)


def test_a_packed_model_is_not_trained(failing: Failing, inputs: dict[str, list[str]], tmp_path: Path):
    float_one = inputs["run_image_classification"][1]
    pack_(BinaryViTForImageClassification.from_pretrained(float_one)).save_pretrained(tmp_path / "packed")
    save_vit(tmp_path / "processor")
    given = ["--model_name_or_path", tmp_path / "packed", "--image_processor_name", tmp_path / "processor"]
    assert "is packed: its weights are bits and cannot be trained" in failing("run_image_classification", *given)


PROGRAMS = {path.stem: path for path in SCRIPTS.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_every_script_says_what_it_does(
    name: str, quiet: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAMS[name]), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}.py")
