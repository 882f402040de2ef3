"""The command line hf-bnn: every command on tiny models, wrong input, exit codes, and what stands on stdout."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from image_runs import VIT, write_folder
from test_run_glue import QUIET, rows, save_bert, write
from tiny import SIZE, different, tiny_float_bert, tiny_resnet, tiny_vit
from transformers import AutoModelForSequenceClassification, ViTImageProcessorPil

from hf_bnn import BinaryBertForSequenceClassification, BinaryConfig, kernels, pack_
from hf_bnn.cli import COMMANDS, compare, main, train
from hf_bnn.cli import doctor as doctor_module
from hf_bnn.nn.packed import is_packed
from hf_bnn.tasks.errors import UsageError

ROOT = Path(__file__).parents[1]
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float, a latent and a packed BERT, and a packed ViT, each with its processor."""
    folder = tmp_path_factory.mktemp("models")
    save_bert(folder / "float")
    model = BinaryBertForSequenceClassification.from_pretrained(folder / "float")
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    model.save_pretrained(folder / "latent")
    pack_(model).save_pretrained(folder / "packed")
    for name in PROCESSOR_FILES:
        shutil.copy(folder / "float" / name, folder / "latent" / name)
        shutil.copy(folder / "float" / name, folder / "packed" / name)
    pack_(tiny_vit()).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "vit")
    write(folder / "rows.jsonl", rows(16))
    return folder


@pytest.fixture
def latent(models: Path, tmp_path: Path) -> Path:
    """A latent model that a test may alter."""
    return Path(shutil.copytree(models / "latent", tmp_path / "latent"))


def told(capsys: pytest.CaptureFixture, *words: object, code: int = 0) -> str:
    """The stdout of a command that must end with this exit code."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture, *words: object, code: int = 2) -> str:
    """The one line that a command says of an error."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    found = capsys.readouterr()
    assert found.out == ""
    assert "Traceback" not in found.err
    return found.err.strip().splitlines()[-1]


# The door itself


def test_the_console_script_has_the_name_that_hf_extensions_needs():
    assert 'hf-bnn = "hf_bnn.cli:main"' in (ROOT / "pyproject.toml").read_text().partition("[project.scripts]\n")[2]
    extensions = pytest.importorskip("huggingface_hub.cli.extensions")
    assert extensions._get_executable_name("bnn").removesuffix(".exe") == "hf-bnn"


def test_the_repository_holds_what_hf_extensions_reads():
    assert not (ROOT / "hf-bnn").exists()  # it would be installed as a shell script in place of the package
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    description = next(line for line in lines if line.startswith("description"))  # found so, and shown by `hf --help`
    assert description.startswith('description = "Binary BERT')


def test_help_names_every_command(capsys):
    text = told(capsys, "--help")
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert told(capsys, "--version").startswith("hf-bnn ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_with_an_example(name: str, capsys):
    assert f"example:\n  hf-bnn {name}" in told(capsys, name, "--help")


def test_mistakes_of_the_command_line(capsys):
    assert error(capsys) == (
        "hf-bnn: error: no command was given; choose one of train, predict, pack, summary, check, bench, compare, "
        "card, doctor (see hf-bnn --help)"
    )
    assert error(capsys, "sumary").startswith("hf-bnn: error: unknown command 'sumary'")
    assert error(capsys, "summary").startswith("hf-bnn summary: error: the following arguments are required: MODEL")


def test_ctrl_c_ends_with_130_and_without_a_traceback(capsys, monkeypatch: pytest.MonkeyPatch):
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_module, "examined", stop)
    assert error(capsys, "doctor", code=130) == "hf-bnn doctor: stopped"


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_module, "examined", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize("name", ["summary", "check", "bench", "card", "predict"])
def test_every_command_says_what_is_wrong_with_a_model(name: str, capsys, models: Path, latent: Path):
    start = f"hf-bnn {name}: "
    more = ["--text", "good"] if name == "predict" else []
    assert error(capsys, name, models / "none", *more) == f"{start}error: {models / 'none'}: there is no such folder"
    assert "is a file: name the folder" in error(capsys, name, models / "rows.jsonl", *more)
    assert f"{models} has no config.json" in error(capsys, name, models, *more)
    assert "holds a 'bert' model, which is not binary" in error(capsys, name, models / "float", *more)
    weights = latent / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    line = error(capsys, name, latent, *more, code=1)
    assert line.startswith(f"{start}CorruptCheckpointError: ")


