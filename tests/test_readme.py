"""The README: its commands and examples run, and its tables are those of the figures that are committed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import update_readme
from datasets import Dataset
from fake_hub import FakeHub
from test_run_glue import save_bert
from test_run_image_classification import parquet, table
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from hf_bnn import BinaryBertForSequenceClassification, pack_

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    pip install")]
TRAINER_EXAMPLE, PLUG_IN_EXAMPLE, SPEED_EXAMPLE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_has_the_two_commands():
    assert COMMANDS == [
        'pip install -c constraints.txt -e ".[demo]" && python scripts/quickstart.py --output_dir quickstart',
        'pip install -c constraints.txt -e ".[test,demo]" && python -m pytest -n 2 --dist loadfile',
    ]


def save_resnet(folder: Path) -> Path:
    """A float ResNet of two blocks with its image processor."""
    torch.manual_seed(0)
    size = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    ResNetForImageClassification(ResNetConfig(**size)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_distilbert(folder: Path) -> Path:
    """A float DistilBERT of one layer, with the vocabulary of the real one."""
    torch.manual_seed(0)
    config = DistilBertConfig(dim=32, hidden_dim=64, n_layers=1, n_heads=2)
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path):
    """A local Hub with the repositories that the README names, in small."""
    model = save_bert(tmp_path / "model")
    data = Dataset.from_dict({"sentence": ["a gem", "a bore"] * 8, "label": [1, 0] * 8, "idx": list(range(16))})
    data.to_parquet(tmp_path / "rows.parquet")
    rows = (tmp_path / "rows.parquet").read_bytes()
    with FakeHub() as hub:
        hub.add("model", "google-bert/bert-base-uncased", model)
        splits = ("train", "validation", "test")
        hub.add("dataset", "stanfordnlp/sst2", {f"data/{split}-00000-of-00001.parquet": rows for split in splits})
        listed = "".join(f"  - split: {split}\n    path: sst2/{split}-*\n" for split in splits)
        card = f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{listed}---\n"
        files = {f"sst2/{split}-00000-of-00001.parquet": rows for split in splits}
        hub.add("dataset", "nyu-mll/glue", {"README.md": card.encode(), **files})
        hub.add("model", "microsoft/resnet-18", save_resnet(tmp_path / "resnet"))
        hub.add("model", "distilbert/distilbert-base-uncased", save_distilbert(tmp_path / "distilbert"))
        images = {f"data/{split}-00000-of-00001.parquet": parquet(table(8, size=32)) for split in ("train", "test")}
        hub.add("dataset", "uoft-cs/cifar10", images)
        yield hub


def run_at(hub: FakeHub, words: list[str], folder: Path) -> str:
    """What a program that sees the local Hub prints; it must end well."""
    env = {**os.environ, **hub.environment(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_readmes_example_runs(hub, tmp_path):
    assert TRAINER_EXAMPLE.count("\n") <= 15
    (tmp_path / "example.py").write_text(TRAINER_EXAMPLE)
    assert "'score':" in run_at(hub, [sys.executable, "example.py"], tmp_path)


@pytest.mark.multiprocess
def test_the_readmes_example_of_another_architecture_runs(hub, tmp_path):
    (tmp_path / "example.py").write_text(PLUG_IN_EXAMPLE)
    printed = run_at(hub, [sys.executable, "example.py"], tmp_path)
    assert "distilbert.transformer.layer.0.ffn.lin2.input:" in printed
    config = json.loads((tmp_path / "distilbert-binary" / "config.json").read_text())
    assert config["quantization_config"]["weight_format"] == "packed"


@pytest.mark.multiprocess
def test_the_readmes_example_of_an_optimized_model_runs(hub, tmp_path):
    packed = pack_(BinaryBertForSequenceClassification.from_pretrained(save_bert(tmp_path / "float")))
    shutil.copytree(
        tmp_path / "float", tmp_path / "quickstart" / "packed", ignore=shutil.ignore_patterns("*.safetensors")
    )
    packed.save_pretrained(tmp_path / "quickstart" / "packed")
    (tmp_path / "example.py").write_text(SPEED_EXAMPLE)
    assert "'score':" in run_at(hub, [sys.executable, "example.py"], tmp_path)


def command_of(start: str) -> list[str]:
    """The words of the README's command that starts so."""
    (command,) = re.findall(rf"^    ({re.escape(start)}.*?[^\\])\n", README, re.DOTALL | re.MULTILINE)
    return shlex.split(command.replace("\\\n", " ").replace("scripts/", f"{ROOT}/scripts/"))


def check_run(folder: Path) -> None:
    """A run has left its metrics and a packed model."""
    written = json.loads((folder / "all_results.json").read_text())
    assert 0 <= written["eval_accuracy"] <= 1
    assert json.loads((folder / "config.json").read_text())["weight_format"] == "packed"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_readmes_run_glue_command_runs(hub, tmp_path):
    words = command_of("accelerate launch scripts/run_glue.py")
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:], "--max_steps", "2", "--use_cpu"]
    run_at(hub, words, tmp_path)
    check_run(tmp_path / "sst2-binary")


@pytest.mark.multiprocess
def test_the_readmes_run_image_classification_command_runs(hub, tmp_path):
    words = command_of("python scripts/run_image_classification.py")
    run_at(hub, [sys.executable, *words[1:], "--max_steps", "2", "--use_cpu"], tmp_path)
    check_run(tmp_path / "cifar10-binary")


def test_the_readmes_tables_are_those_of_the_committed_figures():
    assert update_readme.updated(README) == README
