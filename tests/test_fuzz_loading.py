"""A seeded sample of the cases of scripts/benchmarks/fuzz_loading.py, and that the script can find a fault."""

import json
import mmap
import os
import shutil
import signal
import time

import fuzz_loading
import limited_process
import pytest
from fuzz_loading import bases, fuzz, load, table
from fuzz_mutations import MUTATIONS, recompute_digests
from limited_process import Outcome, run_limited
from safetensors.torch import load_file, save_file

from hf_bnn.models.base import BinaryModelMixin


def test_no_mutated_folder_is_loaded_as_another_model():
    results = fuzz(cases=60, seed=7)
    assert [case for case in results if case["fault"]] == []
    assert {case["digests"] for case in results} == {"kept", "recomputed"}
    assert {case["mutation"] for case in results} == {mutation.__name__ for mutation in MUTATIONS}
    assert sum(case["outcome"] == "refused" for case in results) > 20
    assert "| refused |" in table(results)


def test_the_cases_of_a_seed_are_always_the_same(monkeypatch):
    monkeypatch.setattr(fuzz_loading, "run_limited", lambda load: Outcome("different", "x"))
    first, second = fuzz(20, 3), fuzz(20, 3)
    untimed = [[{**case, "seconds": 0} for case in results] for results in (first, second)]
    assert untimed[0] == untimed[1]


def test_the_script_would_see_another_model(tmp_path, monkeypatch):
    base = bases(tmp_path)[1]
    saved = load(base, base.folder, False, None, True).detail
    path = base.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.bias"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert load(base, base.folder, False, saved, True).kind == "refused"
    monkeypatch.setattr(BinaryModelMixin, "check_files", lambda *_: None)
    assert load(base, base.folder, False, saved, True).kind == "different"


def test_recomputed_digests_agree_with_the_folder(tmp_path):
    base = bases(tmp_path)[0]
    saved = load(base, base.folder, True, None, True).detail
    config = json.loads((base.folder / "config.json").read_text())
    (base.folder / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.5}))
    assert load(base, base.folder, True, saved, True).kind == "refused"
    recompute_digests(base.folder)
    assert load(base, base.folder, True, saved, True).kind == "same"
    shutil.rmtree(base.folder)
    recompute_digests(base.folder)  # nothing to read is no error


def fill(size: int) -> int:
    """Touch so many bytes of fresh memory: the allocator may hold memory that earlier tests have freed."""
    with mmap.mmap(-1, size) as memory:
        return sum(memory.write(bytes(2**20)) for _ in range(size // 2**20))


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (lambda: time.sleep(30), "hung"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "crashed"),
        (lambda: Outcome("same", str(fill(2**27 + 2**25))), "too much memory"),
    ],
)
def test_crashes_hangs_and_memory_are_seen(monkeypatch, bad, kind):
    monkeypatch.setattr(limited_process, "SECONDS", 1 if kind == "hung" else 60)
    monkeypatch.setattr(limited_process, "GIGABYTES", 0.25)
    assert run_limited(bad).kind == kind