def test_pickles_are_not_read(capsys, latent: Path):
    (latent / "model.safetensors").unlink()
    torch.save({}, latent / "pytorch_model.bin")
    line = error(capsys, "summary", latent, code=1)
    assert line.startswith(f"hf-bnn summary: CorruptCheckpointError: {latent} cannot be loaded")
    assert "no file named model.safetensors" in line


# summary, check, card


def test_summary(capsys, models: Path):
    found = json.loads(told(capsys, "summary", models / "packed", "--json"))
    assert found == json.loads(told(capsys, "summary", models / "latent", "--json"))
    assert found["binary_weights"] == 4 * 32 * 32 + 2 * 32 * 64
    lines = told(capsys, "summary", models / "packed").splitlines()
    assert lines[2].split() == ["binary", "weights", f"{found['binary_weights']:,}"]


def test_a_model_of_another_architecture(capsys, tmp_path: Path):
    tiny_float_bert().save_pretrained(tmp_path / "float")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float", quantization_config=BinaryConfig())
    pack_(model).save_pretrained(tmp_path / "packed")
    found = json.loads(told(capsys, "summary", tmp_path / "packed", "--json"))
    assert found["class"] == "BertForSequenceClassification"
    assert found["binary_weights"] == 2 * (4 * SIZE["hidden_size"] ** 2 + 2 * 32 * 64)
    assert "from transformers import BertForSequenceClassification" in told(capsys, "card", tmp_path / "packed")
    found = json.loads(told(capsys, "bench", tmp_path / "packed", "--rounds", 1, "--json"))
    assert found["results"][0]["float_ms"] > 0


def test_check_finds_constant_signs(capsys, latent: Path, models: Path):
    found = json.loads(told(capsys, "check", latent, "--file", models / "rows.jsonl", "--json"))
    assert found["problems"] == 0
    assert len(found["layers"]) == 6
    model = BinaryBertForSequenceClassification.from_pretrained(latent)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias.fill_(100)
    model.save_pretrained(latent)
    text = told(capsys, "check", latent, "--text", "the film was good", code=1)
    assert "bert.encoder.layer.0.attention.self.query.input: 100.0% high" in text
    assert "3 of 6 layers' inputs have a problem" in text.splitlines()[-1]


def test_card(capsys, models: Path, tmp_path: Path):
    text = told(capsys, "card", models / "packed", "--name", "me/tiny")
    assert text.startswith("---\nlibrary_name: transformers")
    assert 'from_pretrained("me/tiny", optimize=True)' in text
    file = tmp_path / "README.md"
    assert told(capsys, "card", models / "packed", "--name", "me/tiny", "--output", file) == ""
    assert file.read_text() == text
    assert "exists already" in error(capsys, "card", models / "packed", "--output", file)
    told(capsys, "card", models / "packed", "--output", file, "--overwrite")


# pack


def test_pack(capsys, models: Path, tmp_path: Path):
    output = tmp_path / "packed"
    found = json.loads(told(capsys, "pack", models / "latent", output, "--json"))
    assert found["processor_files"] == list(PROCESSOR_FILES)
    model = BinaryBertForSequenceClassification.from_pretrained(output)
    assert is_packed(model)
    expected = pack_(BinaryBertForSequenceClassification.from_pretrained(models / "latent"))
    assert different(model.state_dict(), expected.state_dict()) == []
    assert (output / "tokenizer.json").read_bytes() == (models / "latent" / "tokenizer.json").read_bytes()
    before = (output / "model.safetensors").read_bytes()
    assert "holds a model already" in error(capsys, "pack", models / "latent", output)
    assert (output / "model.safetensors").read_bytes() == before
    told(capsys, "pack", models / "latent", output, "--overwrite")


