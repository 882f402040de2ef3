"""README and docs: their commands and examples run, and their tables are those of the figures that are committed.

The Python blocks of a page are one program, from top to bottom. A block after the line `<!-- not run: reason -->` is
compiled only.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import update_readme
from datasets import Dataset
from fake_hub import FakeHub
from image_runs import parquet, table
from test_run_glue import save_bert
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from hf_bnn import METHODS, BinaryBertForSequenceClassification, pack_

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "pages").glob("*.md")))
}
PRINTED = {  # what the program of a page prints, among other things
    "README.md": "'score':",
    "docs/pages/deployment.md": "'score':",
    "docs/pages/guide.md": "",
    "docs/pages/methods.md": "",
    "docs/pages/models.md": "distilbert.transformer.layer.0.ffn.lin2.input:",
}
MOST_WORDS = 1200
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    pip install")]


class Block(NamedTuple):
    """A Python block of a page; `reason`: why it is not run."""

    code: str
    reason: str


def python_blocks(text: str) -> list[Block]:
    """The fenced Python blocks, in order."""
    found = re.findall(r"(?:^<!-- not run: (.+) -->\n+)?^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(code, reason) for reason, code in found]


def program_of(page: str) -> str:
    """The blocks of a page that are run, as one program."""
    return "\n".join(block.code for block in python_blocks(PAGES[page]) if not block.reason)


def test_the_blocks_of_a_page_are_found():
    text = "a\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n\n```python\nx = 2\n```\n```\ny\n```\n"
    assert python_blocks(text) == [Block("x = 1\n", ""), Block("x = 2\n", "needs a GPU")]


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_that_says_python_is_a_block_that_compiles(page: str):
    blocks = python_blocks(PAGES[page])
    assert len(re.findall(r"```\s*(?:python|py)\b", PAGES[page])) == len(blocks)
    for block in blocks:
        compile(block.code, page, "exec")


def test_every_page_with_blocks_is_run():
    assert {page for page in PAGES if program_of(page)} == set(PRINTED)


def test_the_readme_is_short():
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_to_files_of_the_repository_lead_somewhere(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).is_file(), target


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
    """A local Hub with the repositories that README and docs name, in small."""
    model = save_bert(tmp_path / "model")
    data = Dataset.from_dict({"sentence": ["a gem", "a bore"] * 8, "label": [1, 0] * 8, "idx": list(range(16))})
    data.to_parquet(tmp_path / "rows.parquet")
    rows = (tmp_path / "rows.parquet").read_bytes()
    with FakeHub() as hub:
        hub.add("model", "google-bert/bert-base-uncased", model)
        hub.add("model", "textattack/bert-base-uncased-SST-2", model)
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
    """The output of a program that sees the local Hub and must succeed."""
    env = {**os.environ, **hub.environment(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def save_packed_bert(folder: Path, source: Path) -> None:
    """The output of the quick start: a packed BERT with its tokenizer."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    pack_(BinaryBertForSequenceClassification.from_pretrained(source)).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("page", PRINTED)
def test_the_examples_of_a_page_run(page: str, hub, tmp_path):
    save_packed_bert(tmp_path / "quickstart" / "packed", tmp_path / "model")
    (tmp_path / "example.py").write_text(program_of(page))
    assert PRINTED[page] in run_at(hub, [sys.executable, "example.py"], tmp_path)
    for folder in ("distilbert-binary", "sst2-binary"):  # whatever is saved is packed
        if (tmp_path / folder).exists():
            config = json.loads((tmp_path / folder / "config.json").read_text())
            assert config.get("quantization_config", config)["weight_format"] == "packed"


def command_of(start: str) -> list[str]:
    """The words of the one command of the pages that starts so."""
    text = "\n".join(PAGES.values())
    (command,) = re.findall(rf"^    ({re.escape(start)}.*?[^\\])\n", text, re.DOTALL | re.MULTILINE)
    return shlex.split(command.replace("\\\n", " ").replace("scripts/", f"{ROOT}/scripts/"))


def check_run(folder: Path) -> None:
    """A run has left its metrics and a packed model."""
    written = json.loads((folder / "all_results.json").read_text())
    assert 0 <= written["eval_accuracy"] <= 1
    assert json.loads((folder / "config.json").read_text())["weight_format"] == "packed"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_run_glue_command_of_the_guide_runs(hub, tmp_path):
    words = command_of("accelerate launch scripts/run_glue.py")
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:], "--max_steps", "2", "--use_cpu"]
    run_at(hub, words, tmp_path)
    check_run(tmp_path / "sst2-binary")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_command_of_the_guide_for_two_processes_runs_two(hub, tmp_path):
    words = command_of("accelerate launch --config_file scripts/accelerate/cpu_2_processes.yaml")
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:], "--max_steps", "2"]
    output = run_at(hub, words, tmp_path)
    assert "process 0 of 2" in output
    assert "process 1 of 2" in output
    check_run(tmp_path / "sst2-binary")


@pytest.mark.parametrize("name", ["cpu_2_processes", "one_machine", "two_machines"])
def test_accelerate_reads_the_configurations(name: str):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "scripts" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes % config.num_machines == 0
    assert config.num_machines == (2 if name == "two_machines" else 1)


def test_the_slurm_job_is_a_shell_script():
    subprocess.run(["bash", "-n", ROOT / "scripts" / "accelerate" / "train.sbatch"], check=True)


@pytest.mark.multiprocess
def test_the_run_image_classification_command_of_the_guide_runs(hub, tmp_path):
    words = command_of("python scripts/run_image_classification.py")
    run_at(hub, [sys.executable, *words[1:], "--max_steps", "2", "--use_cpu"], tmp_path)
    check_run(tmp_path / "cifar10-binary")


@pytest.mark.parametrize("file", update_readme.documents())
def test_the_generated_blocks_are_those_of_the_committed_figures(file: str):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert update_readme.updated(text, update_readme.documents()[file], file) == text


def test_every_marked_block_is_generated():
    marked = {page: set(re.findall(r"^<!-- /(\w+) -->$", text, re.MULTILINE)) for page, text in PAGES.items()}
    generated = {file: set(blocks) for file, blocks in update_readme.documents().items()}
    assert {page: names for page, names in marked.items() if names} == generated


def test_a_missing_or_repeated_place_of_a_block_is_an_error():
    with pytest.raises(ValueError, match=r"docs/a.md has 0 places marked <!-- speed -->: expected 1"):
        update_readme.updated("", {"speed": "fast"}, "docs/a.md")
    with pytest.raises(ValueError, match="has 2 places"):
        update_readme.updated("<!-- speed -->\n<!-- /speed -->\n" * 2, {"speed": "fast"})


def test_a_method_that_was_not_measured_says_so():
    rows = [{"name": "ste", "tokens": 512, "over_ste": 1.0}, {"name": "xnor", "tokens": 8, "over_ste": 2.0}]
    lines = update_readme.methods_table({"rows": rows}).splitlines()
    assert lines[2].endswith("| 1.00 |")
    assert {line.rpartition(" | ")[2] for line in lines[3:]} == {"not measured |"}
    assert len(lines) == 2 + len(METHODS) + 1
