"""scripts/quickstart.py, the README's first command: what it writes, how it stops and goes on, what it refuses."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quickstart
import torch
from datasets import Dataset
from safetensors.torch import load_file

from hf_bnn import make_method
from hf_bnn.methods import Surge

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(QUICKSTART,) = re.findall(r"^    pip install .* && (python scripts/quickstart.*)$", README, re.MULTILINE)


def run(command: str, *more: str, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, *shlex.split(command)[1:], *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The README's first command with a step limit, twice into one folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = QUICKSTART.replace("--output_dir quickstart", f"--output_dir {folder}")
    first = run(command, "--max_steps", "3")
    assert first.returncode == 0, first.stderr[-3000:]
    second = run(command, "--max_steps", "3", "--method", "approx_sign")
    assert second.returncode == 0, second.stderr[-3000:]
    return folder, first.stdout + first.stderr, second.stdout + second.stderr


@pytest.mark.slow
def test_the_quick_start_packs_reloads_and_measures(smoke):
    folder, first, _ = smoke
    results = json.loads((folder / "results.json").read_text())
    assert results["packed_equals_latent"] is True
    assert results["matrix_compression"] >= 30
    assert results["bytes_float"] / results["bytes_packed"] >= 6
    assert results["bytes_packed"] == (folder / "packed" / "model.safetensors").stat().st_size
    assert results["bytes_float"] == (folder / "teacher" / "model.safetensors").stat().st_size
    assert 0.4 < results["binary_share"] < 0.5
    for key in ("latency_float_ms", "latency_packed_ms", "seconds_total"):
        assert results[key] > 0
    assert results["versions"]["torch"]
    assert results["arguments"]["method"] == "approx_sign"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    bits = load_file(folder / "packed" / "model.safetensors")["bert.encoder.layer.0.output.dense.weight"]
    assert (bits.dtype, bits.shape) == (torch.uint8, (384, 192))
    assert "packed logits equal the trained model's: yes" in first
    assert "| 3/3 [" in first  # a progress bar


@pytest.mark.slow
def test_a_smoke_run_claims_no_accuracy(smoke):
    folder, first, second = smoke
    results = json.loads((folder / "results.json").read_text())
    assert results["accuracy_float"] is None
    assert results["accuracy_binary"] is None
    for printed in (first, second):
        assert "accuracy: not reported, this was a smoke run of 3 steps" in printed
        assert not re.search(r"accuracy.*\d\d\.\d%", printed)
        assert "eval_accuracy" not in printed


@pytest.mark.slow
def test_a_second_run_uses_the_finished_teacher(smoke):
    folder, first, second = smoke
    assert "teacher: fine-tuning the float model" in first
    assert len(list(folder.glob("runs/teacher-*/checkpoint-3"))) == 1
    assert not list(folder.glob("teacher/checkpoint-*"))
    assert "is finished, and used again" in second


@pytest.mark.slow
def test_ctrl_c_leaves_a_state_that_resumes(smoke):
    folder, _, _ = smoke
    words = [sys.executable, *shlex.split(QUICKSTART)[1:2], "--output_dir", str(folder), "--max_steps", "3"]
    words += ["--method", "ste"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "binary model: training" in line:
            time.sleep(1.0)
            process.send_signal(signal.SIGINT)
            break
    output, _ = process.communicate(timeout=300)
    if process.returncode == 130:  # stopped between two steps; a faster machine was done before the signal came
        assert "the same command will go on from here" in output
        assert list((folder / "runs").glob("ste-*/checkpoint-*/hf_bnn_manifest.json"))
    again = run(
        QUICKSTART.replace("--output_dir quickstart", f"--output_dir {folder}"), "--max_steps", "3", "--method", "ste"
    )
    assert again.returncode == 0, again.stderr[-3000:]


def test_no_run_goes_on_from_the_checkpoints_of_another_choice(tmp_path):
    choices = [{"seed": 0, "max_steps": -1}, {"seed": 1, "max_steps": -1}, {"seed": 0, "max_steps": 3}]
    folders = {quickstart.run_folder(str(tmp_path), "teacher", chosen) for chosen in choices}
    assert len(folders) == 3
    assert quickstart.run_folder(str(tmp_path), "teacher", {"max_steps": 3, "seed": 0}) in folders


def test_only_a_run_with_a_branch_is_said_to_be_trained_with_surge():
    assert quickstart.method_name("surge", "eta=0.1,aux=leaky") == "leaky STE (surge, eta=0.1,aux=leaky)"
    assert quickstart.method_name("surge", "eta=0.1,aux=own") == "surge (eta=0.1,aux=own)"
    assert quickstart.method_name("surge", None) == "surge"
    assert quickstart.method_name("stompp+surge", "order=global") == "stompp+surge (order=global)"
    (arguments,) = quickstart.HfArgumentParser(quickstart.QuickstartArguments).parse_args_into_dataclasses([])
    assert make_method(arguments.method, arguments.method_args) == Surge(eta=0.1, aux="leaky")


def test_altered_sentences_are_made_of_the_real_ones():
    rows = [[101, *range(10 * i, 10 * i + 9), 102] for i in range(1, 21)]
    columns = {"input_ids": rows, "token_type_ids": [[0] * 11] * 20, "attention_mask": [[1] * 11] * 20}
    sentences = Dataset.from_dict({**columns, "labels": [0, 1] * 10})
    more = quickstart.altered(sentences, 2, seed=0)
    assert len(more) == 60
    assert more["input_ids"][:20] == rows
    assert more["labels"][:] == [0, 1] * 30
    for row, mask in zip(more["input_ids"][20:], more["attention_mask"][20:], strict=True):
        assert (row[0], row[-1], len(mask)) == (101, 102, len(row))
        assert len({token // 10 for token in row[1:-1]}) <= 2  # words of one sentence, or of two
    assert sum(row in rows for row in more["input_ids"][20:]) < 20
    assert more["input_ids"][:] == quickstart.altered(sentences, 2, seed=0)["input_ids"][:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "surg"], "unknown method 'surg'; known methods: ste, "),
        (["--method_args", "etta=1"], "unknown argument 'etta' of method 'surge'"),
        (["--preset", "slow"], "preset='slow': expected one of quick, long"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_runs(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        quickstart.main(["--output_dir", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()