def test_pack_refuses(capsys, models: Path, latent: Path, tmp_path: Path):
    assert "it is packed already" in error(capsys, "pack", models / "packed", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    assert "is the latent model itself" in error(capsys, "pack", latent, latent, "--overwrite")
    assert "is a file: name a folder" in error(capsys, "pack", latent, models / "rows.jsonl")


def test_pack_refuses_an_unfinished_stompp_run(capsys, models: Path, tmp_path: Path):
    words = ["--train_file", models / "rows.jsonl", "--do_train", "--max_steps", 4, "--save_steps", 1, *QUIET]
    words += ["--method", "stompp", "--save_strategy", "steps", "--per_device_train_batch_size", 4]
    run = tmp_path / "run"
    told(capsys, "train", "text", "--model_name_or_path", models / "float", "--output_dir", run, *words)
    line = error(capsys, "pack", run / "checkpoint-1", tmp_path / "packed")
    assert "the method has made only" in line
    assert not (tmp_path / "packed").exists()
    told(capsys, "pack", run / "checkpoint-1", tmp_path / "committed", "--allow_unfinished")
    told(capsys, "pack", run / "checkpoint-4", tmp_path / "finished")
    one, other = (BinaryBertForSequenceClassification.from_pretrained(p) for p in (tmp_path / "finished", run))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


# Models on the Hub


def on_hub(hub: FakeHub, cache: Path, *commands: list[object]) -> list[tuple[int, str, str]]:
    """Run commands in one process that sees this Hub; the exit code, stdout and stderr of each."""
    code = (
        "import contextlib, io, json, sys\nfrom hf_bnn.cli import main\nfound = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:\n"
        "        code = main(words)\n"
        "    found.append((code, out.getvalue(), err.getvalue()))\n"
        "print(json.dumps(found))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(cache)}
    words = [sys.executable, "-c", code, json.dumps([[str(word) for word in command] for command in commands])]
    done = subprocess.run(words, env=environment, cwd=cache, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(found) for found in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.multiprocess
def test_commands_take_a_revision_of_a_model_on_the_hub(capsys, models: Path, tmp_path: Path):
    expected = [told(capsys, *words) for words in (["summary", models / "packed"], ["card", models / "packed"])]
    with FakeHub() as hub:
        repository = hub.add("model", "me/tiny", models / "float")
        repository.commit({path.name: path.read_bytes() for path in (models / "packed").iterdir()}, "binary")
        chosen = ["--revision", "binary"]
        commands = [["summary", "me/tiny", *chosen], ["card", "me/tiny", *chosen, "--name", "packed"]]
        commands += [["check", "me/tiny", *chosen, "--text", "the film was good", "--json"]]
        commands += [["predict", "me/tiny", *chosen, "--text", "the film was good"], ["summary", "me/tiny"]]
        commands += [["summary", "me/tiny", "--revision", "none"]]
        summary, card, check, predict, main_branch, missing = on_hub(hub, tmp_path, *commands)
    assert [summary[:2], card[:2]] == [(0, expected[0]), (0, expected[1])]
    assert len(json.loads(check[1])["layers"]) == 6
    assert predict[0] == 0
    assert predict[1].startswith("prediction\tscore\t")
    assert main_branch[0] == 2
    assert "holds a 'bert' model, which is not binary" in main_branch[2]
    assert missing[0] == 2
    assert "none is not a valid git identifier" in missing[2]


def test_a_folder_has_no_revision(capsys, models: Path, tmp_path: Path):
    message = f"--revision v1 is for a model on the Hub, but {models / 'latent'} is a folder: leave it out"
    for words in (["summary", models / "latent"], ["pack", models / "latent", tmp_path / "packed"]):
        assert message in error(capsys, *words, "--revision", "v1")


@pytest.mark.multiprocess
def test_a_model_on_the_hub_is_packed_with_its_tokenizer(models: Path, tmp_path: Path):
    with FakeHub() as hub:
        hub.add("model", "me/latent", models / "latent")
        ((code, text, told_of),) = on_hub(hub, tmp_path, ["pack", "me/latent", tmp_path / "packed", "--json"])
    assert code == 0, told_of
    found = json.loads(text)
    assert set(PROCESSOR_FILES) <= set(found["processor_files"])
    assert found["bytes"] == (tmp_path / "packed" / "model.safetensors").stat().st_size
    model = BinaryBertForSequenceClassification.from_pretrained(tmp_path / "packed")
    expected = pack_(BinaryBertForSequenceClassification.from_pretrained(models / "latent"))
    assert different(model.state_dict(), expected.state_dict()) == []


# predict


def test_predict_texts(capsys, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [row["text"] for row in rows(16)]
    table = told(capsys, "predict", models / "packed", "--file", models / "rows.jsonl", "--batch_size", 5)
    lines = [line.split("\t") for line in table.splitlines()]
    assert lines[0] == ["prediction", "score", "p(bad)", "p(good)", "text"]
    assert [line[-1] for line in lines[1:]] == texts
    found = json.loads(told(capsys, "predict", models / "latent", "--json", "--text", *texts))
    assert [row["prediction"] for row in found] == [line[0] for line in lines[1:]]
    assert found[0]["score"] == pytest.approx(float(lines[1][1]), abs=1e-5)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert told(capsys, "predict", models / "packed", "--file", tmp_path / "texts.txt", "--batch_size", 5) == table
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts)))
    assert told(capsys, "predict", models / "packed", "--file", "-", "--batch_size", 5) == table


def test_predict_images(capsys, models: Path, tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    for index in range(3):
        image.new("RGB", (12, 9), (80 * index, 10, 200)).save(tmp_path / f"{index}.png")
    found = json.loads(told(capsys, "predict", models / "vit", "--images", tmp_path, "--json"))
    assert [Path(row["image"]).name for row in found] == ["0.png", "1.png", "2.png"]
    assert all(row["prediction"].startswith("LABEL_") for row in found)
    (tmp_path / "1.png").write_bytes(b"no image")
    line = error(capsys, "predict", models / "vit", "--images", tmp_path)
    assert "1.png" in line
    assert "cannot be read" in line


def test_mistakes_of_predict(capsys, models: Path, tmp_path: Path):
    packed = models / "packed"
    assert "nothing to predict" in error(capsys, "predict", packed)
    assert "--text and --file were both given" in error(capsys, "predict", packed, "--text", "a", "--file", "b.csv")
    assert "reads texts: give --text or --file" in error(capsys, "predict", packed, "--images", tmp_path)
    assert "reads images: give --images" in error(capsys, "predict", models / "vit", "--text", "a")
    assert "there is no such file" in error(capsys, "predict", packed, "--file", tmp_path / "none.csv")
    assert "is of no known kind" in error(capsys, "predict", packed, "--file", tmp_path / "none.xls")
    table = write(tmp_path / "two.csv", [{"a": "good", "b": "bad"}])
    assert "name the one with the texts in --column" in error(capsys, "predict", packed, "--file", table)
    assert "has no column 'c'" in error(capsys, "predict", packed, "--file", table, "--column", "c")
    assert "good" in told(capsys, "predict", packed, "--file", table, "--column", "a", "b")
    pack_(tiny_resnet()).save_pretrained(tmp_path / "resnet")
    assert f"{tmp_path / 'resnet'}: " in error(capsys, "predict", tmp_path / "resnet", "--images", tmp_path / "two.csv")


# bench, doctor


def test_bench(capsys, models: Path):
    threads = torch.get_num_threads()
    words = ("--rounds", 2, "--batch_size", 1, 3, "--threads", 1)
    found = json.loads(told(capsys, "bench", models / "packed", *words, "--json"))
    assert [row["input"] for row in found["results"]] == [[1, 32], [3, 32]]
    assert found["machine"]["threads"] == 1
    assert {"cpu", "backend"} <= found["machine"].keys()
    assert torch.get_num_threads() == threads
    text = told(capsys, "bench", models / "vit", *words)
    assert "3 x 3 x 8 x 8" in text
    assert "'0' is no whole number from 1 on" in error(capsys, "bench", models / "vit", "--rounds", 0)


def test_doctor_says_what_is_slow_and_what_is_missing(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_module, "version_of", lambda name: None if name == "scipy" else "1.0")
    text = told(capsys, "doctor", code=int(kernels.backend() == "torch"))
    assert 'scipy (for train, compare): pip install "hf-bnn[scripts]"' in text
    found = {"available": ["torch"], "backend": "torch", "threads": 9, "cores": 2, "cuda": "H100"}
    said = doctor_module.slow({**found, "kernels_problem": "X", "kernels_remedy": "Do Y"})
    assert said[0] == "Packed models run in torch, without kernels for bits, since X. Do Y."
    assert "set OMP_NUM_THREADS=2" in said[1]
    assert len(said) == 2


@pytest.mark.multiprocess
def test_the_module_runs_as_a_program(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "hf_bnn", "doctor", "--json"]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == int(found["backend"] == "torch")
    assert found["versions"]["torch"] == version("torch")


# train and compare


def test_train_passes_everything_through(capsys, models: Path, tmp_path: Path):
    words = ["--model_name_or_path", models / "float", "--validation_file", models / "rows.jsonl", *QUIET]
    told(capsys, "train", "text", *words, "--do_eval", "--output_dir", tmp_path)
    assert "eval_accuracy" in json.loads((tmp_path / "all_results.json").read_text())
    assert error(capsys, "train", "text", *words, "--output_dir", tmp_path).startswith(
        "hf-bnn train: error: nothing to do"
    )
    assert "invalid choice: 'sound'" in error(capsys, "train", "sound")
    assert "--model_name_or_path" in told(capsys, "train", "text", "--help")
    assert "--mixup_alpha" in told(capsys, "train", "images", "--help")


def test_a_missing_extra_is_named_with_its_command(capsys, monkeypatch: pytest.MonkeyPatch):
    for package, extra in (("datasets", "scripts"), ("PIL", "images")):

        def lacking(*_: str, package: str = package) -> None:
            raise ModuleNotFoundError(f"No module named '{package}'", name=f"{package}.part")

        with monkeypatch.context() as patch:
            patch.setattr(train.importlib, "import_module", lacking)
            with pytest.raises(UsageError) as caught:
                train.train(["text"])
        assert str(caught.value) == f"the package '{package}' is missing: pip install \"hf-bnn[{extra}]\""


Score = dict[tuple[str, int], float]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Score:
    """Accuracies, by method and seed, that stand for trainings; each is made once, as what is taken out shows."""
    made: Score = {}

    def launch(kind: str, words: list[str]) -> tuple[int, int]:
        method = "float" if "none" in words else words[words.index("--method") + 1]
        key = (method, int(words[words.index("--seed") + 1]))
        if key not in made:
            return 2, 1
        folder = Path(words[words.index("--output_dir") + 1])
        metrics = {"eval_accuracy": made.pop(key), "eval_loss": 1.0, "train_runtime": 2.0}
        (folder / "all_results.json").write_text(json.dumps(metrics))
        return 0, 5_000_000

    monkeypatch.setattr(compare, "launch", launch)
    return made


def test_compare_goes_on_where_it_was_stopped(capsys, scores: Score, tmp_path: Path):
    words = ["compare", "text", "--methods", "ste", "surge", "--seeds", 0, 1, 2, "--output_dir", tmp_path, "--x", "1"]
    scores.update({("ste", 0): 0.5, ("surge", 0): 0.61})
    line = error(capsys, *words)
    assert line == "hf-bnn compare: the run of ste with seed 1 failed (exit code 2)"
    assert not (tmp_path / "ste" / "seed-1").exists()
    scores.update({("ste", 1): 0.52, ("ste", 2): 0.54, ("surge", 1): 0.62, ("surge", 2): 0.63})
    found = json.loads(told(capsys, *words, "--json"))
    assert scores == {}
    first, second = found["methods"]
    assert (first["mean"], first["difference"], first["seconds"]) == (pytest.approx(0.52), None, 2.0)
    assert second["difference"] == pytest.approx(0.1)
    # mean 0.1, deviation 0.01, t(0.975, 2) = 4.3027
    assert second["interval"] == pytest.approx([0.1 - 4.3027 * 0.01 / 3**0.5, 0.1 + 4.3027 * 0.01 / 3**0.5], abs=1e-6)
    assert found["advice"] == (
        "In eval_accuracy, on this data, surge is better than ste by 0.07516 to 0.1248 (95 % interval over 3 seeds)."
    )
    text = told(capsys, *words)
    assert text.splitlines()[-1] == found["advice"]
    assert "+0.0752 to +0.1248" in text
    assert "holds a run with other arguments" in error(capsys, *words, "--y", "2")


def test_compare_claims_no_more_than_the_intervals_show(capsys, scores: Score, tmp_path: Path):
    words = ["compare", "text", "--methods", "ste", "float", "--output_dir", tmp_path, "--seeds"]
    scores.update({("ste", 0): 0.5, ("float", 0): 0.9, ("ste", 1): 0.6, ("float", 1): 0.58})
    assert "One seed shows nothing" in told(capsys, *words, 0)
    assert "do not show that any method differs from ste" in told(capsys, *words, 0, 1)
    assert compare.interval([0.1, 0.1]) is None
    rows = [{"method": "a"}, {"method": "b", "interval": [0.1, 0.3]}, {"method": "c", "interval": [-0.1, 0.2]}]
    assert compare.advice(rows, "eval_mse", 4) == (
        "In eval_mse, on this data, b is worse than a by 0.1 to 0.3 (95 % interval over 4 seeds, each interval taken "
        "by itself)."
    )


def test_mistakes_of_compare(capsys, scores: Score, tmp_path: Path):
    words = ["compare", "text", "--output_dir", tmp_path, "--methods"]
    assert "--methods surg: " in error(capsys, *words, "surg")
    assert "names 'ste' twice" in error(capsys, *words, "ste", "ste")
    assert "--seed is not for comparisons" in error(capsys, *words, "ste", "--seed=3")
    assert "--binarize is not for comparisons" in error(capsys, *words, "float", "--binarize", "both")
    scores[("ste", 0)] = 0.5
    line = error(capsys, *words, "ste", "--seeds", 0, "--metric", "f1")
    assert "no metric 'f1': give --metric; known: eval_accuracy, eval_loss" in line
    (tmp_path / "ste" / "seed-0" / "compare_run.json").unlink()
    assert "that no comparison has made" in error(capsys, *words, "ste", "--seeds", 0)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_compare_trains(capsys, models: Path, tmp_path: Path):
    data = ["--train_file", models / "rows.jsonl", "--validation_file", models / "rows.jsonl", "--max_steps", 2]
    words = ["--methods", "ste", "--seeds", 0, "--model_name_or_path", models / "float", *data, *QUIET]
    found = json.loads(told(capsys, "compare", "text", *words, "--output_dir", tmp_path, "--json"))
    (row,) = found["methods"]
    assert found["metric"] == "eval_accuracy"
    assert row["seconds"] > 0
    assert row["peak_bytes"] > 1e8
    assert (tmp_path / "ste" / "seed-0" / "model.safetensors").is_file()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_compare_trains_on_images(capsys, tmp_path: Path):
    data = ["--train_dir", write_folder(tmp_path / "train"), "--validation_dir", write_folder(tmp_path / "validation")]
    words = ["--methods", "ste", "float", "--seeds", 0, *VIT, *data, "--max_steps", 2, *QUIET]
    found = json.loads(told(capsys, "compare", "images", *words, "--output_dir", tmp_path / "out", "--json"))
    assert [row["method"] for row in found["methods"]] == ["ste", "float"]
    assert found["metric"] == "eval_accuracy"
    kept = [json.loads((tmp_path / f"out/{name}/seed-0/config.json").read_text()) for name in ("ste", "float")]
    assert [config["weight_format"] for config in kept] == ["packed", "float"]


def test_ctrl_c_stops_compare_and_the_same_command_goes_on(
    capsys, scores: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["compare", "text", "--methods", "ste", "surge", "--seeds", 0, "--output_dir", tmp_path]
    scores[("ste", 0)] = 0.5
    launch = compare.launch

    def stopped(kind: str, given: list[str]) -> tuple[int, int]:
        if "surge" in given:
            raise KeyboardInterrupt
        return launch(kind, given)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "launch", stopped)
        assert error(capsys, *words, code=130) == "hf-bnn compare: stopped"
    assert not (tmp_path / "comparison.json").exists()
    scores[("surge", 0)] = 0.6
    found = json.loads(told(capsys, *words, "--json"))
    assert [row["values"] for row in found["methods"]] == [[0.5], [0.6]]
    assert [row["seconds"] for row in found["methods"]] == [2.0, None]  # the second one was interrupted


@pytest.mark.multiprocess
@pytest.mark.slow
def test_ctrl_c_ends_the_training_that_compare_has_started(models: Path, tmp_path: Path):
    data = ["--train_file", models / "rows.jsonl", "--validation_file", models / "rows.jsonl", "--max_steps", 100_000]
    words = ["--methods", "ste", "--seeds", 0, "--model_name_or_path", models / "float", *data, *QUIET]
    words += ["--save_strategy", "steps", "--save_steps", 5, "--output_dir", tmp_path]
    # A program that a shell has started in the background ignores SIGINT, and so would those that it starts.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from hf_bnn.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "compare", "text", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    folder, end = tmp_path / "ste" / "seed-0", time.monotonic() + 120
    try:
        while not list(folder.glob("checkpoint-*/hf_bnn_run.json")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "hf-bnn compare: stopped"
    assert "Traceback" not in said
    before = sorted(path.name for path in folder.iterdir())
    time.sleep(1)
    assert sorted(path.name for path in folder.iterdir()) == before  # nothing trains on
